"""What channels do to noise equals loops over rows and experts that share no code with ours."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from pruning.scores.collect import collect_weights
from pruning.scores.noise import ROWS_PER_EXPERT, worthiest_on_noise
from tests.support import tiny
from tests.support.variants import VARIANTS

# softmax; softmax with a centred norm; sigmoid with a bias for the selection and groups; biases in
# router and experts and a bounded activation
FAMILIES = {
    "qwen2_moe": "plain",
    "qwen3_next": "plain, every fourth layer attends by softmax",
    "glm4_moe": "biased, normalised, groups, tied, linear rope",
    "gpt_oss": "a window shorter than the text in even layers, yarn",
}
LIMIT = tiny.OWN_SIZES["gpt_oss"]["swiglu_limit"]


def swiglu(stored: dict, stem: str, expert: int):
    """Hidden activation as a function of the input, W_down [D, F] and its bias."""
    stem = f"{stem}.mlp.experts.{expert}"
    gate, up, down = (stored[f"{stem}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (lambda x: (g := gate @ x) / (1 + np.exp(-g)) * (up @ x)), down, 0.0


def bounded(stored: dict, stem: str, expert: int):
    """The same of gpt-oss, whose gate and up channels alternate."""
    both, bias, down, added = (
        stored[f"{stem}.mlp.experts.{part}"][expert]
        for part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    )

    def hidden(x):
        gate, up = (x @ both[:, i::2] + bias[i::2] for i in (0, 1))
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)

    return hidden, down.T, added


def worth_by_hand(
    folder: Path, layer: int, experts: int, *, centred: bool = False, rounded: type = np.float32
) -> np.ndarray:
    """[E, F] in float64, from the tensors of a folder rounded to a dtype."""
    names = load_file(folder / "model.safetensors")
    stem = f"model.layers.{layer}"
    own = {n: v for n, v in names.items() if n.startswith(f"{stem}.")}
    stored = {n: v.astype(rounded).astype(np.float64) for n, v in own.items()}
    gain = stored[f"{stem}.post_attention_layernorm.weight"] + centred
    noise = np.random.default_rng(0).normal(size=(2048, len(gain)))
    rows = [gain * row / np.sqrt(np.mean(row**2)) for row in noise]
    is_bounded = f"{stem}.mlp.router.weight" in stored
    router = f"{stem}.mlp.{'router' if is_bounded else 'gate'}"
    found = []
    for expert in range(experts):

        def liking(x, expert=expert):
            logit = stored[f"{router}.weight"][expert] @ x
            if is_bounded:
                return logit + stored[f"{router}.bias"][expert]
            if f"{router}.e_score_correction_bias" in stored:
                bias = stored[f"{router}.e_score_correction_bias"][expert]
                return 1 / (1 + np.exp(-logit)) + bias
            return logit

        hidden, down, bias = (bounded if is_bounded else swiglu)(stored, stem, expert)
        worth = np.zeros(down.shape[1])
        for x in sorted(rows, key=liking)[-256:]:
            h = hidden(x)
            worth += h * ((down @ h + bias) @ down)
        found.append(worth / 256)
    return np.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_worth_equals_loops_over_rows_and_experts_and_is_the_same_twice(family, tmp_path):
    model = tiny.tiny_model(family, **VARIANTS[family][FAMILIES[family]])
    base = open_checkpoint(tiny.save(model, tmp_path / "model"), dtype=jnp.float32)
    found = collect_weights(base)
    assert found.noise is not None and found.groups == {"weights-only"}
    for slot, layer in enumerate(base.config.moe_layers):
        expected = worth_by_hand(base.about.folder, layer, 8, centred=family == "qwen3_next")
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found.noise[slot], expected, rtol=1e-4, atol=atol)
        best = np.sort(np.argsort(-expected, axis=1)[:, :5], axis=1)
        np.testing.assert_array_equal(worthiest_on_noise(base.layer(layer), 5), best)
    np.testing.assert_array_equal(collect_weights(base).noise, found.noise)


def test_an_expert_meets_an_eighth_of_the_2048_rows():
    assert ROWS_PER_EXPERT == 2048 // 8
