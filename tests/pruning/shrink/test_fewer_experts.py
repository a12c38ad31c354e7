"""Tokens that go to fewer experts, against transformers with another config or router."""

import numpy as np
import pytest
import torch

from convert.checkpoint import open_checkpoint
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.shrink.fewer_experts import Fewer
from pruning.shrink.masked import masked_hidden
from tests.support import tiny

GROUPS = {"n_group": 4, "topk_group": 3, "q_lora_rank": 20}
FAMILIES = {"qwen2_moe": {}, "qwen3_moe": {"norm_topk_prob": True}, "deepseek_v3": GROUPS}
SHARES = {"qwen2_moe": (0.4, 0.9), "qwen3_moe": (0.25, 1.0), "deepseek_v3": ()}
TOKENS, VALID = tiny.tokens_and_mask(2, 12)


def without_light(share: float, renormalize: bool, counts: list[int]):
    """A hook of a router: experts lighter than a share of a token's best weigh nothing."""

    def hook(module, given, found):
        logits, weight, expert = found
        changed = torch.zeros_like(weight)
        for token, row in enumerate(weight.tolist()):
            left = [w if w >= share * max(row) else 0.0 for w in row]
            counts.append(sum(w > 0 for w in left))
            scale = sum(row) / sum(left) if renormalize else 1.0
            changed[token] = torch.tensor([w * scale for w in left])
        return logits, changed, expert

    return hook


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_go_to_fewer_experts_as_in_transformers(family, tmp_path):
    sizes = FAMILIES[family]
    model = tiny.tiny_model(family, num_experts_per_tok=4, **sizes)
    source = open_checkpoint(tiny.save(model, tmp_path / family))
    shares, wanted, routed = SHARES[family], [], []
    for k in (2, 1, 4):
        lowered = tiny.tiny_model(family, num_experts_per_tok=k, **sizes)
        wanted.append(tiny.torch_logits(lowered, TOKENS, VALID))
        routed.append(k * VALID.sum() * 2)
    for share in shares:
        counts, own = [], tiny.tiny_model(family, num_experts_per_tok=4, **sizes)
        for layer in own.model.layers:
            renormalize = family == "qwen3_moe"
            layer.mlp.gate.register_forward_hook(without_light(share, renormalize, counts))
        wanted.append(tiny.torch_logits(own, TOKENS, VALID))
        routed.append(np.array(counts)[np.tile(VALID.ravel(), 2)].sum())
        assert VALID.sum() * 2 <= routed[-1] < 4 * VALID.sum() * 2
    c = source.config
    keep = np.ones((len(c.moe_layers), c.moe.num_experts, c.moe.d_expert), bool)
    fewer = [Fewer(2), Fewer(1), None, *(Fewer(4, share) for share in shares)]
    plans, found = [PruningPlan(keep, tuple(c.moe_layers))] * len(fewer), np.zeros(len(fewer))
    hidden = masked_hidden(source, TOKENS, VALID, plans, fewer=fewer, routed=found, batch=2)
    logits = [np.asarray(source.head(states)) for states in hidden]
    for own, other in zip(logits, wanted, strict=True):
        np.testing.assert_allclose(own[VALID], other[VALID], rtol=1e-3, atol=2e-4)
    assert min(np.abs(one - logits[2])[VALID].max() for one in (*logits[:2], *logits[3:])) > 0.05
    assert found.tolist() == [*routed[:2], 0, *routed[3:]]  # of all experts nothing is counted


@pytest.mark.parametrize(("given", "message"), [
    ((0,), "top_k=0 must be at least 1"), ((2, 1.5), r"skip_below=1\.5 must lie in \(0, 1\]"),
    ((2, -0.1), "skip_below=-0.1 must lie"), ((2, float("nan")), "skip_below=nan must lie"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Fewer(*given)
