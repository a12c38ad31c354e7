"""Statistics on several devices beside those of one, and beside finite differences."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.structure import named_leaves
from pruning.budget.plan import PruningPlan
from pruning.scores.collect import collect_statistics
from pruning.scores.layer import GRADIENT_SCORES
from pruning.scores.statistics import load_statistics
from tests.pruning.scores.test_layer import batch, model, whole_loss  # noqa: F401
from tests.support.command import given, run

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def on_four(models, texts, batch, tmp_path_factory):  # noqa: F811
    """What four devices of one process found of the batch, and where two of them scored."""
    folder = tmp_path_factory.mktemp("devices")
    tokens, valid = batch
    np.savez(folder / "text.npz", tokens=tokens, valid=valid)
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    score = ("--quiet", "score", models / "single", *given(texts, folder / "out"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.devices", folder, *map(str, score), "--mesh=data=2"],
        env=os.environ | {"XLA_FLAGS": flags}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(folder / "statistics.npz") as found:
        return dict(found), folder


@pytest.mark.slow
def test_sums_on_four_devices_are_those_of_one(model, batch, on_four):  # noqa: F811
    # Two batches, each on two devices, which have half of the experts each.
    wanted = collect_statistics(model, *batch, gradients=True, batch=3).arrays()
    found, _ = on_four
    assert found.keys() == wanted.keys() >= {*GRADIENT_SCORES}
    for name, value in wanted.items():
        assert np.abs(value).max() > 0, name
        # Relative to the largest: some of the signed ones are differences of large numbers.
        error = np.abs(found[name] - value).max() / np.abs(value).max()
        assert error <= 1e-6, (name, error)


@pytest.mark.slow
def test_obs_on_two_devices_is_that_of_one(model, batch, on_four):  # noqa: F811
    wanted = collect_statistics(model, *batch, obs=True, batch=1).elimination
    assert wanted is not None and wanted.max() > 0
    with np.load(on_four[1] / "obs.npz") as found:
        np.testing.assert_allclose(found["elimination"], wanted, rtol=1e-5)


def test_of_a_layer_only_the_experts_are_shared(model, on_four):  # noqa: F811
    parts = json.loads((on_four[1] / "parts.json").read_text())
    whole = {name: leaf.shape for name, leaf in named_leaves(model.layers[0]).items()}
    halves = {"mlp.experts.w_gate", "mlp.experts.w_up", "mlp.experts.w_down", "mlp.experts.count"}
    assert parts.keys() == whole.keys() > halves
    for name, shape in whole.items():
        assert parts[name] == [shape[0] // (2 if name in halves else 1), *shape[1:]], name


def test_gradients_on_four_devices_are_finite_differences(model, batch, on_four):  # noqa: F811
    found, _ = on_four
    loss = jax.jit(functools.partial(whole_loss, model, *map(jnp.asarray, batch)))
    for flat in np.argsort(-np.abs(found["taylor"]), axis=None)[:3]:
        place = np.unravel_index(flat, found["taylor"].shape)
        step = jnp.zeros(found["taylor"].shape).at[place].set(1e-2)
        slope = float(loss(1 + step) - loss(1 - step)) / 2e-2
        # float32 losses of about 200 nats limit the difference quotient
        np.testing.assert_allclose(found["taylor"][place], slope, rtol=2e-2)


def test_score_on_two_devices_keeps_what_one_keeps(scored, on_four):
    out = on_four[1] / "out"
    ours, theirs = (load_statistics(f / "statistics.safetensors") for f in (out, scored))
    assert ours[1] == theirs[1]
    for name, value in theirs[0].arrays().items():
        np.testing.assert_allclose(ours[0].arrays()[name], value, rtol=1e-6, err_msg=name)
    assert run("--quiet", "plan", out, "--prune-rate", 0.5) == 0
    np.testing.assert_array_equal(PruningPlan.load(out).keep, PruningPlan.load(scored).keep)
