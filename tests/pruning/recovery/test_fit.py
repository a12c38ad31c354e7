"""Training end to end: gradients against torch, the loss falls, adapters learn beside a router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import load_model
from moe_jax.spread import Spread
from pruning.recovery import teacher
from pruning.recovery.course import Course, FitOptions, TrainingText, own_part
from pruning.recovery.deltas import DeltaConfig
from pruning.recovery.fit import fit, held_out_losses
from pruning.recovery.forward import student_hidden, student_loss
from pruning.recovery.loss import predicted
from pruning.recovery.teacher import prediction_type, read_predictions, write_predictions
from tests.pruning.recovery.students import (
    COUNTS,
    dense_model,
    first_deltas,
    placed_student,
    pruned_model,
    stirred,
)
from tests.support import tiny

RNG = np.random.default_rng(4)
LINES = RNG.integers(0, 48, (6, 12)).astype(np.int32)[RNG.integers(0, 6, 20)]
VALID = np.ones(LINES.shape, bool)
VALID[3, 7:] = False


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(to train on, held out) with the dense model's predictions, and the student."""
    dense = dense_model()
    file = tmp_path_factory.mktemp("teacher") / "predictions.npy"
    write_predictions(file, dense, LINES, VALID, 8, batch=4)
    kept = read_predictions(file)
    parts = (slice(0, 16), slice(16, 20))
    both = [TrainingText(LINES[p], VALID[p], predicted(VALID[p]), kept[p]) for p in parts]
    return *both, pruned_model(dense), dense


def test_the_file_holds_the_likeliest_tokens_of_the_dense_model(texts):
    text, _, _, dense = texts
    logits = np.asarray(jax.jit(lambda m: m(LINES[:16], VALID[:16]))(dense), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logp, axis=-1, kind="stable")[..., :8]
    real = VALID[:16]
    np.testing.assert_array_equal(text.predictions["token"][real], order[real])
    wanted = np.take_along_axis(logp, order, -1)
    np.testing.assert_allclose(text.predictions["logp"][real], wanted[real], atol=1e-4)
    assert text.predictions.dtype == prediction_type(8)


def test_a_long_text_is_predicted_part_by_part(texts, tmp_path, monkeypatch):
    text, _, _, dense = texts
    monkeypatch.setattr(teacher, "STATES", 1)
    steps = []
    write_predictions(
        tmp_path / "parts.npy", dense, LINES[:10], VALID[:10], 8, batch=4,
        on_layer=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(number, 6) for number in range(1, 7)]
    found = read_predictions(tmp_path / "parts.npy")
    np.testing.assert_array_equal(found["token"], text.predictions["token"][:10])
    np.testing.assert_allclose(found["logp"], text.predictions["logp"][:10], atol=1e-5)


@pytest.mark.slow
def test_gradients_of_experts_and_router_are_those_of_torch(tmp_path):
    theirs = tiny.tiny_model("qwen3_moe")
    ours = load_model(tiny.save(theirs, tmp_path / "model"))
    tokens, valid = tiny.tokens_and_mask()
    top = 5
    drawn = np.random.default_rng(8).normal(size=(*tokens.shape, 96))
    logp = drawn - np.log(np.exp(drawn).sum(-1, keepdims=True))
    token = np.argsort(-logp, -1)[..., :top]
    kept = np.take_along_axis(logp, token, -1)
    wanted, share = predicted(valid), 0.3
    batch = {
        "tokens": tokens, "valid": valid, "wanted": wanted, "logp": kept.astype(np.float32),
        "token": token.astype(np.int32), "count": np.float32(wanted.sum()),
        "share": np.float32(share),
    }  # fmt: skip
    config = DeltaConfig(train="full", router_rank=0)

    def loss(deltas, model, batch):
        return student_loss(model, deltas, batch, config=config, balance=0.0)

    deltas = first_deltas(ours, config)
    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(deltas, ours, batch)

    logits = theirs(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(valid, dtype=torch.long),
    ).logits
    own = torch.log_softmax(logits, -1)
    p, chosen = torch.tensor(np.exp(kept)), torch.tensor(token)
    outcomes = torch.gather(own, -1, chosen)
    rest, own_rest = 1 - p.sum(-1), torch.log(1 - outcomes.exp().sum(-1))
    kl = (p * (p.log() - outcomes)).sum(-1) + rest * (rest.log() - own_rest)
    target = torch.tensor(np.roll(tokens, -1, axis=1), dtype=torch.long)
    nll = -torch.gather(own, -1, target[..., None])[..., 0]
    mask = torch.tensor(wanted)
    total = (1 - share) * kl[mask].mean() + share * nll[mask].mean()
    total.backward()
    np.testing.assert_allclose(metrics["loss"], total.item(), rtol=1e-4)
    for index, layer in enumerate(theirs.model.layers):
        experts, found = layer.mlp.experts, gradient["experts"][str(index)]
        gate, up = experts.gate_up_proj.grad.numpy().reshape(8, 2, 16, 32).swapaxes(0, 1)
        down = experts.down_proj.grad.numpy().swapaxes(1, 2)
        router = layer.mlp.gate.weight.grad.numpy()
        pairs = {"w_gate": gate, "w_up": up, "w_down": down}
        for name, one in pairs.items():
            limit = 1e-3 * np.abs(one).max()
            np.testing.assert_allclose(found[name][:128], one.reshape(128, 32), atol=limit)
        limit = 1e-3 * np.abs(router).max()
        np.testing.assert_allclose(gradient["router"][str(index)], router, atol=limit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (DeltaConfig(train="router", router_rank=0), 0.02),
        (DeltaConfig(rank=4, alpha=16.0), 0.01),
        (DeltaConfig(train="full", router_rank=0, group_size=32), 0.003),
    ],
    ids=["router", "dora", "full-int4"],
)
def test_training_lowers_the_divergence_from_the_dense_model(texts, config, rate):
    text, held, student, _ = texts
    options = FitOptions(learning_rate=rate, epochs=8, batch=4, measurements=4, remat=False)
    seen = []
    course = Course(text, held, config, options)
    found = fit(student, course, on_held_out=lambda step, one: seen.append((step, one)))
    assert [step for step, _ in seen] == [0, 8, 16, 24, 32]
    best = min(one["loss"] for _, one in seen)
    assert best < 0.9 * seen[0][1]["loss"]
    again = held_out_losses(placed_student(student, config).model, found, course)
    np.testing.assert_allclose(again["kl"], best, rtol=1e-5)
    start = first_deltas(student, config)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, start)
    assert all(size > 0 for size in jax.tree.leaves(moved["router"]))
    if config.train == "full":  # nobody's rows of the pool stay nobody's
        for index, layer in found["experts"].items():
            for delta in layer.values():
                np.testing.assert_array_equal(delta[sum(COUNTS[int(index)]) :], 0)
    if config.train == "dora":
        for layer in moved["experts"].values():
            assert all(delta["magnitude"] > 0 for delta in layer.values())


def test_padding_is_no_part_of_the_loss_or_its_gradient(texts):
    text, _, student, _ = texts
    config = DeltaConfig(rank=2)
    deltas = stirred(first_deltas(student, config))
    rows = text.rows(slice(2, 4)) | {"count": np.float32(17), "share": np.float32(0.5)}
    other = dict(rows, tokens=np.where(rows["valid"], rows["tokens"], 7))
    other["token"] = np.where(rows["wanted"][..., None], rows["token"], 3)

    def loss(deltas, batch):
        return student_loss(student, deltas, batch, config=config, balance=0.1, remat=False)[0]

    slope = jax.jit(jax.value_and_grad(loss))
    for one, two in zip(
        *map(jax.tree.leaves, (slope(deltas, rows), slope(deltas, other))), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_computing_layers_twice_changes_no_hidden_state(texts):
    text, _, student, _ = texts
    config = DeltaConfig(rank=2)
    deltas = stirred(first_deltas(student, config))
    found = [
        jax.jit(
            lambda deltas, remat=remat: student_hidden(
                student, deltas, jnp.asarray(text.tokens[:2]), jnp.asarray(text.valid[:2]),
                config=config, remat=remat,
            )[0]
        )(deltas)
        for remat in (False, True)
    ]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_every_window_is_seen_once_in_an_epoch_in_an_order_of_its_own():
    options = FitOptions(learning_rate=1.0, epochs=2, batch=2, accumulate=2, seed=3)
    seen = np.stack([options.chosen(step, 8) for step in range(4)])  # [steps, accumulate, batch]
    assert options.schedule(8).steps == 4
    first, second = seen[:2], seen[2:]
    assert sorted(first.ravel()) == sorted(second.ravel()) == list(range(8))
    assert first.tolist() != second.tolist()
    assert options.schedule(9).steps == 5


@pytest.mark.parametrize("windows", [1, 3, 9, 16])
def test_processes_need_their_parts_of_the_text_alone(windows):
    options = FitOptions(learning_rate=1.0, batch=4, seed=1)
    seen = np.concatenate([options.chosen(step, windows) for step in range(40)])
    assert set(seen.ravel()) == set(range(windows))
    for processes in (1, 2, 4):
        covered = set()
        for process in range(processes):
            spread = Spread(None, process, processes)
            own, places = own_part(spread, 4, windows), spread.in_a_row(4)
            assert set(seen[:, places.start : places.stop].ravel()) == set(own)
            covered |= set(own)
        assert covered == set(range(windows))


def test_routers_of_small_weights_have_a_lower_rate_unless_one_is_asked_for():
    text = TrainingText(*(np.zeros((4, 8), kind) for kind in (np.int32, bool, bool)))
    routers = {"0": jnp.full((2, 3), 0.025), "2": jnp.full((2, 3), -0.1)}
    asked = Course(text, text, DeltaConfig(), FitOptions(learning_rate=1e-3, router_rate=0.5))
    usual = dataclasses.replace(asked, options=FitOptions(learning_rate=1e-3))
    assert asked.schedule_of(routers).group_rates == {"router": 0.5, "attention": 0.5}
    found = usual.schedule_of(routers).group_rates
    assert found["attention"] == 0.5 and found["router"] == {"0": pytest.approx(0.5), "2": 1.0}
    assert usual.schedule_of(routers["0"]).group_rates["router"] == pytest.approx(0.5)


def test_the_first_step_moves_each_router_by_its_own_rate(texts):
    text, held, student, _ = texts
    small, usual = student.layers
    router = small.mlp.router * (0.01 / float(jnp.sqrt(jnp.square(small.mlp.router).mean())))
    small = dataclasses.replace(small, mlp=dataclasses.replace(small.mlp, router=router))
    student = dataclasses.replace(student, layers=(small, usual))
    nothing = TrainingText(*(getattr(held, n)[:0] for n in ("tokens", "valid", "wanted")))
    config = DeltaConfig(train="router", router_rank=0)
    for rate, shares in ((None, (0.2, 1.0)), (0.5, (0.5, 0.5))):
        options = FitOptions(learning_rate=1e-3, router_rate=rate, batch=16, remat=False)
        deltas = fit(student, Course(text, nothing, config, options))["router"]
        # Adam's first step is the rate, whatever the gradient.
        moved = [float(jnp.abs(deltas[index]).max()) for index in ("0", "1")]
        np.testing.assert_allclose(moved, 1e-3 * np.array(shares), rtol=1e-3)


def test_the_published_schedule_warms_up_for_a_tenth_and_ends_at_zero():
    schedule = FitOptions(learning_rate=1e-4, batch=1).schedule(100)
    rates = np.array([schedule.schedule()(step) for step in range(101)])
    np.testing.assert_allclose(rates[[0, 5, 10, 100]], [0, 5e-5, 1e-4, 0], atol=1e-9)
    np.testing.assert_allclose(rates[55], 5e-5, rtol=1e-4)
    assert (schedule.weight_decay, schedule.b2, schedule.clip_norm) == (0.0, 0.999, 0.5)
