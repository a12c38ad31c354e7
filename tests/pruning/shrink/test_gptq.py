"""GPTQ of whole layers on the embedded model, and its codes in every packed export."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from convert import open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from moe_jax.experts.moe import MoE
from moe_jax.quant import dequantize
from moe_jax.quantized import quantize_layer
from moe_jax.stream import in_batches, layer_forward
from moe_jax.transformer import init
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe
from pruning.shrink.gptq import gptq_layer
from pruning.shrink.gptq_model import codes_in, quantize_model, with_codes
from pruning.shrink.moments import Batch, attention_moments, expert_moments
from pruning.shrink.prune import PrunedSource
from pruning.stages.job import open_job
from tests.convert.families.test_families import unpack
from tests.pruning.scores.test_layer import CONFIG
from tests.support import tiny
from tests.support.command import given, run
from tests.support.logits import logits

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}


def first_inputs(source, tokens, valid, batch: int) -> list[Batch]:
    text = in_batches(source, tokens, valid, batch)
    return list(zip(text.embedded(source, jnp.float32), text.places, strict=True))


@pytest.fixture(scope="module")
def demo():
    """The first layer of the shipped model and real inputs of it."""
    recipe = CompressionRecipe(model="demo", output="unused", max_tokens=10240, planner="fair")
    job = open_job(recipe)
    tokens, valid = job.calibration.tokens, job.calibration.valid
    inputs = first_inputs(job.base, tokens, valid, 8)
    return job.base.layer(0), inputs[:4], inputs[4]


def weights(layer) -> dict[str, np.ndarray]:
    """Every linear weight of the layer in float32."""
    a, e = layer.attention, layer.mlp.experts
    parts = {"w_q": a.w_q, "w_k": a.w_k, "w_v": a.w_v, "w_out": a.w_out}
    parts |= {"gate": e.w_gate, "up": e.w_up, "down": e.w_down}
    return {name: np.asarray(dequantize(w)).astype(np.float32) for name, w in parts.items()}


@pytest.mark.slow
def test_on_the_shipped_model_outputs_are_nearer_and_weights_farther_than_by_rounding(demo):
    layer, seen, (held, context) = demo
    quantised, coverage = gptq_layer(layer, seen, 32)
    rounded = quantize_layer(layer, 32)
    exact = np.asarray(layer_forward(layer, jnp.asarray(held), context))
    error = lambda q: np.square(  # noqa: E731
        np.asarray(layer_forward(q, jnp.asarray(held), context)) - exact
    ).sum()
    assert error(quantised) < 0.8 * error(rounded)
    assert coverage.matrices == 4 + 3 * 16 and coverage.fallbacks == 0
    true, ours, nearest = weights(layer), weights(quantised), weights(rounded)
    for name, weight in true.items():
        assert np.square(ours[name] - weight).sum() > np.square(nearest[name] - weight).sum(), name


def test_moments_are_those_of_a_plain_loop_over_tokens(demo):
    layer, ((x, context), *_), _ = demo
    valid = np.asarray(context.valid).reshape(-1)
    x = jnp.asarray(x)
    norm = lambda v, w: v / np.sqrt(np.square(v).mean(-1, keepdims=True) + layer.norm_eps) * w  # noqa: E731
    attended = np.asarray(norm(np.asarray(x, np.float64), np.asarray(layer.attention_norm, float)))
    rows = attended.reshape(-1, attended.shape[-1])[valid]
    found = attention_moments(layer, x, context)
    np.testing.assert_allclose(found["w_q"], rows.T @ rows, rtol=1e-3, atol=1e-2)

    normed = norm(np.asarray(x, np.float64), np.asarray(layer.mlp_norm, float))
    flat = normed.reshape(-1, normed.shape[-1])[valid]
    e = layer.mlp.experts
    gate, up = (np.asarray(dequantize(w), np.float64).reshape(16, 128, -1)
                for w in (e.w_gate, e.w_up))  # fmt: skip
    chosen = np.argsort(-(flat @ np.asarray(layer.mlp.router, np.float64).T), axis=1)[:, :4]
    got = expert_moments(layer, x, context, jnp.asarray(4, jnp.int32), size=4)
    for i, expert in enumerate(range(4, 8)):
        mine = flat[(chosen == expert).any(axis=1)]
        assert abs(int(got["tokens"][i]) - len(mine)) <= 1  # a near-tie may go either way
        if int(got["tokens"][i]) != len(mine):
            continue
        g = mine @ gate[expert].T
        hidden = g / (1 + np.exp(-g)) * (mine @ up[expert].T)
        for name, inputs in (("w_gate_up", mine), ("w_down", hidden)):
            wanted = inputs.T @ inputs
            np.testing.assert_allclose(got[name][i], wanted, rtol=1e-3, atol=1e-4 * wanted.max())


def test_experts_are_the_same_whatever_the_memory_for_their_moments(demo):
    layer, seen, _ = demo
    small = gptq_layer(layer, seen[:1], 32, moment_bytes=2 << 20)[0]
    large = gptq_layer(layer, seen[:1], 32)[0]
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        assert np.mean(np.asarray(a) == np.asarray(b)) > 0.995  # float32 sums in another order


def test_starved_experts_are_rounded_to_nearest_and_counted():
    config, group = CONFIG, 4
    source = init(config, jax.random.key(0))
    tokens = np.arange(2 * 16).reshape(2, 16).astype(np.int32)
    inputs = first_inputs(source, tokens, np.ones((2, 16), bool), 2)
    layer = source.layer(0)
    assert isinstance(layer.mlp, MoE)
    quantised, coverage = gptq_layer(layer, inputs, group)
    rounded = quantize_layer(layer, group)
    x, context = inputs[0]
    half = dataclasses.replace(layer, attention=quantised.attention)
    routed = jax.jit(lambda layer, x, context: layer.trace(x, context)[1].dispatch.tokens)
    counts = np.asarray(routed(half, jnp.asarray(x), context))
    expected = 2 * (counts < config.d_model) + (counts < config.moe.d_expert)
    assert 0 < expected.sum() and coverage.fallbacks == expected.sum()
    for expert in np.flatnonzero(counts < config.moe.d_expert):
        rows = slice(expert * config.moe.d_expert, (expert + 1) * config.moe.d_expert)
        for name in ("w_gate", "w_up", "w_down"):
            ours, nearest = (dequantize(getattr(q.mlp.experts, name))[rows]
                             for q in (quantised, rounded))  # fmt: skip
            np.testing.assert_array_equal(ours, nearest)


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe"])
def coded(request, tmp_path_factory):
    """A tiny pruned checkpoint with a dense layer, and its GPTQ codes."""
    shared = {"shared_expert_intermediate_size": 64} if request.param == "qwen2_moe" else {}
    layers = {"num_hidden_layers": 2, "mlp_only_layers": [1]}
    model = tiny.tiny_model(request.param, **SIZES, **shared, **layers).bfloat16()
    folder = tmp_path_factory.mktemp("coded")
    base = open_checkpoint(tiny.save(model, folder / "base"), dtype=jnp.bfloat16)
    keep = np.zeros((1, 8, 64), bool)
    for expert, count in enumerate([0, 32, 64, 32, 32, 64, 64, 32]):
        keep[0, expert, np.random.default_rng(expert).permutation(64)[:count]] = True
    plan = PruningPlan(keep, (0,), {"model_hash": base.fingerprint})
    tokens = np.random.default_rng(0).integers(0, 96, (9, 48)).astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    quantize_model(PrunedSource(base, plan), tokens, valid, folder / "codes", group_size=32,
                   provenance={"made": "here"})  # fmt: skip
    return base, plan, folder / "codes", tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ragged-int4", "layered-int4", "padded-int4"])
def test_an_export_holds_the_codes_bit_for_bit(coded, tmp_path, name):
    base, plan, codes, tokens = coded
    source = with_codes(PrunedSource(base, plan), codes, 32)
    widths = (tuple(plan.counts[0].tolist()), ())
    folder = Export(base.about, widths, ExportFormat(name, 32)).write(source, tmp_path / name)
    plain, layer = unpack(folder), source.layer(0)
    moe, start = layer.mlp, 0
    for expert, count in enumerate(plan.counts[0].tolist()):
        for kind, pool in (("gate", moe.experts.w_gate), ("up", moe.experts.w_up),
                           ("down", moe.experts.w_down)):  # fmt: skip
            stored = plain.get(f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight")
            assert (stored is None) == (name.startswith("ragged") and not count)
            if stored is not None:
                own = np.asarray(dequantize(pool))[start : start + count]
                stored = stored.T if kind == "down" else stored
                np.testing.assert_array_equal(stored[:count], own)
                assert not stored[count:].any()
        start += count
    for ours, theirs in (("w_q", "q"), ("w_k", "k"), ("w_v", "v"), ("w_out", "o")):
        np.testing.assert_array_equal(
            plain[f"model.layers.0.self_attn.{theirs}_proj.weight"],
            dequantize(getattr(layer.attention, ours)),
        )
    read = open_checkpoint(folder, dtype=jnp.float32)
    found, wanted = logits(read, tokens[:2]), logits(source, tokens[:2])
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-5)
    scales = {n: v for n, v in load_file(folder / "model.safetensors").items() if "_scale" in n}
    assert min(abs(v.astype(np.float32)).min() for v in scales.values()) >= 2.0**-14


def test_an_export_with_another_group_size_than_the_codes_is_refused(coded, tmp_path):
    base, plan, codes, _ = coded
    source = with_codes(PrunedSource(base, plan), codes, 32)
    full = tuple(64 if count else 0 for count in plan.counts[0].tolist())
    with pytest.raises(ValueError, match=r"one scale per 32 weights.*instead of 64"):
        Export(base.about, (full, ()), ExportFormat("ragged-int4", 64)).write(
            source, tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_the_summary_names_errors_and_fallbacks_of_every_layer(coded):
    summary = codes_in(coded[2]).read_summary()
    assert summary is not None and summary["provenance"] == {"made": "here"}
    sparse, dense = summary["layers"]
    shared = coded[0].config.moe.d_shared > 0
    assert sparse["matrices"] == 4 + 3 * 7 + 3 * shared and dense["matrices"] == 4 + 3
    assert dense["fallbacks"] == 0  # every token visits it
    assert 0 < dense["gptq"] < dense["nearest"]


def test_one_window_is_too_little_text(tmp_path):
    source = init(CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="needs at least 2 calibration windows"):
        quantize_model(source, np.zeros((1, 8), np.int32), np.ones((1, 8), bool), tmp_path / "x",
                       group_size=8, provenance={})  # fmt: skip
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_command_line_runs_gptq_and_exports_again_without_running_it_twice(
    models, texts, tmp_path
):
    out = tmp_path / "out"
    arguments = (*given(texts, out), "--evaluation", texts / "good.txt", "--quantizer", "gptq")
    assert run("--quiet", "compress", models / "single", *arguments) == 0
    report = json.loads((out / "report.json").read_text())
    assert all(check["ok"] and check["done"] for check in report["verification"])
    summary = json.loads((out / "gptq" / "gptq.json").read_text())
    assert report["quantization"] == summary["layers"] and len(summary["layers"]) == 2
    for layer in summary["layers"]:
        assert layer["fallbacks"] < layer["matrices"] and layer["gptq"] != layer["nearest"]
    first = load_file(out / "exports" / "ragged-int4" / "model.safetensors")
    stamp = (out / "gptq" / "gptq.json").stat().st_mtime_ns
    moved = out.rename(tmp_path / "moved")
    assert run("--quiet", "export", moved, "--overwrite") == 0
    assert run("--quiet", "verify", moved) == 0
    assert (moved / "gptq" / "gptq.json").stat().st_mtime_ns == stamp
    again = load_file(moved / "exports" / "ragged-int4" / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)


@pytest.mark.slow
def test_damaged_codes_are_named_by_verify_and_chosen_again_by_export(
    models, texts, tmp_path, capsys
):
    folder = tmp_path / "out"
    options = ("--quantizer", "gptq", "--export", "ragged-int4")
    assert run("--quiet", "score", models / "single", *given(texts, folder), *options) == 0
    assert run("--quiet", "plan", folder, "--prune-rate", 0.5) == 0
    assert run("--quiet", "export", folder) == 0
    codes, written = folder / "gptq", folder / "exports" / "ragged-int4" / "model.safetensors"
    whole = {path.name: path.read_bytes() for path in codes.iterdir()}
    first, layer = written.read_bytes(), "layer-00001.safetensors"

    def summary(**changes) -> bytes:
        return json.dumps(json.loads(whole["gptq.json"]) | changes).encode()

    arrays = load_file(codes / layer)
    other = save({name: value[..., :-1] for name, value in arrays.items()})
    damages = {
        layer: (whole[layer][:-3], b"", whole[layer][:-9] + b"\1" + whole[layer][-8:], other, None),
        "gptq.json": (b"{", summary(files=[1, 2]), summary(files=[]), summary(layers=[{}, {}]),
                      summary(provenance=[]),
                      summary(provenance={"plan": "of another"})),
    }  # fmt: skip
    for name, contents in damages.items():
        for content in contents:
            (codes / name).unlink() if content is None else (codes / name).write_bytes(content)
            capsys.readouterr()
            assert run("--quiet", "verify", folder, "--json", "-") == 0
            checks = json.loads(capsys.readouterr().out)
            undone = {check["check"]: check["detail"] for check in checks if not check["done"]}
            assert undone.keys() == {"4-bit codes", "logits in JAX"}
            said = f"{codes / layer} is not the file that was written" if name == layer else "4-bit"
            assert said in undone["4-bit codes"]
            assert "`moe-compress export --overwrite` chooses them again" in undone["4-bit codes"]
            assert run("export", folder, "--overwrite") == 0
            assert (said + "; they are made again" in capsys.readouterr().err) == (name == layer)
            assert {path.name: path.read_bytes() for path in codes.iterdir()} == whole
            assert written.read_bytes() == first


@pytest.mark.slow
def test_codes_are_those_of_a_text_wherever_it_lies(models, texts, tmp_path, capsys):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    shutil.copy(texts / "good.txt", text)
    arguments = ("--quiet", "compress", models / "single", *given(tmp_path, out, "text.txt"))
    arguments += ("--quantizer", "gptq", "--export", "ragged-int4")
    assert run(*arguments) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (out / "gptq").iterdir()}
    (out / "report.json").unlink()
    moved = text.rename(tmp_path / "moved.txt")
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(text), str(moved)))
    assert run("--quiet", "export", out, "--overwrite") == 0
    assert {path.name: path.stat().st_mtime_ns for path in (out / "gptq").iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_run_that_dies_goes_on_at_the_next_layer_and_ends_the_same(tmp_path, dtype):
    source, random = init(CONFIG, jax.random.key(0)), np.random.default_rng(0)
    tokens = random.integers(0, CONFIG.vocab_size, (9, 16)).astype(np.int32)
    visited = []

    def quantize(folder, on_layer=visited.append, **provenance):
        return quantize_model(source, tokens, tokens >= 0, tmp_path / folder, group_size=4, batch=2,
                              dtype=dtype, provenance=provenance, on_layer=on_layer)  # fmt: skip

    def contents(folder):
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    def die(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    calm = quantize("calm", plan="a")
    visited.clear()
    with pytest.raises(KeyboardInterrupt):
        quantize("codes", die, plan="a")
    assert codes_in(tmp_path / "codes").read_summary() is None
    assert quantize("codes", plan="a") == calm
    assert visited == list(range(2, len(source)))
    assert contents("codes") == contents("calm")
    assert len(contents("codes")) == len(source) + 1
    # what another plan left is not gone on with
    visited.clear()
    with pytest.raises(KeyboardInterrupt):
        quantize("codes", die, plan="b")
    quantize("codes", plan="a")
    assert visited == list(range(len(source))) and contents("codes") == contents("calm")


def test_progress_that_somebody_damaged_is_made_again(tmp_path):
    source, tokens = init(CONFIG, jax.random.key(0)), np.zeros((2, 8), np.int32)

    def quantize(on_layer=None):
        return quantize_model(source, tokens, tokens == 0, tmp_path, group_size=4, provenance={},
                              on_layer=on_layer)  # fmt: skip

    def die(index: int) -> None:
        raise KeyboardInterrupt

    calm = quantize()
    (tmp_path / "gptq.json").unlink()
    for damage in (lambda content: content[:-5], lambda content: b"x" + content, lambda c: b""):
        with pytest.raises(KeyboardInterrupt):
            quantize(die)
        (tmp_path / "states").write_bytes(damage((tmp_path / "states").read_bytes()))
        assert quantize() == calm
