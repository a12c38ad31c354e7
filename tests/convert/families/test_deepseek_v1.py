"""DeepSeekMoE-16B's architecture against a plain torch rewrite, and exported as a Qwen2-MoE."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch.nn import functional as F

from convert import find_family, layer_tensors, open_checkpoint, outer_tensors
from convert.export import Export
from convert.export_format import MIXED, ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from tests.convert.families.test_families import check_codes, fill_in_exact_experts, unpack
from tests.support import tiny
from tests.support.logits import logits

CONFIG = {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
TOKENS = np.random.default_rng(2).integers(0, 96, (2, 9)).astype(np.int32)
COUNTS = np.array([[0, 32, 64, 32, 32, 64, 0, 32], [32, 32, 32, 32, 0, 32, 64, 32]])
FOUR_OR_SIXTEEN = [
    n for n in find_family("deepseek").formats if ExportFormat(n).bits != 8 and n != MIXED
]


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.1).bfloat16()

    def norm() -> torch.Tensor:
        return (torch.rand(64, generator=generator) + 0.5).bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(96, 64) * 10, "lm_head.weight": matrix(96, 64)}
    tensors["model.norm.weight"] = norm()
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm()
        tensors[prefix + "post_attention_layernorm.weight"] = norm()
        for part in "qkvo":
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = matrix(64, 64)
        networks = {"mlp.": 64}
        if layer:
            networks = {f"mlp.experts.{e}.": 96 for e in range(8)} | {"mlp.shared_experts.": 96}
            tensors[prefix + "mlp.gate.weight"] = matrix(8, 64) * 4
        for name, width in networks.items():
            tensors[f"{prefix}{name}gate_proj.weight"] = matrix(width, 64)
            tensors[f"{prefix}{name}up_proj.weight"] = matrix(width, 64)
            tensors[f"{prefix}{name}down_proj.weight"] = matrix(64, width)
    return tensors


def torch_logits(tensors: dict[str, torch.Tensor], tokens: np.ndarray, renormalise: bool):
    """The model, token by token and head by head, in float64."""
    weight = {name.removesuffix(".weight"): value.double() for name, value in tensors.items()}
    turns = 10000.0 ** (-torch.arange(8).double() / 8)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[name]

    def turned(x, position):  # the 16 coordinates of a head
        angle = position * turns
        a, b = x[:8], x[8:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def mlp(x, name):
        hidden = F.silu(weight[name + "gate_proj"] @ x) * (weight[name + "up_proj"] @ x)
        return weight[name + "down_proj"] @ hidden

    def attention(rows, name):
        q, k, v = (rows @ weight[f"{name}{part}_proj"].T for part in "qkv")
        out = torch.zeros_like(rows)
        for head in range(4):
            own = slice(16 * head, 16 * head + 16)
            keys = torch.stack([turned(row[own], i) for i, row in enumerate(k)])
            for i in range(len(rows)):
                scores = keys[: i + 1] @ turned(q[i, own], i) / 4
                out[i, own] = scores.softmax(0) @ v[: i + 1, own]
        return out @ weight[name + "o_proj"].T

    def experts(x, name):
        probability = (weight[name + "gate"] @ x).softmax(0)
        best = probability.argsort(descending=True)[:2]
        share = probability[best] / (probability[best].sum() if renormalise else 1)
        routed = sum(w * mlp(x, f"{name}experts.{e}.") for w, e in zip(share, best, strict=True))
        return routed + mlp(x, name + "shared_experts.")

    result = []
    for sequence in tokens:
        x = weight["model.embed_tokens"][torch.from_numpy(sequence).long()]
        for layer in range(3):
            prefix = f"model.layers.{layer}."
            x = x + attention(norm(x, prefix + "input_layernorm"), prefix + "self_attn.")
            inner = norm(x, prefix + "post_attention_layernorm")
            feed = experts if layer else mlp
            x = x + torch.stack([feed(row, prefix + "mlp.") for row in inner])
        result.append(norm(x, "model.norm") @ weight["lm_head"].T)
    return torch.stack(result).float().numpy()


def write(folder, **changes):
    folder.mkdir()
    save_file(random_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_checkpoint(write(tmp_path_factory.mktemp("v1") / "base"), dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def plan(base):
    keep = np.zeros((2, 8, 96), bool)
    rng = np.random.default_rng(0)
    for place in np.ndindex(2, 8):
        keep[place][rng.permutation(96)[: COUNTS[place]]] = True
    return PruningPlan(keep, (1, 2), {"model_hash": base.fingerprint})


@pytest.mark.parametrize("renormalise", [False, True])
def test_logits_equal_a_plain_rewrite_in_torch(tmp_path, renormalise):
    folder = write(tmp_path / "model", norm_topk_prob=renormalise)
    wanted = torch_logits(random_tensors(), TOKENS, renormalise)
    assert np.abs(wanted).max() > 0.5
    found = logits(open_checkpoint(folder), TOKENS)
    np.testing.assert_allclose(found, wanted, atol=5e-5, rtol=1e-5)


def test_reading_and_writing_back_returns_every_byte_and_every_name(base):
    original = load_file(base.about.folder / "model.safetensors")
    written = dict(outer_tensors(base))
    for index in range(3):
        written |= layer_tensors(base, base.layer(index), index)
    assert written.keys() == original.keys()
    assert all(written[name].tobytes() == value.tobytes() for name, value in original.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_OR_SIXTEEN)
def test_an_export_is_a_qwen2_moe_that_computes_the_pruned_model(base, plan, tmp_path, name):
    form = ExportFormat(name, 32)
    widths = ((), *(tuple(row) for row in COUNTS.tolist()))
    folder = Export(base.about, widths, form).write(PrunedSource(base, plan), tmp_path / name)
    if form.is_packed:
        wanted = logits(QuantizedSource(PrunedSource(base, plan), 32), TOKENS)
    else:
        tensors = random_tensors()
        for slot, e in np.ndindex(2, 8):
            removed = torch.from_numpy(~plan.keep[slot, e])
            tensors[f"model.layers.{slot + 1}.mlp.experts.{e}.down_proj.weight"][:, removed] = 0
        wanted = torch_logits(tensors, TOKENS, False)
    np.testing.assert_allclose(
        logits(open_checkpoint(folder, dtype=jnp.float32), TOKENS), wanted, atol=1e-5, rtol=1e-5
    )
    model, info = tiny.load_export(folder, trust=not form.is_padded)
    assert not any(info.values()), info
    expected = "Qwen2MoeForCausalLM" if form.is_padded else "RaggedQwen2MoeForCausalLM"
    assert type(model).__name__ == expected
    if form.is_packed:
        check_codes(folder, base, plan, shared_down_doubled=True)
    if name == "padded-int4":
        fill_in_exact_experts(model, base, unpack(folder))
    theirs = tiny.torch_logits(model.eval(), TOKENS, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(theirs, wanted, atol=1e-5, rtol=1e-5)
