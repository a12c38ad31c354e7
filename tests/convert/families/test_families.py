"""Every registered family computes what transformers computes, is pruned and written back."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from convert import FAMILIES, find_family, layer_tensors, load_model, open_checkpoint, outer_tensors
from convert.export import Export
from convert.export_format import FLOAT8, MIXED, ExportFormat
from moe_jax.experts.router import route
from moe_jax.quant import dequantize
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from pruning.stages.sizes import kept_widths
from tests.support import tiny
from tests.support.logits import logits
from tests.support.variants import EXPORTED, VARIANTS

TOKENS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)
COUNTS = np.array([[0, 32, 64, 32, 32, 64, 0, 32], [32, 32, 32, 32, 0, 32, 64, 32]])

each_variant = pytest.mark.parametrize(
    ("family", "variant"),
    [(family, variant) for family, variants in VARIANTS.items() for variant in variants],
)
each_export = pytest.mark.parametrize(
    ("pruned", "name"),
    [
        (f, name)
        for f in EXPORTED
        for name in find_family(f).formats
        # Of 8 bits integers differ from those of 4 in their packing alone; floats have a file.
        # What is mixed of them is to the byte what it is of (tests/convert/test_mixed.py).
        if name != MIXED
        and (ExportFormat(name).bits != 8 or (name != FLOAT8 and f in ("qwen2_moe", "deepseek_v3")))
    ],
    indirect=["pruned"],
)
forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))


def test_every_stock_family_of_transformers_is_here():
    stock = {
        name
        for name, family in FAMILIES.items()
        if not (family.ragged or family.twin or family.wrapper)
    }
    assert stock == VARIANTS.keys() == EXPORTED.keys()


@pytest.mark.slow
@each_variant
def test_logits_equal_transformers(family, variant, tmp_path):
    model = tiny.tiny_model(family, **VARIANTS[family][variant])
    tokens, valid = tiny.tokens_and_mask()
    folder = tiny.save(model, tmp_path / "model")
    ours = np.asarray(forward(load_model(folder), tokens, valid))
    theirs = tiny.torch_logits(model, tokens, valid)
    assert np.abs(theirs[valid]).max() > 0.5  # else the tolerance would say nothing
    # float32 sums of some hundred terms in another order
    np.testing.assert_allclose(ours[valid], theirs[valid], atol=5e-5, rtol=1e-5)


@each_variant
def test_reading_and_writing_back_returns_every_byte_and_every_name(family, variant, tmp_path):
    model = tiny.half(tiny.tiny_model(family, **VARIANTS[family][variant]))
    folder = tiny.save(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    source = open_checkpoint(folder)
    written = dict(outer_tensors(source))
    for index in reversed(range(len(source))):
        written |= layer_tensors(source, source.layer(index), index)
    original = {}
    for shard in folder.glob("*.safetensors"):
        original |= load_file(shard)
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert written[name].dtype == value.dtype
        assert written[name].tobytes() == value.tobytes()


@each_variant
def test_old_and_new_spelling_of_a_config_are_the_same_model(family, variant):
    sizes = {**tiny.SIZES, **tiny.OWN_SIZES[family], **VARIANTS[family][variant]}
    new = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    rope = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            old[key] = rope.pop(key)
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    read = find_family(family).config_from_hf
    assert read(old) == read(new)


@each_variant
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_routing_weights_equal_those_of_transformers(family, variant, ties):
    """Twins among the experts tie exactly: either may be chosen, at the same weight."""
    model = tiny.tiny_model(family, **VARIANTS[family][variant])
    config = find_family(family).config_from_hf(model.config.to_dict())
    block = model.model.layers[config.moe_layers[0]].mlp
    gate = getattr(block, "gate", None) or block.router
    bias = getattr(gate, "e_score_correction_bias", None)
    half = config.moe.num_experts // 2
    with torch.no_grad():
        if ties:  # the second half of the experts, and of their groups, repeats the first
            gate.weight[half:] = gate.weight[:half]
            for constants in (bias, getattr(gate, "bias", None)):
                if constants is not None:
                    constants[half:] = constants[:half]
        scores, weight, expert = gate(torch.randn(64, config.d_model))
    ours = route(
        jnp.asarray(scores.numpy()),
        config.moe,
        None if bias is None else jnp.asarray(bias.numpy()),
    )
    found_weight, found = (np.asarray(part) for part in ours)
    twin = half if ties else 2 * half
    order, wanted_order = (
        np.lexsort((w, e % twin), axis=1)
        for w, e in ((found_weight, found), (weight.numpy(), expert.numpy()))
    )
    take = np.take_along_axis
    np.testing.assert_array_equal(
        take(found, order, 1) % twin, take(expert.numpy(), wanted_order, 1) % twin
    )
    np.testing.assert_allclose(
        take(found_weight, order, 1), take(weight.numpy(), wanted_order, 1), rtol=1e-5
    )
    assert all(len(set(row)) == len(row) for row in found.tolist())


@pytest.fixture(scope="module")
def pruned(request, tmp_path_factory):
    return plan_for(request.param, tmp_path_factory.mktemp("base") / request.param)


def plan_for(family: str, folder):
    """A tiny checkpoint with bfloat16 weights, a random plan, and its torch twin in float32."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 96}
    model = tiny.half(tiny.tiny_model(family, **(sizes | EXPORTED[family])))
    with torch.no_grad():  # a gain below one per layer, or rounding noise grows on its way
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    tiny.save(model, folder)
    # Loaded again, because .bfloat16() rounds the rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    keep = np.zeros((2, 8, 96), bool)
    for place in np.ndindex(2, 8):
        keep[place][rng.permutation(96)[: COUNTS[place]]] = True
    plan = PruningPlan(keep, base.config.moe_layers, {"model_hash": base.fingerprint})
    return base, plan, model.eval()


def masked_logits(reference, plan) -> np.ndarray:
    """The torch model with the removed channels zeroed."""
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    with torch.no_grad():
        for slot, layer in enumerate(plan.layer_indices):
            experts = reference.model.layers[layer].mlp.experts
            for e in range(8):
                channels = experts.down_proj[e]  # a channel is a column, but a row in gpt-oss
                channels = channels if channels.shape[0] == plan.keep.shape[2] else channels.T
                channels[~torch.from_numpy(plan.keep[slot, e])] = 0
        found = tiny.torch_logits(reference, TOKENS, np.ones(TOKENS.shape, bool))
        reference.load_state_dict(state)
    return found


def expert_weight(base, layer: int, expert: int, part: str) -> str:
    """Name on disk of an expert's "w_gate", "w_up" or "w_down"."""
    (rule,) = (r for r in base.about.family.rules if r.ours == f"mlp.experts.{part}")
    return rule.hf.format(layer=layer, expert=expert)


def fill_in_exact_experts(model, base, plain: dict[str, np.ndarray]) -> None:
    """transformers 5 rounds fused experts to bfloat16: check just that, then undo it."""
    for layer in base.config.moe_layers:
        experts = model.model.layers[layer].mlp.experts
        for name, parts in (("gate_up_proj", ("w_gate", "w_up")), ("down_proj", ("w_down",))):
            stacks = [
                np.concatenate([plain[expert_weight(base, layer, e, part)] for part in parts])
                for e in range(8)
            ]
            exact = torch.from_numpy(np.stack(stacks))
            fused = getattr(experts, name)
            assert torch.equal(fused.data.float(), exact.bfloat16().float()), name
            fused.data = exact


def unpack_float4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """An independent reader of MXFP4: sign, two bits of exponent, one of mantissa."""
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32).astype(int)
    exponent, mantissa = (nibbles >> 1) & 3, nibbles & 1
    magnitude = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    value = (1 - 2 * (nibbles >> 3)) * magnitude * 2.0 ** (scales.astype(float) - 127)[..., None]
    return value.reshape(*scales.shape[:-1], -1).astype(np.float32)


def check_float4(source, folder, layer: int, counts: list[int]) -> None:
    """What the folder stands for is the experts of the rounded model, and zero beyond."""
    stored = load_file(folder / "model.safetensors")
    experts, start = source.layer(layer).mlp.experts, 0
    stem = f"model.layers.{layer}.mlp.experts."
    both, down = (
        unpack_float4(stored[f"{stem}{part}_blocks"], stored[f"{stem}{part}_scales"])
        for part in ("gate_up_proj", "down_proj")
    )
    for e, count in enumerate(counts):
        rows = slice(start, start := start + count)
        found = {"w_gate": both[e, 0::2], "w_up": both[e, 1::2], "w_down": down[e].T}
        for part, value in found.items():
            np.testing.assert_array_equal(value[:count], np.asarray(getattr(experts, part)[rows]))
            assert not value[count:].any()


def unpack(folder) -> dict[str, np.ndarray]:
    """An independent reader of pack-quantized tensors: one code after the other."""
    plain = {}
    stored = load_file(folder / "model.safetensors")
    for name, value in stored.items():
        if not name.endswith("weight_packed"):
            plain[name] = value.astype(np.float32)
            continue
        stem = name.removesuffix("weight_packed")
        rows, columns = stored[stem + "weight_shape"]
        scale = stored[stem + "weight_scale"].astype(np.float32)
        codes = codes_in(value, rows, columns).astype(np.float32)
        plain[stem + "weight"] = codes * np.repeat(scale, columns // scale.shape[1], axis=1)
    return plain


def codes_in(words: np.ndarray, rows: int, columns: int) -> np.ndarray:
    bits = 32 * words.shape[1] // columns
    parts = [(words.view(np.uint32) >> i) & (2**bits - 1) for i in range(0, 32, bits)]
    return np.stack(parts, axis=-1).reshape(rows, columns).astype(int) - 2 ** (bits - 1)


def check_codes(folder, base, plan, *, shared_down_doubled: bool = False) -> None:
    """Every packed matrix holds the nearest multiples of its scales to the base model's own rows.

    The base is read from its file, channels are taken by the plan; no part of a quantiser is used.
    A shared expert behind a gate of one half has its down projection doubled.
    """
    stored = load_file(folder / "model.safetensors")
    original = load_file(base.about.folder / "model.safetensors")
    channels = {}  # name of an expert's matrix -> (its channels that stay, axis they lie along)
    for slot, layer in enumerate(plan.layer_indices):
        for e, keep in enumerate(plan.keep[slot]):
            for axis, part in enumerate(("w_gate", "w_down")):
                channels[expert_weight(base, layer, e, part)] = keep, axis
            channels[expert_weight(base, layer, e, "w_up")] = keep, 0
    stems = [key.removesuffix("_packed") for key in stored if key.endswith("weight_packed")]
    for stem in stems:
        name = stem if stem in original else stem.replace("shared_expert.", "shared_experts.")
        wanted = original[name].astype(np.float64)
        if shared_down_doubled and stem.endswith("shared_expert.down_proj.weight"):
            wanted *= 2
        if stem in channels:
            keep, axis = channels[stem]
            wanted = np.compress(keep, wanted, axis=axis)
        rows, columns = stored[stem + "_shape"]
        spare = (rows - wanted.shape[0], columns - wanted.shape[1])
        wanted = np.pad(wanted, [(0, size) for size in spare])  # to the one width of all
        words, scale = stored[stem + "_packed"], stored[stem + "_scale"]
        codes, half = codes_in(words, rows, columns), 2 ** (32 * words.shape[1] // columns - 1)
        size = columns // scale.shape[1]
        wide = np.repeat(scale.astype(np.float64), size, axis=1)
        nearest = np.clip(np.rint(wanted / wide), -half, half - 1)
        np.testing.assert_array_equal(codes, nearest, stem)
        # The largest of a group gets the least code, or clips to it: by no more than 40 %.
        largest = np.abs(wanted).reshape(rows, -1, size).max(axis=2)
        part = half * np.abs(scale.astype(np.float64)) / np.maximum(largest, half * 2.0**-14)
        assert 0.59 < part.min() and part.max() < 1.01, stem
    kinds = {stem.split(".layers.")[1].partition(".")[2] for stem in stems}
    parts = {re.sub(r"experts\.\d+", "experts", kind) for kind in kinds}
    assert len(parts) >= 6  # three of experts, and attention at least


@pytest.mark.slow
@each_export
def test_an_export_is_the_pruned_model_in_jax_and_in_stock_transformers(pruned, tmp_path, name):
    base, plan, reference = pruned
    form = ExportFormat(name, 32)
    counts = dict(zip(plan.layer_indices, plan.counts.tolist(), strict=True))
    widths = kept_widths(plan, base.about)
    folder = Export(base.about, widths, form).write(PrunedSource(base, plan), tmp_path / name)

    stored = load_file(folder / "model.safetensors")
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
    assert (
        written == Export(base.about, widths, form).nbytes > sum(v.nbytes for v in stored.values())
    )
    biases = [value.dtype for key, value in stored.items() if key.endswith("correction_bias")]
    assert biases == [np.float32] * (2 if base.config.moe.correction_bias else 0)
    config = json.loads((folder / "config.json").read_text())
    assert ("auto_map" in config) != form.is_padded
    ours = logits(open_checkpoint(folder, dtype=jnp.float32), TOKENS)
    if form.is_float4:
        source = QuantizedSource(PrunedSource(base, plan), 32, "mxfp4")
        check_float4(source, folder, plan.layer_indices[0], counts[plan.layer_indices[0]])
        wanted = logits(source, TOKENS)
    elif form.is_packed:
        source = QuantizedSource(PrunedSource(base, plan), 32, form.storage)
        first = plan.layer_indices[0]
        w_down = np.asarray(dequantize(source.layer(first).mlp.experts.w_down))
        plain = unpack(folder)
        wanted = np.concatenate(
            [plain[expert_weight(base, first, e, "w_down")][:, :n].T
             for e, n in enumerate(counts[first]) if n]
        )  # fmt: skip
        np.testing.assert_array_equal(w_down[: len(wanted)], wanted)
        wanted = logits(source, TOKENS)
        if base.about.family.model_type != "gpt_oss":  # whose base holds experts fused
            check_codes(folder, base, plan)
    else:
        wanted = masked_logits(reference, plan)
        found = logits(PrunedSource(base, plan), TOKENS)
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)

    exact = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    as_stored = exact if form.is_float4 else {}
    model, info = tiny.load_export(folder, trust=not form.is_padded, **as_stored)
    assert not any(info.values()), info
    if name in ("padded-int4", "padded-int8"):
        fill_in_exact_experts(model, base, plain)
    theirs = tiny.torch_logits(model, TOKENS, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(theirs, wanted, atol=1e-5, rtol=1e-5)
    if name in ("ragged-int4", "layered-int4"):  # vLLM builds on the bare model
        bare = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, attn_implementation="eager"
        )
        with torch.no_grad():
            hidden = bare.eval()(torch.from_numpy(TOKENS).long()).last_hidden_state
            found = model.lm_head(hidden).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    if not form.is_padded:
        prompt = torch.from_numpy(TOKENS[:1, :4]).long()
        new = model.generate(prompt, max_new_tokens=3, do_sample=False)
        assert new.shape == (1, 7)
