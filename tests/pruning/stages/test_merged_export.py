"""Merged experts in folders that transformers loads, against averages made in torch by hand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from moe_jax.errors import InputError
from pruning.budget.merged_layer import MergedLayer
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe
from pruning.shrink.merge import Merging
from pruning.stages.export import pruned_source
from pruning.stages.sizes import export_of, form_of
from tests.convert.test_cut_router import cut_by_hand
from tests.pruning.shrink.test_merge import LEADERS, F, merge_in_torch, random_merging
from tests.support import tiny

TOKENS, VALID = tiny.tokens_and_mask()


def even(cut: bool) -> Merging:
    """As many groups in both layers."""
    found = random_merging(cut)
    return Merging(dict.fromkeys((0, 1), found.layers[0]))


@pytest.mark.parametrize(("family", "form", "cut", "merging"), [
    ("qwen2_moe", "padded-bf16", True, even),
    ("qwen2_moe", "padded-bf16", False, random_merging),
    ("mixtral", "padded-bf16", True, even),
    ("deepseek_v3", "padded-bf16", True, even),
    ("deepseek_v3", "ragged-bf16", True, random_merging),
    ("deepseek_v3", "padded-bf16", False, random_merging),
    ("gpt_oss", "padded-bf16", True, even),
])  # fmt: skip
def test_a_folder_is_the_model_whose_experts_were_averaged(tmp_path, family, form, cut, merging):
    dense = tiny.save(tiny.half(tiny.tiny_model(family)), tmp_path / "base")
    base, merged = open_checkpoint(dense, dtype=jnp.bfloat16), merging(cut)
    merged.written({}).save(tmp_path / "plan")
    plan = PruningPlan.load(tmp_path / "plan")  # as it travels
    recipe = CompressionRecipe(model="m", output="o")
    written = form_of(recipe, form, plan)
    export = export_of(base.about, plan, written)
    export.check()
    folder = export.write(pruned_source(base, plan, written), tmp_path / "export")
    experts = json.loads((folder / "config.json").read_text())
    count = next(experts[key] for key in base.about.family.count_keys)
    assert count == (4 if cut and form.startswith("padded") else 8)

    model, _ = tiny.load_export(dense, trust=False)
    merge_in_torch(model, merged)
    for layer in model.model.layers:  # as files hold it
        for parameter in layer.mlp.experts.parameters():
            parameter.data = parameter.data.bfloat16().float()
    if cut:
        leaders = [one.is_leader for one in merged.layers.values()]
        cut_by_hand(model, [np.flatnonzero(~leads).tolist() for leads in leaders])
    wanted = tiny.torch_logits(model, TOKENS, VALID)
    found, said = tiny.load_export(folder, trust=form.startswith("ragged"))
    assert not any(said.values()) and np.abs(wanted[VALID]).max() > 0.5
    theirs = tiny.torch_logits(found, TOKENS, VALID)
    np.testing.assert_allclose(theirs[VALID], wanted[VALID], atol=2e-5, rtol=1e-5)


def test_layers_of_unlike_many_groups_have_no_common_count():
    counts = [one.is_leader.sum() for one in random_merging(True).layers.values()]
    assert counts == [4, 5] and random_merging(True).written({}).cut_router
    whole = random_merging(False).written({"merge": "m-smoe"})
    assert whole.keep.all() and not whole.cut_router and whole.provenance == {"merge": "m-smoe"}


@pytest.mark.parametrize("change", [
    {"leaders": np.array([1, 0, 5, 0, 4, 5, 7, 7])},
    {"leaders": np.array([0, 0, 5, 0, 4, 5, 7, 8])},
    {"share": np.full(8, 0.5)}, {"order": np.zeros((8, F), int)}, {"share": np.ones(7)},
])  # fmt: skip
def test_a_plan_that_merges_into_nothing_is_refused(change):
    layer = random_merging().layers[0]
    given = {name: getattr(layer, name) for name in ("leaders", "share", "order")} | change
    with pytest.raises(InputError, match="do not belong to 8 experts of 16 channels"):
        PruningPlan(np.ones((1, 8, F), bool), (0,), merged=(MergedLayer(**given, cut=False),))
    with pytest.raises(InputError, match="merged=1 layers must be all 2"):
        PruningPlan(np.ones((2, 8, F), bool), (0, 1), merged=(layer,))
    assert (LEADERS[0] == layer.leaders).all()
