"""Every export format, loaded by stock transformers, against the pruned model in memory."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from convert.export import ExportFormat, export_bytes, export_checkpoint
from convert.formats import compressed_tensors
from moe_jax.quant import dequantize, quantize
from pruning.evaluate import logits
from pruning.plan import PruningPlan
from pruning.prune import PrunedSource
from pruning.quantized import QuantizedSource
from tests import tiny

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
FORMATS = ("ragged-bf16", "ragged-int4", "padded-bf16", "padded-int4")
TOKENS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)


def unpack(folder) -> dict[str, np.ndarray]:
    """An independent reader of pack-quantized tensors: one nibble after the other."""
    stored = load_file(folder / "model.safetensors")
    plain = {}
    for name, value in stored.items():
        if not name.endswith("weight_packed"):
            plain[name] = value.astype(np.float32)
            continue
        stem = name.removesuffix("weight_packed")
        rows, columns = stored[stem + "weight_shape"]
        scale = stored[stem + "weight_scale"].astype(np.float32)
        weight = np.zeros((rows, columns), np.float32)
        for i in range(rows):
            for j in range(columns):
                word = int(value[i, j // 8]) & 0xFFFFFFFF
                code = (word >> (4 * (j % 8)) & 15) - 8
                weight[i, j] = code * scale[i, j // (columns // scale.shape[1])]
        plain[stem + "weight"] = weight
    return plain


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe"])
def pruned(request, tmp_path_factory):
    """A tiny checkpoint with bfloat16 weights, a random plan, and its reference logits."""
    shared = {"shared_expert_intermediate_size": 64} if request.param == "qwen2_moe" else {}
    layers = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
    model = tiny.tiny_model(request.param, **SIZES, **shared, **layers).bfloat16()
    with torch.no_grad():  # a gain below one per layer, or rounding noise grows on its way
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    folder = tiny.save(model, tmp_path_factory.mktemp("base") / request.param)
    # Loaded again, because .bfloat16() rounds the rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    counts = np.array([[0, 32, 64, 32, 32, 64, 0, 32], [32, 32, 32, 32, 0, 32, 64, 32]])
    keep = np.zeros((2, 8, 64), bool)
    for place in np.ndindex(2, 8):
        keep[place][rng.permutation(64)[: counts[place]]] = True
    plan = PruningPlan(keep, (0, 2), {"model_hash": base.fingerprint})
    return base, plan, model.eval()


def masked_logits(reference, plan) -> np.ndarray:
    """The torch model with the removed channels zeroed."""
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    with torch.no_grad():
        for slot, layer in enumerate(plan.layer_indices):
            experts = reference.model.layers[layer].mlp.experts
            for e in range(8):
                experts.down_proj[e][:, ~torch.from_numpy(plan.keep[slot, e])] = 0
        found = tiny.torch_logits(reference, TOKENS, np.ones(TOKENS.shape, bool))
        reference.load_state_dict(state)
    return found


def fill_in_exact_experts(model, plain: dict[str, np.ndarray]) -> None:
    """transformers 5 rounds fused experts to bfloat16: check just that, then undo it."""
    for name, parameter in list(model.named_parameters()):
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith("experts"):
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        exact = torch.from_numpy(
            np.stack(
                [
                    np.concatenate([plain[f"{prefix}.{e}.{part}.weight"] for part in parts])
                    for e in range(8)
                ]
            )
        )
        assert torch.equal(parameter.data.float(), exact.bfloat16().float()), name
        parameter.data = exact


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_is_the_pruned_model_in_jax_and_in_stock_transformers(pruned, tmp_path, name):
    base, plan, reference = pruned
    form = ExportFormat(name, 32)
    widths = ((*plan.counts[0].tolist(),), (), (*plan.counts[1].tolist(),))
    folder = export_checkpoint(PrunedSource(base, plan), base, widths, tmp_path / name, form)

    written = sum(v.nbytes for v in load_file(folder / "model.safetensors").values())
    assert written == export_bytes(base, widths, form)
    config = json.loads((folder / "config.json").read_text())
    assert ("auto_map" in config) == form.is_ragged
    ours = logits(open_checkpoint(folder, dtype=jnp.float32), TOKENS)
    if form.is_packed:
        plain = unpack(folder)
        source = QuantizedSource(PrunedSource(base, plan), 32)
        expert = source.layer(0).mlp.experts
        first = np.concatenate(
            [plain[f"model.layers.0.mlp.experts.{e}.down_proj.weight"][:, :n].T
             for e, n in enumerate(plan.counts[0]) if n]
        )  # fmt: skip
        np.testing.assert_array_equal(np.asarray(dequantize(expert.w_down))[: len(first)], first)
        wanted = logits(source, TOKENS)
    else:
        wanted = masked_logits(reference, plan)
        found = logits(PrunedSource(base, plan), TOKENS)
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=form.is_ragged,
        output_loading_info=True,
        attn_implementation="eager",
    )
    assert not any(info.values()), info
    if name == "padded-int4":
        fill_in_exact_experts(model, unpack(folder))
    theirs = tiny.torch_logits(model.eval(), TOKENS, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(theirs, wanted, atol=1e-5, rtol=1e-5)
    if name == "ragged-int4":  # vLLM builds on the bare model
        bare = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, attn_implementation="eager"
        )
        with torch.no_grad():
            hidden = bare.eval()(torch.from_numpy(TOKENS).long()).last_hidden_state
            found = model.lm_head(hidden).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    if form.is_ragged:
        prompt = torch.from_numpy(TOKENS[:1, :4]).long()
        new = model.generate(prompt, max_new_tokens=3, do_sample=False)
        assert new.shape == (1, 7)


@settings(deadline=None)  # the first example compiles
@given(
    hnp.arrays(np.float32, (4, 64), elements=st.floats(-1e3, 1e3, width=32)),
    st.sampled_from([32, 64]),
)
def test_packed_words_hold_the_codes_of_the_jax_quantiser(weight, group_size):
    packed = compressed_tensors.quantize_linear(weight, group_size)
    ours = quantize(jnp.asarray(weight), group_size=group_size, axis=1, dtype=jnp.float32)
    np.testing.assert_array_equal(packed["weight_scale"].astype(np.float32), ours.scale)
    words = packed["weight_packed"].view(np.uint32)
    codes = [[int(words[i, j // 8]) >> (4 * (j % 8)) & 15 for j in range(64)] for i in range(4)]
    theirs = np.stack([np.asarray(ours.packed) & 15, np.asarray(ours.packed) >> 4], axis=-1)
    np.testing.assert_array_equal(codes, theirs.reshape(4, 64))


def test_a_width_that_no_group_fits_is_refused():
    with pytest.raises(ValueError, match=r"group_size=64 does not divide width 96; use.* 32"):
        compressed_tensors.check_group_size(64, [128, 96])


def test_routers_norms_embeddings_and_head_stay_16_bit():
    layer = "model.layers.0."
    quantised = ("self_attn.q_proj.weight", "mlp.experts.7.down_proj.weight",
                 "mlp.shared_expert.up_proj.weight", "mlp.gate_proj.weight")  # fmt: skip
    kept = ("mlp.gate.weight", "mlp.shared_expert_gate.weight", "self_attn.q_proj.bias",
            "self_attn.q_norm.weight", "input_layernorm.weight")  # fmt: skip
    assert all(compressed_tensors.is_quantized_linear(layer + name) for name in quantised)
    assert not any(compressed_tensors.is_quantized_linear(layer + name) for name in kept)
    assert not compressed_tensors.is_quantized_linear("lm_head.weight")
