"""Training layer by layer against the dense residual stream."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.stream import forward_hidden, mapped
from pruning.recovery.course import Course, FitOptions, TrainingText
from pruning.recovery.deltas import DeltaConfig, merged
from pruning.recovery.forward import layer_deltas
from pruning.recovery.layerwise import fit_layers
from tests.pruning.recovery.students import dense_model, pruned_model

TOKENS = np.random.default_rng(6).integers(0, 48, (12, 10)).astype(np.int32)
VALID = np.ones(TOKENS.shape, bool)
CONFIG = DeltaConfig(rank=4, alpha=8.0)
OPTIONS = FitOptions(learning_rate=0.01, epochs=6, batch=2, measurements=3)


def text(rows: slice) -> TrainingText:
    return TrainingText(TOKENS[rows], VALID[rows], VALID[rows])


COURSE = Course(text(slice(0, 10)), text(slice(10, 12)), CONFIG, OPTIONS)


@pytest.fixture(scope="module")
def models():
    dense = dense_model()
    return dense, pruned_model(dense)


def error(dense, student) -> float:
    """Relative distance of the last residual streams on the training text."""
    wanted, found = (forward_hidden(one, TOKENS[:10], VALID[:10]) for one in (dense, student))
    return float(np.mean(np.square(found - wanted).sum(-1) / np.square(wanted).sum(-1)))


@pytest.mark.slow
def test_each_layer_comes_nearer_to_the_dense_one_and_so_does_the_model(models):
    dense, student = models
    told = {}
    deltas = fit_layers(dense, student, COURSE, on_layer=told.__setitem__)
    assert list(told) == [0, 1]
    recovered = mapped(student, lambda i, one: merged(one, layer_deltas(deltas, i), CONFIG))
    assert error(dense, recovered) < 0.9 * error(dense, student)


def test_the_first_step_moves_a_router_by_the_rate_of_its_size(models):
    dense, student = models
    router = student.layers[0].mlp.router
    router = router * (0.01 / float(np.sqrt(np.square(router).mean())))
    mlp = dataclasses.replace(student.layers[0].mlp, router=router)
    small = dataclasses.replace(student.layers[0], mlp=mlp)
    student = dataclasses.replace(student, layers=(small, student.layers[1]))
    options = FitOptions(learning_rate=1e-3, batch=10)
    config = DeltaConfig(train="router", router_rank=0)
    course = Course(text(slice(0, 10)), text(slice(0, 0)), config, options)
    found = fit_layers(dense, student, course)["router"]
    moved = [float(np.abs(found[index]).max()) for index in ("0", "1")]
    # Adam's first step is the rate, whatever the gradient.
    np.testing.assert_allclose(moved, [2e-4, 1e-3], rtol=1e-3)


def test_a_student_that_is_the_dense_model_has_nothing_to_learn(models):
    dense, _ = models
    told = {}
    deltas = fit_layers(dense, dense, COURSE, on_layer=told.__setitem__)
    assert all(one["before"] < 1e-10 for one in told.values())
    same = mapped(dense, lambda i, one: merged(one, layer_deltas(deltas, i), CONFIG))
    assert error(dense, same) < 1e-8


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_where_an_undisturbed_one_does(models, tmp_path):
    told, killed = {}, {}
    straight = fit_layers(*models, COURSE, on_layer=told.__setitem__)

    def interrupted(step, total):
        if step == total // 2 + 13:
            raise KeyboardInterrupt

    course = dataclasses.replace(COURSE, checkpoints=tmp_path / "run", on_step=interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_layers(*models, course)
    steps = []
    course = dataclasses.replace(course, on_step=lambda step, total: steps.append(step))
    found = fit_layers(*models, course, on_layer=killed.__setitem__)
    assert steps[0] == 40 and len(steps) == 20  # of thirty a layer; checkpoints after each ten
    jax.tree.map(np.testing.assert_array_equal, found, straight)
    assert killed == told and list(told) == [0, 1]
