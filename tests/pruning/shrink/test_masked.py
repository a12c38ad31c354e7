"""Plans that run masked beside models whose channels are cut out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.stream import forward_hidden, mapped
from moe_jax.transformer import abstract
from pruning.budget.plan import PruningPlan
from pruning.scores.grams import Seen
from pruning.shrink import masked
from pruning.shrink.masked import masked_hidden
from pruning.shrink.prune import PrunedSource, mask_layer
from pruning.shrink.rounding import QuantizedSource
from pruning.shrink.taken_over import taken_over
from tests.pruning.scores.test_layer import CONFIG

SHAPE = (2, 6, 12)  # layers with experts, experts, channels
D = CONFIG.d_model


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)

    def drawn(leaf):
        if leaf.dtype == jnp.int32:  # widths of experts
            return jnp.full(leaf.shape, CONFIG.moe.d_expert, jnp.int32)
        return jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map(drawn, abstract(CONFIG))


def plan_of(seed: int, constants: bool = False) -> PruningPlan:
    rng = np.random.default_rng(seed)
    keep = rng.random(SHAPE) < 0.6
    keep[0, 1] = keep[1, 2] = False
    keep[1, 3] = True
    given = tuple(rng.normal(size=(1, D)).astype(np.float32) for _ in range(2))
    return PruningPlan(keep, (0, 2), {}, given if constants else None)


TEXT = np.random.default_rng(1).integers(0, 64, (5, 6)).astype(np.int32)
VALID = np.arange(6)[None] < np.array([6, 6, 3, 6, 5])[:, None]


def test_every_plan_gives_what_its_own_model_gives(model):
    plans, visited = [plan_of(2), plan_of(3, constants=True)], []
    found = masked_hidden(model, TEXT, VALID, plans, batch=2, on_layer=visited.append)
    assert found.shape == (2, 5, 6, D) and visited == [0, 1, 2]
    for plan, states in zip(plans, found, strict=True):

        def masked_layer(index, layer, plan=plan):
            if index not in (0, 2):
                return layer
            slot = (0, 2).index(index)
            return mask_layer(layer, plan.keep[slot], plan.added(slot))

        wanted = forward_hidden(mapped(model, masked_layer), TEXT, VALID, batch=5)
        np.testing.assert_allclose(states[VALID], wanted[VALID], rtol=1e-4, atol=1e-4)
    assert np.abs(found[0] - found[1])[VALID].max() > 0.1


def test_one_model_is_run_for_plans_as_far_up_as_they_are_the_same(model, monkeypatch):
    """And no further, be they the same again in a layer above."""
    one, other = plan_of(2), plan_of(3)
    joined = [PruningPlan(np.stack([a.keep[0], b.keep[1]]), (0, 2))
              for a, b in ((one, one), (one, other), (other, one), (one, one))]  # fmt: skip
    run, ways = masked.masked_forward, []

    def masked_forward(layer, *given):
        ways.append(id(layer))
        return run(layer, *given)

    monkeypatch.setattr(masked, "masked_forward", masked_forward)
    found = masked_hidden(model, TEXT, VALID, joined, batch=5)
    assert len(ways) == 2 + 3  # of four plans in each of two layers
    for plan, states in zip(joined, found, strict=True):
        wanted = forward_hidden(PrunedSource(model, plan), TEXT, VALID, batch=5)
        np.testing.assert_allclose(states[VALID], wanted[VALID], rtol=1e-4, atol=1e-4)
    assert all(np.abs(found[0] - states)[VALID].max() > 0.01 for states in found[1:3])


def test_plans_in_fewer_bits_give_what_their_rounded_models_give(model):
    keep = np.ones(SHAPE, bool)
    for layer, expert, gone in ((0, 1, 12), (0, 4, 8), (1, 2, 4), (1, 5, 12)):
        keep[layer, expert, ::2][: gone // 2] = keep[layer, expert, 1::2][: gone // 2] = False
    plans = [PruningPlan(keep, (0, 2)), PruningPlan(np.ones(SHAPE, bool), (0, 2)),
             PruningPlan(keep, (0, 2))]  # fmt: skip
    found = masked_hidden(
        model, TEXT, VALID, plans, storages=["int4", "int4", "bf16"], group_size=4, batch=5
    )
    cut = PrunedSource(model, plans[0])
    rounded = (QuantizedSource(cut, 4), QuantizedSource(model, 4), cut)
    for states, source in zip(found, rounded, strict=True):
        wanted = forward_hidden(source, TEXT, VALID, batch=5)
        np.testing.assert_allclose(states[VALID], wanted[VALID], rtol=1e-4, atol=1e-4)
    assert min(np.abs(found[0] - other)[VALID].max() for other in found[1:]) > 0.01


def test_a_cut_router_is_that_of_a_model_which_never_had_the_dropped_experts(model):
    plan = plan_of(2)
    left = {index: np.flatnonzero(plan.counts[slot]) for slot, index in enumerate((0, 2))}

    def slim(index, layer):
        if index not in left:
            return layer
        layer, mine = mask_layer(layer, plan.keep[(0, 2).index(index)]), left[index]
        moe, old = layer.mlp, layer.mlp.experts
        rows = (mine[:, None] * 12 + np.arange(12)).ravel()
        pools = {name: getattr(old, name)[rows] for name in ("w_gate", "w_up", "w_down")}
        experts = dataclasses.replace(old, **pools, count=old.count[mine])
        config = dataclasses.replace(moe.config, num_experts=len(mine))
        moe = dataclasses.replace(moe, config=config, router=moe.router[mine], experts=experts)
        return dataclasses.replace(layer, mlp=moe)

    plain, cut = masked_hidden(model, TEXT, VALID, [plan, plan.with_cut_router()], batch=5)
    assert [len(mine) for mine in left.values()] == [5, 5]
    wanted = forward_hidden(mapped(model, slim), TEXT, VALID, batch=5)
    np.testing.assert_allclose(cut[VALID], wanted[VALID], rtol=1e-4, atol=1e-4)
    assert np.abs(cut - plain)[VALID].max() > 0.1
    found = forward_hidden(PrunedSource(model, plan.with_cut_router()), TEXT, VALID, batch=5)
    np.testing.assert_allclose(found[VALID], wanted[VALID], rtol=1e-4, atol=1e-4)


def test_a_plan_of_other_layers_or_widths_is_refused(model):
    keep = np.ones((2, 6, 11), bool)
    with pytest.raises(InputError, match=r"of \[6, 11\] channels in layer 0, which has 72; the"):
        masked_hidden(model, TEXT, VALID, [PruningPlan(keep, (0, 2))])
    with pytest.raises(InputError, match="in layer 1, which has 0"):
        masked_hidden(model, TEXT, VALID, [PruningPlan(np.ones(SHAPE, bool), (0, 1))])


def test_with_a_sample_kept_channels_take_over_what_is_gone(model):
    """Behind the layers of the dense model, whatever the plans do."""
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(6, 40, 12))
    grams = np.einsum("erf,erg->efg", hidden, hidden).astype(np.float32)
    seen = Seen(grams, np.einsum("erf,erf->ef", hidden, hidden), np.full(6, 40))
    taken: list[int] = []

    class Sample:
        def through(self, index, layer):
            assert layer is model.layers[index]
            taken.append(index)
            return seen if index != 1 else None

    plan: PruningPlan = plan_of(2)
    part = PruningPlan(plan.keep[:1], (2,))  # of one of the layers with experts
    found = masked_hidden(model, TEXT, VALID, [plan, part], sample=Sample(), batch=5)
    assert taken == [0, 1, 2]

    def refitted(one):
        def change(index, layer):
            if index not in one.layer_indices:
                return layer
            keep = one.keep[one.layer_indices.index(index)]
            return mask_layer(taken_over(layer, seen, keep), keep)

        return mapped(model, change)

    for one, states in zip((plan, part), found, strict=True):
        wanted = forward_hidden(refitted(one), TEXT, VALID, batch=5)
        np.testing.assert_allclose(states[VALID], wanted[VALID], rtol=1e-4, atol=1e-4)
