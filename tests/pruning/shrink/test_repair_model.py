"""Repair of small models behind their pruned layers, through the functions that a run calls."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Activation, AttentionConfig, ModelConfig, MoEConfig
from moe_jax.experts.moe import MoE
from moe_jax.spread import ALONE
from moe_jax.stream import forward_hidden, in_batches, layer_attend
from moe_jax.transformer import init
from pruning.budget.plan import PruningPlan
from pruning.demo import DEMO
from pruning.scores.routed import ROWS, routed
from pruning.shrink import repair_model as repair_module
from pruning.shrink.prune import PrunedSource, pruned_layer
from pruning.shrink.repair import STRENGTHS
from pruning.shrink.repair_choice import chosen
from pruning.shrink.repair_layer import PASSES, LayerRepair, Ridges, reached
from pruning.shrink.repair_model import repair_model, repaired_in, with_repair
from tests.bench.bench_repair import measured
from tests.support.threads import together

EXPERTS, CHANNELS, LAYERS = 4, 8, (0, 2)
PLAIN = ModelConfig(
    vocab_size=64, d_model=16, num_layers=3, max_position=32, norm_eps=1e-6, tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(
        num_experts=EXPERTS, experts_per_token=2, renormalize=True, d_expert=CHANNELS, d_shared=8
    ),
    d_dense=20, dense_layers=(1,),
)  # fmt: skip
BIASED = dataclasses.replace(
    PLAIN,
    moe=dataclasses.replace(
        PLAIN.moe, expert_bias=True, activation=Activation(slope=1.7, limit=7.0, shift=1.0)
    ),
)
CONFIGS = {"plain": PLAIN, "biased": BIASED}


def model_of(config: ModelConfig):
    """Random weights, large enough that experts matter, and random biases."""
    keys = iter(jax.random.split(jax.random.key(1), 100))

    def change(leaf):
        if leaf.ndim == 2:
            bias = 0.3 * jax.random.normal(next(keys), leaf.shape)
            leaf = jnp.where(leaf == 0, bias, leaf * 10)
        return leaf

    return jax.tree.map(change, init(config, jax.random.key(0)))


def with_doubles(model):
    """The second half of every expert's channels are multiples of the first."""
    layers = []
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            experts, changes = layer.mlp.experts, {}
            for name, scale in (("w_gate", 1.0), ("w_up", 1.7)):
                rows = np.array(getattr(experts, name)).reshape(EXPERTS, CHANNELS, -1)
                rows[:, CHANNELS // 2 :] = scale * rows[:, : CHANNELS // 2]
                changes[name] = jnp.asarray(rows.reshape(EXPERTS * CHANNELS, -1))
            experts = dataclasses.replace(experts, **changes)
            layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))
        layers.append(layer)
    return dataclasses.replace(model, layers=tuple(layers))


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (21, 30)).astype(np.int32)
    return tokens, np.arange(30)[None] < rng.integers(20, 31, (21, 1))


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    """Half of the channels, one expert whole and one empty."""
    keep = np.random.default_rng(5).random((2, EXPERTS, CHANNELS)) < 0.5
    keep[0, 1], keep[1, 2] = True, False
    return PruningPlan(keep, LAYERS)


def repaired(model, plan, text, folder, mode="layer", provenance="tiny", on_layer=None):
    tokens, valid = text
    found = repair_model(
        model, plan, tokens, valid, folder, mode=mode, provenance={"model": provenance}, batch=4,
        on_layer=on_layer,
    )  # fmt: skip
    return with_repair(PrunedSource(model, plan), plan, folder), found


def distance(a, b, text) -> float:
    tokens, valid = text
    first, second = (forward_hidden(source, tokens, valid, batch=4) for source in (a, b))
    return float(np.square(first - second)[valid].sum())


def experts_of(layer):
    assert isinstance(layer.mlp, MoE)
    return layer.mlp.experts


def test_processes_repair_as_one_to_rounding(text, plan, tmp_path, monkeypatch):
    """Five batches of windows to learn from, of which some have more, and one of those held out."""
    model = model_of(BIASED)

    def work(folder, spread):
        options = {"mode": "layer", "provenance": {}, "batch": 4}
        return repair_model(model, plan, *text, folder, spread=spread, **options)

    expected = work(tmp_path / "one", ALONE)
    for found in together(monkeypatch, 3, lambda spread: work(tmp_path / "all", spread)):
        for one, other in zip(expected, found, strict=True):
            assert dataclasses.replace(other, errors=one.errors) == one
            assert other.errors == pytest.approx(one.errors, rel=1e-6)
    assert [one.choice for one in expected] == ["layer", "none", "layer"]
    for index in range(3):
        ours, theirs = (repaired_in(tmp_path / name).arrays(index) for name in ("all", "one"))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            limit = 2e-6 * np.abs(value).max()
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=limit, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["expert", "layer"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_repaired_model_is_nearer_to_the_dense_one_on_text_that_it_did_not_see(
    name, mode, text, plan, tmp_path
):
    model = model_of(CONFIGS[name])
    source, found = repaired(model, plan, text, tmp_path, mode)
    other = (
        np.random.default_rng(8).integers(0, 64, (8, 30)).astype(np.int32),
        np.ones((8, 30), bool),
    )
    before = distance(model, PrunedSource(model, plan), other)
    assert distance(model, source, other) < 0.98 * before
    assert [one.index for one in found] == [0, 1, 2]
    assert found[1].experts == 0 and found[1].choice == "none"  # a dense layer
    for one in (found[0], found[2]):
        assert one.errors["expert"] < one.errors["none"]
        assert one.choice == (mode if mode == "expert" else min(one.errors, key=one.errors.get))
        assert 0 < one.changed <= one.experts
    # An empty expert has nothing left but its bias.
    assert found[2].experts == EXPERTS - (name == "plain")
    assert (repaired_in(tmp_path).read_summary() or {})["layers"] == [
        dataclasses.asdict(one) for one in found
    ]


def test_only_down_projections_of_what_is_kept_change(text, plan, tmp_path):
    model = model_of(PLAIN)
    source, _ = repaired(model, plan, text, tmp_path)
    for index in range(3):
        before, after = PrunedSource(model, plan).layer(index), source.layer(index)
        if index in LAYERS:
            down = np.asarray(experts_of(before).w_down)
            moved = (np.asarray(experts_of(after).w_down) != down).any(axis=1)
            kept = int(plan.keep[LAYERS.index(index)].sum())
            assert moved.any() and not moved[kept:].any()
            experts = dataclasses.replace(experts_of(after), w_down=experts_of(before).w_down)
            after = dataclasses.replace(after, mlp=dataclasses.replace(after.mlp, experts=experts))
        jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("mode", ["expert", "layer"])
def test_where_nothing_is_removed_nothing_changes(mode, text, plan, tmp_path):
    model, keep = model_of(PLAIN), plan.keep.copy()
    keep[0] = True
    later = PruningPlan(keep, LAYERS)
    whole = PruningPlan(np.ones_like(keep), LAYERS)
    for number, one in enumerate((whole, later)):
        source, found = repaired(model, one, text, tmp_path / str(number), mode)
        for index in range(2 if one is later else 3):
            assert (found[index].choice, found[index].errors) == ("none", {})
            jax.tree.map(
                np.testing.assert_array_equal, PrunedSource(model, one).layer(index),
                source.layer(index),
            )  # fmt: skip


@pytest.mark.parametrize("mode", ["expert", "layer"])
def test_channels_that_are_multiples_of_kept_ones_are_restored_exactly(mode, text, tmp_path):
    model = with_doubles(model_of(PLAIN))
    keep = np.broadcast_to(np.arange(CHANNELS) < CHANNELS // 2, (2, EXPERTS, CHANNELS)).copy()
    plan = PruningPlan(keep, LAYERS)
    source, found = repaired(model, plan, text, tmp_path, mode)
    wanted, got, pruned = (
        forward_hidden(one, text[0], text[1], batch=4)[text[1]]
        for one in (model, source, PrunedSource(model, plan))
    )
    size = np.abs(wanted).max()
    assert np.abs(pruned - wanted).max() > 0.1 * size
    np.testing.assert_allclose(got, wanted, atol=1e-5 * size)
    for one in (found[0], found[2]):
        assert min(one.errors.values()) < 1e-9 * one.errors["none"]


def first_layer(model, plan, text) -> tuple[LayerRepair, list[tuple[np.ndarray, ...]], int]:
    """The first layer's repair; in plain numpy and float64 of each expert its tokens, their hidden
    rows of all channels and of the bias times routing weights, and which are of the first half; and
    how many tokens there are."""
    batches = in_batches(model, text[0], text[1], 4)
    dense, pruned = model.layer(0), pruned_layer(0, model.layer(0), plan)
    middle = batches.each(
        batches.embedded(model, jnp.float32), lambda x, place, rows: layer_attend(dense, x, place)
    )
    first = np.arange(len(batches.tokens)) % 2 == 0
    seen = routed(dense, middle, batches.places, first)
    experts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dense.mlp.experts)
    x = np.concatenate([np.asarray(part, np.float64).reshape(-1, 16) for part in middle])
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * np.asarray(dense.mlp_norm)
    scores = normed @ np.asarray(dense.mlp.router, np.float64).T
    chosen = np.argsort(-scores, axis=1)[:, :2]
    share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    valid, found = batches.valid.reshape(-1), []
    for expert in range(EXPERTS):
        tokens, rows = [], []
        own = slice(expert * CHANNELS, (expert + 1) * CHANNELS)
        for t in range(len(x)):
            if not valid[t] or expert not in chosen[t]:
                continue
            weight = share[t, expert] / share[t, chosen[t]].sum()
            gate = np.minimum(experts.w_gate[own] @ normed[t] + experts.b_gate[own], 7.0)
            up = np.clip(experts.w_up[own] @ normed[t] + experts.b_up[own], -7.0, 7.0)
            hidden = weight * gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            rows.append(np.append(hidden, weight))
            tokens.append(t)
        tokens = np.array(tokens)
        found.append((tokens, np.array(rows), first[tokens // text[0].shape[1]]))
    repair = LayerRepair(dense, pruned, plan.keep[0], seen, reached(seen), Ridges(0))
    return repair, found, len(x)


def halved_ridge(h: np.ndarray, y: np.ndarray, half: np.ndarray) -> np.ndarray | None:
    """What an expert with hidden rows `h` moves by, the bias last, to make up for `y`."""

    def fit(mask, strength):
        mean = (h[mask, :-1] ** 2).sum(axis=0).mean()
        system = h[mask].T @ h[mask] + strength * mean * np.eye(h.shape[1])
        return np.linalg.solve(system, h[mask].T @ y[mask])

    def error(strength):
        parts = [((y[b] - h[b] @ fit(a, strength)) ** 2).sum() / (y[b] ** 2).sum()
                 for a, b in ((half, ~half), (~half, half))]  # fmt: skip
        return sum(parts)

    best = min(STRENGTHS, key=error)
    return fit(half | True, best) if error(best) < 2 else None


def test_each_expert_is_fitted_to_what_a_loop_over_its_tokens_says_it_lacks(text, plan):
    model, keep = model_of(BIASED), plan.keep[0]
    layer, rows, _ = first_layer(model, plan, text)
    changes = layer.alone()
    assert 1 not in changes  # it is whole
    down = np.asarray(experts_of(model.layer(0)).w_down, np.float64).reshape(EXPERTS, CHANNELS, -1)
    expert = next(e for e in range(EXPERTS) if e in changes)
    _, hidden, half = rows[expert]
    lacks = hidden[:, :-1][:, ~keep[expert]] @ down[expert][~keep[expert]]
    wanted = halved_ridge(hidden[:, [*np.flatnonzero(keep[expert]), -1]], lacks, half)
    assert wanted is not None
    size = np.abs(changes[expert]).max()
    np.testing.assert_allclose(changes[expert], wanted, rtol=2e-3, atol=1e-3 * size)


def test_a_layer_is_fitted_one_expert_after_the_other_to_what_the_others_leave(plan):
    """Of so long a text that a half of an expert's tokens is more than what goes at a time."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 64, (100, 30)).astype(np.int32)
    model, keep = model_of(BIASED), plan.keep[0]
    layer, rows, count = first_layer(model, plan, (tokens, np.ones(tokens.shape, bool)))
    assert max(min(half.sum(), (~half).sum()) for _, _, half in rows) > ROWS
    down = np.asarray(experts_of(model.layer(0)).w_down, np.float64).reshape(EXPERTS, CHANNELS, -1)
    kept = [np.append(np.flatnonzero(one), CHANNELS) for one in keep]
    wanted = {expert: change.copy() for expert, change in layer.alone().items()}
    lacks = np.zeros((count, 16))
    for expert, (own, hidden, _) in enumerate(rows):
        lacks[own] += hidden[:, :-1][:, ~keep[expert]] @ down[expert][~keep[expert]]
        lacks[own] -= hidden[:, kept[expert]] @ wanted.get(
            expert, np.zeros((len(kept[expert]), 16))
        )
    found, residual = dict(wanted), jnp.asarray(lacks, jnp.float32)
    for _ in range(PASSES):
        residual = layer.together(residual, found)
    for _ in range(3):
        for expert, (own, hidden, half) in enumerate(rows):
            h = hidden[:, kept[expert]]
            lacks[own] += h @ wanted.pop(expert, np.zeros((h.shape[1], 16)))
            change = halved_ridge(h, lacks[own], half)
            if change is not None:
                wanted[expert] = change
                lacks[own] -= h @ change
    assert found.keys() == wanted.keys() and len(wanted) > 2
    for expert, change in wanted.items():
        size = np.abs(change).max()
        np.testing.assert_allclose(found[expert], change, rtol=2e-3, atol=2e-3 * size)


def test_a_killed_repair_goes_on_and_ends_like_one_that_was_not(text, plan, tmp_path):
    model, seen = model_of(PLAIN), []

    class Killed(Exception):
        pass

    def kill(index):
        seen.append(index)
        if index == 1:
            raise Killed

    with pytest.raises(Killed):
        repaired(model, plan, text, tmp_path / "killed", on_layer=kill)
    assert (
        repaired_in(tmp_path / "killed").read_summary() is None
        and (tmp_path / "killed" / "states").exists()
    )
    repaired(model, plan, text, tmp_path / "killed", on_layer=seen.append)
    assert seen == [0, 1, 2]
    repaired(model, plan, text, tmp_path / "calm")
    names = sorted(path.name for path in (tmp_path / "calm").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert "states" not in names and "repair.json" in names
    for name in names:
        calm, killed = ((tmp_path / one / name).read_bytes() for one in ("calm", "killed"))
        assert calm == killed, name


def test_what_was_repaired_for_something_else_is_made_anew(text, plan, tmp_path):
    model = model_of(PLAIN)
    repaired(model, plan, text, tmp_path)
    stored = json.loads((tmp_path / "repair.json").read_text())
    other = PruningPlan(np.roll(plan.keep, 1, axis=2), LAYERS)
    source, _ = repaired(model, other, text, tmp_path, provenance="another")
    assert json.loads((tmp_path / "repair.json").read_text())["layers"] != stored["layers"]
    found, pruned = (experts_of(one.layer(0)) for one in (source, PrunedSource(model, other)))
    np.testing.assert_array_equal(found.w_gate, pruned.w_gate)
    assert found.w_down.shape == pruned.w_down.shape


@pytest.mark.parametrize("mode", ["expert", "layer"])
def test_with_too_little_text_nothing_gets_worse_and_starved_experts_are_counted(
    mode, plan, tmp_path
):
    model = model_of(PLAIN)
    rng = np.random.default_rng(4)
    little = rng.integers(0, 64, (3, 4)).astype(np.int32), np.ones((3, 4), bool)
    source, found = repaired(model, plan, little, tmp_path, mode)
    assert found[0].starved > 0
    other = rng.integers(0, 64, (8, 30)).astype(np.int32), np.ones((8, 30), bool)
    assert distance(model, source, other) <= 1.1 * distance(model, PrunedSource(model, plan), other)


def test_a_repair_is_judged_by_its_error_at_every_held_out_token(text, plan, tmp_path, monkeypatch):
    judged = []

    def watched(errors):
        judged.append(errors)
        return chosen(errors)

    monkeypatch.setattr(repair_module, "chosen", watched)
    model = model_of(PLAIN)
    repaired(model, plan, text, tmp_path)
    _, held = repair_module.held_out(len(text[0]))
    tokens, valid = text[0][held], text[1][held]
    (place,) = in_batches(model, tokens, valid, len(tokens)).places
    x = model.embedding(tokens, jnp.float32)
    dense, pruned = (np.asarray(one.layer(0)(x, place), np.float64)
                     for one in (model, PrunedSource(model, plan)))  # fmt: skip
    wanted = [((dense[b, t] - pruned[b, t]) ** 2).sum() for b, t in np.argwhere(valid)]
    np.testing.assert_allclose(judged[0]["none"], wanted, rtol=1e-4, atol=1e-6 * max(wanted))
    assert {len(error) for error in judged[0].values()} == {len(wanted)}


def test_a_repair_is_taken_only_if_it_errs_less_on_held_out_text_by_more_than_chance():
    none = np.full(100, 3.0)
    luck = np.where(np.arange(100) < 60, 1.0, -1.0)  # better at 60 of 100 tokens
    errors = {"none": none, "expert": none - luck}
    assert chosen(errors) == "expert"
    assert chosen({name: error[10:] for name, error in errors.items()}) == "expert"  # 50 of 90
    assert chosen({name: error[15:] for name, error in errors.items()}) == "none"  # 45 of 85
    assert chosen({"none": none, "expert": none}) == "none"
    assert chosen({**errors, "layer": none - 0.1}) == "expert"
    assert chosen({**errors, "layer": none - 0.3}) == "layer"


@pytest.mark.slow
def test_on_the_shipped_model_a_thousand_tokens_of_text_suffice_not_to_lose():
    """Larger texts by `tests/bench/bench_repair.py`."""
    text = min((DEMO / "text").glob("evaluation-*"))
    rows = measured(
        "demo", 1024, [0.5], ["layer"], evaluated=1024, evaluation=(str(text),), batch=4
    )
    none, repaired = (row[2] for row in rows)
    assert repaired < none
