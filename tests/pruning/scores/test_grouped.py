"""Statistics, quality and logits of layers in groups of experts beside those of whole layers."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert import open_checkpoint
from moe_jax.groups import each_group
from moe_jax.spread import Spread
from pruning.budget.plan import PruningPlan
from pruning.measure.settled import settled_logits
from pruning.scores.asked import Asked
from pruning.scores.collect import collect_statistics, collect_weights
from pruning.scores.elimination import elimination_costs
from pruning.scores.layer import GRADIENT_SCORES
from pruning.scores.parts import in_parts
from pruning.scores.sample import Sample
from pruning.scores.states import States, state_bytes
from pruning.scores.statistics import ChannelStatistics
from pruning.scores.sweep_log import SweepFolder
from pruning.scores.text_sweep import TextSweep
from pruning.shrink.masked import masked_hidden
from pruning.shrink.prune import PrunedSource
from tests.support import tiny

TOKENS = np.random.default_rng(1).integers(0, 96, (5, 12)).astype(np.int32)
VALID = np.arange(12)[None] < np.array([[12], [7], [12], [3], [12]])
# Layers without experts, shared experts and routing within groups of experts; biases.
FAMILIES = {
    "deepseek_v3": {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "gpt_oss": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def sources(request, tmp_path_factory):
    """A model whose layers are taken whole, and in groups of three of its eight experts."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    tiny.save(tiny.tiny_model(request.param, **FAMILIES[request.param]), folder)
    whole, grouped = open_checkpoint(folder), open_checkpoint(folder)
    grouped.experts_at_once = 3
    return whole, grouped


def test_groups_are_the_experts_of_a_layer_and_the_first_has_the_rest(sources):
    whole, grouped = sources
    layer, groups = whole.layer(1), [*each_group(grouped, 1)]
    assert [(g.mlp.own.start, g.mlp.own.stop) for g in groups] == [(0, 3), (3, 6), (6, 8)]
    for name in ("w_gate", "w_down"):
        parts = [np.asarray(getattr(group.mlp.experts, name)) for group in groups]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(layer.mlp.experts, name))
    assert groups[0].attention is not None
    assert all(group.attention is None and group.mlp.shared is None for group in groups[1:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_of_groups_have_the_bits_of_whole_layers(sources, dtype):
    how = {"batch": 2, "dtype": dtype, "gradients": True, "obs": True}
    wanted, found = (collect_statistics(one, TOKENS, VALID, **how).arrays() for one in sources)
    assert {"taylor", "fisher", "loss_sum"} < wanted.keys()
    # Of gate rows whose last bits are those of another program: on a Xeon one sum in bfloat16, on
    # an EPYC all gradients, and phi. All else has its bits.
    has_bias = sources[0].config.moe.expert_bias
    biased = {*GRADIENT_SCORES, "gate_saliency", "phi"} if has_bias else set()
    for name, value in wanted.items():
        if name in biased:
            size = np.abs(value).max()
            np.testing.assert_allclose(found[name], value, 1e-6, 1e-6 * size, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("sources", ["deepseek_v3"], indirect=True)
def test_what_others_take_over_is_seen_alike_in_groups(sources):
    """By the elimination of channels, and in masked models whose kept ones have taken over."""
    how = {"batch": 2, "dtype": jnp.float32}
    given = TOKENS[:3], VALID[:3], collect_statistics(sources[0], TOKENS, VALID, **how)
    wanted, found = (elimination_costs(one, *given, **how) for one in sources)
    np.testing.assert_array_equal(found, wanted)
    plan = plan_of(sources[0].config)
    wanted, found = (
        masked_hidden(one, TOKENS, VALID, [plan], sample=Sample(one, *given, **how), **how)
        for one in sources
    )
    np.testing.assert_array_equal(found, wanted)
    plain = masked_hidden(sources[0], TOKENS, VALID, [plan], **how)
    assert np.abs(plain - wanted).max() > 0.1


class Together(Spread):
    """A process of several, each a thread here."""

    met, given = threading.Barrier(2, timeout=60), {}

    def total(self, sums):
        self.given[self.process] = dict(sums)
        self.met.wait()
        found = {name: self.given[0][name] + self.given[1][name] for name in sums}
        self.met.wait()  # all have read
        return found


def test_processes_that_take_layers_in_groups_have_the_sums_of_one(sources):
    """Of three batches the second process has one, and a batch of padding beside it."""
    folder = sources[1].about.folder

    def of(process):
        source = open_checkpoint(folder)
        source.experts_at_once = 3
        spread = Together(None, process, 2)
        return collect_statistics(source, TOKENS, VALID, spread=spread, **how).arrays()

    how: dict = {"batch": 2, "gradients": True, "obs": True}
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(of, (0, 1))
    wanted = collect_statistics(sources[1], TOKENS, VALID, **how).arrays()
    for name, value in wanted.items():
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
        # Grams are added up as float32 in each process.
        rtol = 1e-5 if name == "elimination" else 1e-12
        np.testing.assert_allclose(one[name], value, rtol=rtol, err_msg=name)


class Dying:
    """A model that is gone after so many groups."""

    def __init__(self, model, groups: int):
        self._model, self._left = model, groups

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __len__(self):
        return len(self._model)

    def groups(self, index):
        return self._model.groups(index)

    def group(self, index, number):
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return self._model.group(index, number)


@pytest.mark.parametrize("sources", ["gpt_oss"], indirect=True)
def test_a_sweep_killed_between_groups_goes_on_at_its_layer(sources, tmp_path):
    """Up and down, and in the end through whole layers."""
    asked, log = Asked(gradients=True), SweepFolder(tmp_path / "scoring")
    text = in_parts(sources[1], TOKENS, VALID, None, [np.arange(5)], batch=2)
    shape = (*text.batches.tokens.shape, sources[1].config.d_model)
    slots, steps = asked.slots(sources[1].config), asked.steps(sources[1].config)

    def swept(source) -> ChannelStatistics:
        size = state_bytes(slots, shape, jnp.float32)
        with log.states({"id": 1}, steps, tmp_path, size) as file:
            states = States(slots, shape, jnp.float32, file)
            found = TextSweep(source, text, asked, jnp.float32, states, log)
            found.forward()
            found.backward()
        return found.finished(found.part(0), 1)

    done = []
    # A layer of three groups takes five readings up, and three down.
    for groups in (5 + 3, 5, 2, 3 + 1):
        with pytest.raises(KeyboardInterrupt):
            swept(Dying(sources[1], groups))
        done.append(log.done)
    assert done == [1, 3, 3, 4]  # the loss is a step, too
    found, wanted = (
        swept(sources[0]),
        collect_statistics(sources[0], TOKENS, VALID, batch=2, gradients=True),
    )
    for name, value in wanted.arrays().items():
        near = 1e-6 if sources[0].config.moe.expert_bias else 0  # as above
        size = near * np.abs(value).max()
        np.testing.assert_allclose(found.arrays()[name], value, near, size, err_msg=name)


def test_what_the_weights_alone_say_is_the_same(sources):
    wanted, found = (collect_weights(source).arrays() for source in sources)
    for name, value in wanted.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6 * size, err_msg=name)


def plan_of(config) -> PruningPlan:
    shape = len(config.moe_layers), config.moe.num_experts, config.moe.d_expert
    keep = np.random.default_rng(0).random(shape) < 0.6
    keep[0, 2] = False  # an emptied expert
    return PruningPlan(keep, config.moe_layers)


def test_pruned_and_masked_models_compute_the_same(sources):
    config = sources[0].config
    plan = plan_of(config)
    # Sums of biases are those of each group: equal to rounding.
    near = {"rtol": 2e-5, "atol": 2e-5} if config.moe.expert_bias else {"rtol": 0, "atol": 0}
    wanted, found = (masked_hidden(one, TOKENS, VALID, [plan, plan], batch=2) for one in sources)
    np.testing.assert_allclose(found, wanted, **near)
    (wanted, settled), (found, as_settled) = (
        settled_logits(PrunedSource(one, plan), [TOKENS], 12)[0] for one in sources
    )
    np.testing.assert_array_equal(as_settled, settled)
    np.testing.assert_allclose(found, wanted, **near)


def test_the_next_group_is_read_ahead_up_and_down_and_none_beyond_the_layer(sources):
    grouped = sources[1]
    for number in (0, 1, 2, 1, 0):
        grouped.group(1, number)
    assert grouped._ahead is None
    grouped.group(1, 0)
    assert (grouped._ahead[0].first, grouped._ahead[0].stop) == (3, 6)
    grouped.group(1, 1), grouped.group(1, 2)
    assert grouped._ahead is None
    grouped.group(1, 1)
    assert (grouped._ahead[0].first, grouped._ahead[0].stop) == (0, 3)


def test_the_layer_read_ahead_is_the_next_one_of_a_sweep_up_or_down(tmp_path):
    tiny.save(tiny.tiny_model("mixtral", num_hidden_layers=4), tmp_path / "model")
    source: Any = open_checkpoint(tmp_path / "model")

    def ahead(*indices: int) -> list[int | None]:
        found = []
        for index in indices:
            source.layer(index)
            found.append(source._ahead and source._ahead[0].index)
        return found

    assert ahead(0, 1, 2, 3) == [1, 2, 3, None]
    assert ahead(2, 1, 0) == [1, 0, None]
    assert ahead(3, 1, 3) == [None, None, None]  # no sweep
    assert ahead(2, 3, 0) == [1, None, 1]
    source.experts_at_once = 3
    source.layer(0)  # taken whole all the same, and so is the next one
    assert (source._ahead[0].first, source._ahead[0].stop) == (0, 8)
    source.group(0, 0)
    assert (source._ahead[0].index, source._ahead[0].first, source._ahead[0].stop) == (0, 3, 6)
    source.experts_at_once = None
    assert ahead(0) == [1]
