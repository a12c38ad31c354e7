"""Folders whose routers lack the rows of emptied experts, against torch models cut by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import load_model, open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from convert.fewer_experts import check_cut
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import PrunedSource
from tests.support import tiny

EVEN, UNEVEN = ([1, 4, 5], [0, 2, 7]), ([1, 4, 5], [6])  # emptied in each of two layers
forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))


def cut_by_hand(model, dropped) -> None:
    """Slice what a router and a list of experts have a row for; the model stays one of its class,
    whose layers may differ as they cannot in a folder of it."""
    for layer, gone in zip(model.model.layers, dropped, strict=True):
        block = layer.mlp
        left = [expert for expert in range(8) if expert not in gone]
        router = block.router if hasattr(block, "router") else block.gate
        for module in (router, block.experts):
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                assert len(value) == 8
                new = value.detach()[left]
                is_weight = isinstance(value, torch.nn.Parameter)
                setattr(module, name, torch.nn.Parameter(new) if is_weight else new)
            module.num_experts = len(left)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, logits of torch) of a family's model cut and exported."""
    tokens, valid = tiny.tokens_and_mask()

    def write(family, form, dropped, top_k=None, **config):
        tmp = tmp_path_factory.mktemp("cut")
        dense = tiny.save(tiny.half(tiny.tiny_model(family, **config)), tmp / "base")
        base = open_checkpoint(dense, dtype=jnp.bfloat16)
        keep = np.ones((2, 8, base.config.moe.d_expert), bool)
        for layer, gone in zip(keep, dropped, strict=True):
            layer[gone] = False
        plan = PruningPlan(keep, (0, 1)).with_cut_router(top_k)
        widths = tuple(map(tuple, plan.counts.tolist()))
        export = Export(base.about, widths, ExportFormat(form, cut_router=True, top_k=top_k))
        export.check()
        folder = export.write(PrunedSource(base, plan), tmp / "export")
        model, _ = tiny.load_export(dense, trust=False)
        cut_by_hand(model, dropped)
        for layer in model.model.layers if top_k else ():
            layer.mlp.gate.top_k = top_k
        return folder, tiny.torch_logits(model, tokens, valid)

    return write


@pytest.mark.parametrize(("family", "form", "dropped", "top_k", "ours"), [
    ("qwen2_moe", "padded-bf16", EVEN, None, True),
    ("qwen2_moe", "ragged-bf16", UNEVEN, None, True),
    ("mixtral", "padded-bf16", EVEN, None, False),
    ("mixtral", "ragged-bf16", UNEVEN, None, False),
    ("deepseek_v3", "padded-bf16", EVEN, 1, False),
    ("deepseek_v3", "layered-bf16", EVEN, None, False),
    ("deepseek_v3", "ragged-bf16", UNEVEN, None, True),
    ("gpt_oss", "padded-bf16", EVEN, None, False),
    ("gpt_oss", "ragged-bf16", UNEVEN, None, True),
])  # fmt: skip
def test_programs_find_the_model_that_never_had_the_dropped_experts(
    written, family, form, dropped, top_k, ours
):
    folder, wanted = written(family, form, dropped, top_k)
    tokens, valid = tiny.tokens_and_mask()
    model, said = tiny.load_export(folder, trust=not form.startswith("padded"))
    assert not any(said.values())
    theirs = tiny.torch_logits(model, tokens, valid)
    assert np.abs(wanted[valid]).max() > 0.5
    np.testing.assert_allclose(theirs[valid], wanted[valid], atol=1e-5, rtol=1e-5)
    if ours:
        found = np.asarray(forward(load_model(folder, dtype="float32"), tokens, valid))
        np.testing.assert_allclose(found[valid], wanted[valid], atol=5e-5, rtol=1e-5)


def test_groups_that_lose_alike_stay_groups(written):
    groups = {"n_group": 2, "topk_group": 1}
    folder, wanted = written("deepseek_v3", "padded-bf16", ([0, 3, 5, 6], [1, 2, 4, 7]), **groups)
    tokens, valid = tiny.tokens_and_mask()
    model, said = tiny.load_export(folder, trust=False)
    assert not any(said.values()) and model.config.n_routed_experts == 4
    theirs = tiny.torch_logits(model, tokens, valid)
    np.testing.assert_allclose(theirs[valid], wanted[valid], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"leaves \[1, 3\] experts in the 2 groups of layer 0, "):
        written("deepseek_v3", "ragged-bf16", ([0, 2, 3, 5], [1, 2, 4, 7]), **groups)


# --- what cannot be expressed ---


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_checkpoint(tiny.tiny_qwen3_moe(tmp_path_factory.mktemp("base") / "model")).about


@pytest.mark.parametrize(("form", "left", "told"), [
    ({}, (5, 6, 6), "leaves 5 experts in layer 0, 6 experts in layers 1, 2, and padded-bf16 has "
                    "one number of experts for all layers; export a ragged format, or plan with "),
    ({}, (4, 1, 4), "1 experts in layer 1, fewer than the 2 that a token goes to; --top-k 1"),
    ({"top_k": 2}, (4, 1, 4), "fewer than the 2 that a token goes to; give a smaller --top-k"),
    ({"top_k": 3}, (4, 4, 4), r"top_k=3 must lie in \[1, 2\]"),
    ({"mtp": "keep"}, (4, 4, 4), "mtp='keep' keeps layers .* routers know all 8 experts"),
])  # fmt: skip
def test_what_no_format_expresses_is_refused_with_the_cure(base, form, left, told):
    widths = tuple((16,) * count + (0,) * (8 - count) for count in left)
    form = ExportFormat("padded-bf16", cut_router=True, **form)
    with pytest.raises(InputError, match=told):
        check_cut(base, widths, form)
    even = ((16, 0) * 4,) * 3
    check_cut(base, even, ExportFormat("padded-bf16", cut_router=True, top_k=1))
    check_cut(base, widths[:1], ExportFormat("ragged-bf16", cut_router=True))


def test_a_layer_whose_router_is_whole_is_not_written_as_cut(base, tmp_path):
    source = open_checkpoint(base.folder, dtype=jnp.bfloat16)
    widths = ((16,) * 7 + (0,),) * 2
    export = Export(base, widths, ExportFormat("padded-bf16", cut_router=True))
    with pytest.raises(InputError, match="knows all experts; export it without cut_router"):
        export.write(source, tmp_path / "export")
    assert export.parameters == sum(np.prod(shape) for _, shape in export.specs.values())
    whole = dataclasses.replace(export, form=ExportFormat("padded-bf16"))
    gone = 2 * (3 * 16 + 1) * 32  # an expert of each layer, and its row of the router
    assert whole.tensor_bytes - export.tensor_bytes == 2 * gone
