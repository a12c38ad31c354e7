"""A model that was changed in JAX goes back to a folder that transformers loads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_model, open_checkpoint, save_pretrained
from moe_jax.transformer import Transformer
from pruning.shrink.prune import PrunedSource
from tests.convert.families.test_families import TOKENS, plan_for
from tests.support import tiny


def changed(model: Transformer) -> Transformer:
    """What a step of training leaves: every weight moved, the first layer's experts most."""
    moved = jax.tree.map(
        lambda leaf: leaf * 1.25 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, model
    )
    first = moved.layers[0]
    experts = dataclasses.replace(first.mlp.experts, w_gate=-first.mlp.experts.w_gate)
    mlp = dataclasses.replace(first.mlp, experts=experts)
    layers = (dataclasses.replace(first, mlp=mlp), *moved.layers[1:])
    return dataclasses.replace(moved, layers=layers)


def resident(source, like: Transformer) -> Transformer:
    """The layers of a source in memory, as one trains them."""
    return dataclasses.replace(
        like, layers=tuple(source.layer(index) for index in range(len(source)))
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", ["padded-bf16", "ragged-bf16"])
def test_a_changed_model_is_written_and_loaded_with_nothing_said_twice(family, form, tmp_path):
    base, plan, _ = plan_for(family, tmp_path / "base")
    model = load_model(tmp_path / "base", dtype=jnp.bfloat16)
    if form == "ragged-bf16":
        model = resident(PrunedSource(base, plan), model)
    model = changed(model)
    folder = save_pretrained(model, base, tmp_path / "out", form)

    ours = np.asarray(model(jnp.asarray(TOKENS), dtype=jnp.float32))
    before = np.asarray(load_model(tmp_path / "base")(jnp.asarray(TOKENS), dtype=jnp.float32))
    assert np.abs(ours - before).max() > 0.1
    theirs, info = tiny.load_export(folder, trust=form == "ragged-bf16")
    assert not any(info.values()), info
    found = tiny.torch_logits(theirs, TOKENS, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(found, ours, atol=2e-4 * max(1.0, np.abs(ours).max()))

    again = open_checkpoint(folder)
    kept = plan.counts.tolist() if form == "ragged-bf16" else [[96] * 8] * len(plan.counts)
    assert [list(row) for row in again.about.widths if row] == kept


def test_constants_of_emptied_experts_are_kept_or_refused(tmp_path):
    base, plan, _ = plan_for("qwen3_moe", tmp_path / "base")
    gone = plan.counts == 0
    assert gone.any()
    constants = tuple(np.ones((int(row.sum()), base.config.d_model), np.float32) for row in gone)
    source = PrunedSource(base, dataclasses.replace(plan, constants=constants))
    folder = save_pretrained(source, base, tmp_path / "out")
    ours, again = source.layer(0).mlp.experts.b_down, open_checkpoint(folder).layer(0)
    np.testing.assert_array_equal(np.asarray(again.mlp.experts.b_down), np.asarray(ours))
    with pytest.raises(ValueError, match="no place for constants"):
        save_pretrained(source, base, tmp_path / "padded", "padded-bf16")
