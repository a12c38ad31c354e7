"""Merged experts against transformers, plain sums in numpy and every permutation there is."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.checkpoint import open_checkpoint
from moe_jax.experts.pool import dense_experts
from moe_jax.stream import forward_hidden
from pruning.budget.merging import MergeRule, evenly
from pruning.scores.likeness import Likeness
from pruning.shrink.merge import (
    MergedLayer,
    MergedSource,
    Merging,
    aligned_channels,
    merge_of,
    merged_layer,
)
from tests.support import tiny

F = 16
TOKENS, VALID = tiny.tokens_and_mask(2, 12)
LEADERS = np.array([[0, 0, 5, 0, 4, 5, 7, 7], [6, 1, 1, 3, 6, 5, 6, 7]])


def random_merging(cut: bool = False) -> Merging:
    rng = np.random.default_rng(0)
    layers = {}
    for index, leaders in enumerate(LEADERS):
        weight = rng.random(8)
        share = weight / np.bincount(leaders, weight, 8)[leaders]
        order = np.stack([rng.permutation(F) for _ in range(8)])
        order[leaders == np.arange(8)] = np.arange(F)
        layers[index] = MergedLayer(leaders, share, order, cut)
    return Merging(layers)


def merge_tensor(tensor: torch.Tensor, merge: MergedLayer, axis: int | None, place) -> None:
    """Put the averages of groups in the place of a tensor's experts; axis has the channels, which
    channel f lies at `place(f)` of, or there are none."""
    old = tensor.detach().numpy().copy()
    with torch.no_grad():
        for e, leader in enumerate(merge.leaders):
            new = np.zeros_like(old[e])
            for m in np.flatnonzero(merge.leaders == leader):
                own = old[m]
                if axis is not None:
                    moved = own.copy()
                    for f in range(F):
                        for to, of in zip(place(f), place(merge.order[m, f]), strict=True):
                            moved.swapaxes(0, axis)[to] = own.swapaxes(0, axis)[of]
                    own = moved
                new += merge.share[m] * own
            tensor[e] = torch.from_numpy(new)


def merge_in_torch(model, merging: Merging) -> None:
    for index, merge in merging.layers.items():
        experts = model.model.layers[index].mlp.experts
        if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: [E, D, 2 F], gate and up in turns
            both = lambda f: (2 * f, 2 * f + 1)  # noqa: E731
            merge_tensor(experts.gate_up_proj, merge, 1, both)
            merge_tensor(experts.gate_up_proj_bias, merge, 0, both)
            merge_tensor(experts.down_proj, merge, 0, lambda f: (f,))
            merge_tensor(experts.down_proj_bias, merge, None, None)
        else:  # [E, 2 F, D], gate before up
            merge_tensor(experts.gate_up_proj, merge, 0, lambda f: (f, F + f))
            merge_tensor(experts.down_proj, merge, 1, lambda f: (f,))


def logits_of(source) -> np.ndarray:
    return np.asarray(source.head(forward_hidden(source, TOKENS, VALID, batch=2)))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_merged_experts_are_those_of_transformers_with_averages_in_their_place(family, tmp_path):
    model, merging = tiny.tiny_model(family), random_merging()
    source = open_checkpoint(tiny.save(model, tmp_path / family))
    dense = tiny.torch_logits(model, TOKENS, VALID)
    merge_in_torch(model, merging)
    wanted = tiny.torch_logits(model, TOKENS, VALID)
    found = logits_of(MergedSource(source, merging))
    assert np.abs(wanted - dense)[VALID].max() > 0.05
    np.testing.assert_allclose(found[VALID], wanted[VALID], rtol=1e-3, atol=2e-4)


def test_a_cut_router_is_that_of_a_model_with_fewer_experts(tmp_path):
    model, merging = tiny.tiny_model("qwen3_moe", norm_topk_prob=True), random_merging(cut=True)
    merging.layers[1] = dataclasses.replace(
        merging.layers[1], leaders=merging.layers[0].leaders, share=merging.layers[0].share,
        order=merging.layers[0].order,
    )  # fmt: skip
    source = open_checkpoint(tiny.save(model, tmp_path / "model"))
    merge_in_torch(model, merging)
    leads = np.array([0, 4, 5, 7])
    smaller = tiny.tiny_model("qwen3_moe", norm_topk_prob=True, num_experts=len(leads))
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            whole = model.get_parameter(name)
            parameter.copy_(whole if whole.shape == parameter.shape else whole[leads])
    wanted = tiny.torch_logits(smaller, TOKENS, VALID)
    found = logits_of(MergedSource(source, merging))
    np.testing.assert_allclose(found[VALID], wanted[VALID], rtol=1e-3, atol=2e-4)
    assert merging.plan.keep.shape == (2, 8, F) and merging.plan.layer_indices == (0, 1)
    assert [set(np.flatnonzero(row)) for row in merging.plan.counts] == [set(leads)] * 2


# --- channels in one order ---

ALIGNED = MergeRule(about="", counts=evenly, group=lambda seen, tokens, groups: seen.cosine,
                    weight=lambda seen, tokens: tokens, align="weights")  # fmt: skip


def experts_of(rng, count: int, width: int, d: int = 6, dtype=jnp.float32):
    pools = [jnp.asarray(rng.normal(size=(count * width, d)), dtype) for _ in range(3)]
    experts = dense_experts(*pools, count, biased=True)
    shifts = {n: jnp.asarray(rng.normal(size=count * width), dtype) for n in ("b_gate", "b_up")}
    return dataclasses.replace(experts, **shifts)


def permuted(experts, orders: np.ndarray):
    """Experts that all are the first one, their channels in other orders."""

    def change(pool):
        return jnp.concatenate([pool[order] for order in orders])

    pools = {name: change(getattr(experts, name)) for name in ("w_gate", "w_up", "w_down")}
    return dataclasses.replace(experts, **pools)


@pytest.mark.parametrize("align", ["weights", "activations"])
def test_experts_that_differ_in_the_order_of_channels_merge_into_what_they_were(align, tmp_path):
    source = open_checkpoint(tiny.save(tiny.tiny_model("qwen2_moe"), tmp_path / "model"))
    layer, rng = source.layer(0), np.random.default_rng(1)
    orders = np.stack([np.arange(F), *(rng.permutation(F) for _ in range(7))])
    same = permuted(layer.mlp.experts, orders)
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=same))
    leaders = np.array([0, 0, 3, 3, 3, 0, 0, 7])
    hidden = rng.normal(size=(F, 5))[orders].astype(np.float32)
    seen = Likeness(*[leaders] * 4, hidden)
    tokens = np.array([4.0, 4.0, 2.0, 1.0, 1.0, 8.0, 0.0, 0.0])  # whose averages are exact
    rule = dataclasses.replace(ALIGNED, align=align)
    merge = merge_of(layer, rule, seen, tokens, 3)
    for expert, leader in enumerate(leaders):
        np.testing.assert_array_equal(orders[expert][merge.order[expert]], orders[leader])
    assert merge.share.tolist() == [0.25, 0.25, 0.5, 0.25, 0.25, 0.5, 0.0, 1.0] and not merge.cut
    found = merged_layer(layer, merge).mlp.experts
    for name in ("w_gate", "w_up", "w_down"):
        rows = np.asarray(getattr(layer.mlp.experts, name)).reshape(8, F, -1)
        own = np.asarray(getattr(found, name)).reshape(8, F, -1)
        np.testing.assert_array_equal(own, rows[leaders])
    # Without alignment it is another function.
    plain = merge_of(layer, dataclasses.replace(ALIGNED, align=""), seen, tokens, 3)
    other = np.asarray(merged_layer(layer, plain).mlp.experts.w_up).reshape(8, F, -1)
    assert np.abs(other - np.asarray(same.w_up).reshape(8, F, -1)[leaders]).max() > 0.05


@pytest.mark.parametrize("align", ["weights", "activations"])
def test_channels_are_matched_as_the_best_of_all_permutations_has_them(align):
    rng = np.random.default_rng(4)
    experts, width = experts_of(rng, 3, 5), 5
    hidden = rng.normal(size=(3, width, 4)).astype(np.float32)
    found = aligned_channels(experts, np.array([2, 1, 2]), align, hidden)
    names = ("w_gate", "w_up", "w_down", "b_gate", "b_up")
    rows = np.concatenate(
        [np.asarray(getattr(experts, n), np.float64).reshape(3, width, -1) for n in names], axis=2
    )

    def distance(order) -> float:
        kinds = [rows, hidden.astype(np.float64)][: 2 if align == "activations" else 1]
        unit = [kind / np.linalg.norm(kind, axis=(1, 2), keepdims=True) for kind in kinds]
        return sum(np.square(kind[2] - kind[0][list(order)]).sum() for kind in unit)

    best = min(itertools.permutations(range(width)), key=distance)
    assert found[0].tolist() == list(best) != list(range(width))
    assert found[1].tolist() == found[2].tolist() == list(range(width))
    # The weights alone say otherwise than with what they make of a text.
    if align == "activations":
        by_weights = aligned_channels(experts, np.array([2, 1, 2]), "weights", hidden)
        assert by_weights[0].tolist() != list(best)


def test_those_lead_who_are_their_own_leaders():
    nothing = np.zeros((8, F))
    merging = Merging({3: MergedLayer(LEADERS[0], nothing, nothing.astype(int), False)})
    leads = [True, False, False, False, True, True, False, True]
    assert merging.layers[3].is_leader.tolist() == leads
    assert merging.plan.layer_indices == (3,)
    np.testing.assert_array_equal(
        merging.plan.keep, np.array(leads)[None, :, None] & np.ones(F, bool)
    )


def test_groups_of_one_keep_their_bits_and_silent_experts_make_no_nan(tmp_path):
    model = tiny.half(tiny.tiny_model("qwen2_moe"))
    layer = open_checkpoint(tiny.save(model, tmp_path / "model")).layer(0)
    experts = layer.mlp.experts
    silent = experts.w_up.at[F : 2 * F].set(0), experts.w_down.at[F : 2 * F].set(0)
    experts = dataclasses.replace(experts, w_up=silent[0], w_down=silent[1],
                                  w_gate=experts.w_gate.at[F : 2 * F].set(0))  # fmt: skip
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))
    leaders = np.array([0, 0, 2, 3, 4, 5, 5, 7])
    seen = Likeness(*[leaders] * 4, np.zeros((8, F, 2), np.float32))
    merge = merge_of(layer, dataclasses.replace(ALIGNED, align="activations"), seen, np.zeros(8), 6)
    assert merge.share.tolist() == [0.5, 0.5, 1, 1, 1, 0.5, 0.5, 1]
    found = merged_layer(layer, merge)
    own, old = (np.asarray(one.mlp.experts.w_gate).reshape(8, F, -1) for one in (found, layer))
    assert own.dtype == old.dtype == jnp.bfloat16
    np.testing.assert_array_equal(own[[2, 3, 4, 7]], old[[2, 3, 4, 7]])
    half = (old[0].astype(np.float32) / 2).astype(old.dtype)
    np.testing.assert_array_equal(own[0], half)
    np.testing.assert_array_equal(own[1], half)
    assert found.mlp.alive is None and found.mlp.router is layer.mlp.router
