"""How alike experts are, against loops over tokens and experts in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.stream import in_batches
from moe_jax.transformer import init
from pruning.scores.likeness import KEPT, STEP, TOKENS, likeness
from tests.pruning.scores.test_layer import CONFIG

E, F, K = CONFIG.moe.num_experts, CONFIG.moe.d_expert, CONFIG.moe.experts_per_token


def normed(layer, middle: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.square(middle).mean(axis=1, keepdims=True) + CONFIG.norm_eps)
    return middle / scale * np.asarray(layer.mlp_norm, np.float64)


def expert(layer, number: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden rows and outputs of one expert on rows [S, D]."""
    rows = slice(number * F, (number + 1) * F)
    experts = layer.mlp.experts
    gate, up, down = (np.asarray(w, np.float64)[rows]
                      for w in (experts.w_gate, experts.w_up, experts.w_down))  # fmt: skip
    g = x @ gate.T
    hidden = g / (1 + np.exp(-g)) * (x @ up.T)
    return hidden, hidden @ down


def test_a_text_says_what_loops_over_its_tokens_say():
    assert (TOKENS, STEP, KEPT) == (2048, 32, 4)
    model = jax.tree.map(lambda w: w * 10 if w.ndim == 2 else w, init(CONFIG, jax.random.key(2)))
    experts = model.layers[0].mlp.experts
    silent = np.asarray(experts.w_down).copy()
    silent[4 * F : 5 * F] = 0  # an expert that says nothing is like no other
    experts = dataclasses.replace(experts, w_down=jnp.asarray(silent))
    layer = dataclasses.replace(
        model.layers[0], mlp=dataclasses.replace(model.layers[0].mlp, experts=experts)
    )
    rng = np.random.default_rng(0)
    valid = np.arange(8)[None] < np.array([8, 3, 5, 8, 6])[:, None]
    text = in_batches(model, np.zeros((5, 8), np.int32), valid, 2)
    middle = [rng.normal(size=(2, 8, CONFIG.d_model)).astype(np.float32) for _ in text.rows]

    found = likeness(layer, middle, text.places)
    x = normed(layer, np.concatenate(middle)[:5][valid].astype(np.float64))
    made = [expert(layer, one, x) for one in range(E)]
    outputs = np.stack([out for _, out in made])
    np.testing.assert_allclose(found.outputs, outputs.mean(axis=1), rtol=1e-4, atol=1e-5)

    def cosine(a, b):
        size = np.linalg.norm(a) * np.linalg.norm(b)
        return a @ b / size if size else 0.0

    alike = [[np.mean([cosine(a, b) for a, b in zip(one, other, strict=True)])
              for other in outputs] for one in outputs]  # fmt: skip
    np.testing.assert_allclose(found.cosine, alike, atol=1e-5)
    assert found.cosine[4, 4] == 0
    logits = x @ np.asarray(layer.mlp.router, np.float64).T
    routing = [[cosine(logits[:, a], logits[:, b]) for b in range(E)] for a in range(E)]
    np.testing.assert_allclose(found.routing, routing, atol=1e-5)
    score = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for one in range(E):
        own = [t for t in range(len(x)) if one in np.argsort(-score[t])[:K]]
        sizes = [score[t, one] * np.linalg.norm(outputs[one, t]) for t in own]
        np.testing.assert_allclose(found.saliency[one], np.mean(sizes) if own else 0, rtol=1e-4)
    # The first of every step: each batch is one here.
    starts = np.concatenate([[0], np.cumsum([valid[rows].sum() for rows in text.rows])])[:-1]
    kept = np.concatenate([np.arange(start, start + KEPT) for start in starts])
    hidden = np.stack([rows[kept].T for rows, _ in made])
    np.testing.assert_allclose(found.hidden, hidden, rtol=1e-4, atol=1e-5)


def test_a_long_text_is_looked_at_by_tokens_spread_evenly(monkeypatch):
    from pruning.scores import likeness as module

    valid = np.ones((3, 50), bool)
    valid[1, 10:] = False
    steps = module._steps(valid, 44)
    index, real = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    assert len(steps) == 2 and real.sum() == 44
    places = np.flatnonzero(valid)
    assert index[real].tolist() == [places[number * 110 // 44] for number in range(44)]
    assert len(module._steps(valid, 1000)) == 4 and not module._steps(valid & False, 10)
