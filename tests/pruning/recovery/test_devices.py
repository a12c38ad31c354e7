"""Training on several devices beside that on one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pruning.recovery.students import COUNTS
from tests.support.trained import CONFIGS, MESHES, trained

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def on_four(tmp_path_factory) -> Path:
    """What was trained on four devices of one process."""
    folder = tmp_path_factory.mktemp("devices")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.trained", folder],
        env=os.environ | {"XLA_FLAGS": flags}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def compare(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(found["held_out"], wanted["held_out"], rtol=1e-4)
    for name, value in wanted.items():
        own = slice(None)
        if name.endswith(".channel"):  # rows behind are nobody's
            own = slice(sum(COUNTS[int(name.split(".")[1])]))
        assert np.abs(value[own]).max() > 0, name
        # Adam divides by the size of a gradient, so where that is rounding the change is noise.
        off = np.abs(found[name] - value)[own] > 1e-3 * np.abs(value).max()
        assert off.mean() < 0.01, (name, off.mean())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_training_on_four_devices_is_that_on_one(on_four, kind, mesh):
    with np.load(on_four / f"{kind}-{mesh}.npz") as found:
        compare(dict(found), trained(kind))


def test_layers_are_trained_on_four_devices_as_on_one(on_four):
    with np.load(on_four / "layers.npz") as found:
        compare(dict(found), trained("full", layers=True))
