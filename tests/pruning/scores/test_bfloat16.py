"""bfloat16 activations measure what float32 ones do, up to their rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from pruning.scores.ablation import Ablation, ablate
from pruning.scores.collect import collect_statistics
from tests.support import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose experts have biases."""
    folder = tmp_path_factory.mktemp("gpt_oss") / "model"
    return open_checkpoint(tiny.save(tiny.tiny_model("gpt_oss"), folder))


@pytest.mark.slow
def test_statistics_of_experts_with_biases(source):
    tokens, valid = tiny.tokens_and_mask(2, 12)
    how = {"gradients": True, "expert_details": True, "batch": 1}
    exact, rounded = (
        collect_statistics(source, tokens, valid, dtype=dtype, **how).arrays()
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.keys() == exact.keys()
    far = {}
    for name, wanted in exact.items():
        found = np.asarray(rounded[name], np.float64)
        far[name] = np.abs(found - wanted).sum() / np.abs(wanted).sum()
    # Eight bits of every activation, squared and multiplied; 1 of 38 tokens goes to another expert.
    assert max(far.values()) < 0.1, far


@pytest.mark.slow
def test_ablations_of_experts_with_biases(source):
    tokens, valid = tiny.tokens_and_mask(2, 12)
    chosen = [Ablation(0, 1), Ablation(1, 2, reroute=True), Ablation(1, 0, 3)]
    exact, rounded = (
        ablate(source, tokens, valid, chosen, batch=1, dtype=dtype)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(rounded[1], exact[1], rtol=2e-2)
