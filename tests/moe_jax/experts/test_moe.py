"""A layer with dead experts against a plain loop over a layer that never had them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import dense_experts

E, D, F = 12, 8, 4
SIZES = {"num_experts": E, "experts_per_token": 3, "d_expert": F}
ROUTERS = {
    "softmax": MoEConfig(**SIZES, renormalize=False, routed_scale=2.0),
    "renormalised softmax": MoEConfig(**SIZES, renormalize=True),
    "best expert of a group": MoEConfig(
        **SIZES, renormalize=False, num_groups=4, groups_per_token=2
    ),
    "biased sigmoid": MoEConfig(
        **SIZES, renormalize=True, score="sigmoid", correction_bias=True, routed_scale=1.5
    ),
    "two best of a group, biased sigmoid": MoEConfig(
        **SIZES, renormalize=True, score="sigmoid", correction_bias=True, num_groups=3,
        groups_per_token=2, group_score="top2", routed_scale=1.5,
    ),
}  # fmt: skip
DEAD = {
    "none": (),
    "one": (4,),
    "several": (0, 4, 7),
    "a whole group": (0, 1, 2, 3),
    "all but one of a group": (4, 5, 6),
    "all but two": tuple(range(10)),
    "all": tuple(range(E)),
}


def layer(config: MoEConfig) -> MoE:
    keys = jax.random.split(jax.random.key(0), 5)
    gate, up, down = (jax.random.normal(key, (E * F, D)) for key in keys[:3])
    bias = jax.random.normal(keys[4], (E,)) if config.correction_bias else None
    return MoE(
        router=jax.random.normal(keys[3], (E, D)),
        experts=dense_experts(gate, up, down, E),
        router_bias=bias,
        config=config,
    )


def plain_output(moe: MoE, x: np.ndarray, alive: list[int]) -> np.ndarray:
    """[D] for one token, of a model that has the living experts alone."""
    c = moe.config
    router = np.asarray(moe.router, np.float64)[alive]
    bias = np.zeros(E) if moe.router_bias is None else np.asarray(moe.router_bias, np.float64)
    logits = router @ x
    if c.score == "softmax":
        exponents = np.exp(logits - logits.max(initial=-math.inf))
        score = dict(zip(alive, exponents / exponents.sum(), strict=True))
    else:
        score = dict(zip(alive, 1 / (1 + np.exp(-logits)), strict=True))
    choice = {e: s + bias[e] for e, s in score.items()}
    groups: dict[int, list[int]] = {}
    for e in alive:
        groups.setdefault(e * c.num_groups // E, []).append(e)
    best = 1 if c.group_score == "max" else 2
    rated = sorted(groups.values(), key=lambda g: -sum(sorted(choice[e] for e in g)[-best:]))
    allowed = [e for group in rated[: c.groups_per_token] for e in group]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: c.experts_per_token]
    total = sum(score[e] for e in chosen) if c.renormalize else 1.0
    gate, up, down = (
        np.asarray(w, np.float64).reshape(E, F, D)
        for w in (moe.experts.w_gate, moe.experts.w_up, moe.experts.w_down)
    )
    out = np.zeros(D)
    for e in chosen:
        g = gate[e] @ x
        out += c.routed_scale * score[e] / total * (g / (1 + np.exp(-g)) * (up[e] @ x)) @ down[e]
    return out


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("router", ROUTERS)
def test_dead_experts_are_as_if_their_rows_had_been_cut_out_of_the_router(router, dead):
    moe = layer(ROUTERS[router])
    x = np.random.default_rng(0).normal(size=(20, D)).astype(np.float32)
    alive = np.array([e not in DEAD[dead] for e in range(E)])
    out, trace = dataclasses.replace(moe, alive=jnp.asarray(alive))(
        jnp.asarray(x), jnp.ones(20, bool)
    )
    living = np.flatnonzero(alive).tolist()
    wanted = np.stack([plain_output(moe, token, living) for token in x.astype(np.float64)])
    np.testing.assert_allclose(out, wanted, rtol=2e-4, atol=2e-4)
    assert np.all(np.asarray(trace.probability)[:, ~alive] == 0)


def test_a_layer_with_all_experts_alive_is_the_layer_itself():
    moe = layer(ROUTERS["two best of a group, biased sigmoid"])
    x, valid = jax.random.normal(jax.random.key(9), (20, D)), jnp.ones(20, bool)
    np.testing.assert_array_equal(
        dataclasses.replace(moe, alive=jnp.ones(E, bool))(x, valid)[0], moe(x, valid)[0]
    )
