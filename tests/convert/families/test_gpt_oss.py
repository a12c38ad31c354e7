"""gpt-oss beyond what all families share: MXFP4, statistics with biases and bounds, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from convert import CheckpointError, find_family, layer_tensors, load_model, open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from moe_jax.attention.context import make_context
from moe_jax.norm import rms_norm
from moe_jax.stream import forward_hidden, layer_forward
from pruning.budget.plan import PruningPlan
from pruning.budget.whole_experts import replacement_vectors
from pruning.scores.ablation import Ablation, ablate
from pruning.scores.collect import collect_statistics
from pruning.scores.weight_gradient import weight_gradient_scores
from pruning.shrink.masked import masked_hidden
from pruning.shrink.prune import PrunedSource, mask_layer
from tests.convert.families.test_families import unpack_float4
from tests.support import tiny
from tests.support.command import given, refused, run
from tests.support.logits import logits

EXPERTS, CHANNELS = 8, 32
SIZES = {"intermediate_size": CHANNELS, "hidden_size": 32, "num_hidden_layers": 2}
TOKENS = tiny.tokens_and_mask()[0]
STEM = "model.layers.{}.mlp.experts.{}_proj"


@pytest.fixture(scope="module")
def reference():
    return tiny.tiny_model("gpt_oss", **SIZES)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    return load_model(tiny.save(reference, tmp_path_factory.mktemp("plain") / "model"))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(4).integers(0, 96, (3, 12)).astype(np.int32)
    return tokens, np.arange(12)[None] < np.array([[12], [7], [10]])


# --- MXFP4 ---


@pytest.fixture(scope="module")
def float4(tmp_path_factory):
    """A folder whose experts are random blocks and scales of any sort, as published ones are."""
    model = tiny.half(tiny.tiny_model("gpt_oss", **SIZES))
    folder = tiny.save(model, tmp_path_factory.mktemp("float4") / "model")
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for layer in range(2):
        for part, rows in (("gate_up", 2 * CHANNELS), ("down", 32)):
            del tensors[STEM.format(layer, part)]
            blocks = rng.integers(0, 256, (EXPERTS, rows, 1, 16)).astype(np.uint8)
            scales = rng.integers(118, 125, (EXPERTS, rows, 1)).astype(np.uint8)
            tensors[STEM.format(layer, part) + "_blocks"] = blocks
            tensors[STEM.format(layer, part) + "_scales"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                   "model.embed_tokens", "lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_blocks_of_four_bit_floats_are_read_exactly(float4):
    stored, source = load_file(float4 / "model.safetensors"), open_checkpoint(float4)
    for layer in range(2):
        read = dict(layer_tensors(source, source.layer(layer), layer))
        for part in ("gate_up", "down"):
            name = STEM.format(layer, part)
            wanted = unpack_float4(stored[name + "_blocks"], stored[name + "_scales"])
            found = read[name].astype(np.float32)
            np.testing.assert_array_equal(found, np.swapaxes(wanted, 1, 2))


def test_logits_of_a_four_bit_folder_equal_those_of_transformers(float4):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        float4,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    assert not any(info.values()), info
    theirs = tiny.torch_logits(model.eval(), TOKENS, np.ones(TOKENS.shape, bool))
    ours = logits(open_checkpoint(float4, dtype=jnp.float32), TOKENS)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-5)


def test_a_four_bit_folder_comes_out_as_it_went_in(float4, tmp_path):
    """Whole plan: other scales may be chosen, the values are the same, bit for bit."""
    base = open_checkpoint(float4, dtype=jnp.bfloat16)
    form = ExportFormat("padded-mxfp4")
    folder = Export(base.about, base.about.widths, form).write(base, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (float4, folder))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith("_blocks"):
            scales = name.removesuffix("blocks") + "scales"
            np.testing.assert_array_equal(
                unpack_float4(after[name], after[scales]), unpack_float4(value, before[scales])
            )
        elif not name.endswith("_scales"):
            assert after[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_scales": None}, r"gate_up_proj_blocks is uint8 .*expected"),
        ({"_blocks": None}, r"gate_up_proj_scales has no .*gate_up_proj_blocks"),
        ({"_blocks": lambda b: b[..., :8].copy()}, r"gate_up_proj_blocks is uint8 .*16\]"),
        ({"_scales": lambda s: s[:, :-1].copy()}, r"gate_up_proj_blocks is uint8"),
        ({"_bias": lambda b: b[:, :-1].copy()}, r"gate_up_proj_bias is bfloat16 \[8, 63\]"),
        ({"_scales": lambda s: np.full_like(s, 255)}, "holds NaN or infinity"),
    ],
)
def test_damaged_blocks_are_refused(float4, tmp_path, change, message):
    tensors = load_file(float4 / "model.safetensors")
    for suffix, how in change.items():
        name = STEM.format(1, "gate_up") + suffix
        value = tensors.pop(name)
        if how is not None:
            tensors[name] = how(value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((float4 / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path).layer(1)


def test_four_bit_floats_of_another_family_are_refused(tmp_path):
    folder = tiny.tiny_qwen3_moe(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config is mxfp4"):
        open_checkpoint(folder)


# --- statistics ---


@pytest.fixture(scope="module")
def statistics(model, batch):
    return collect_statistics(model, *batch, gradients=True, expert_details=True, batch=3)


def expert_inputs(model, tokens, valid):
    """Each layer, the normalised input of its experts, the block output: float64 [B, T, D]."""
    context = make_context(model.config.attention, model.config.max_position, jnp.asarray(valid))
    x = model.embedding(jnp.asarray(tokens), jnp.float32)

    @jax.jit
    def run(layer, x):
        middle = layer.attend(x, context)[0]
        return rms_norm(middle, layer.mlp_norm, layer.norm_eps), layer(x, context)

    for layer in model.layers:
        normed, x = run(layer, x)
        yield layer, np.asarray(normed, np.float64), np.asarray(x, np.float64)


def test_forward_sums_equal_a_loop_over_tokens_and_experts(model, reference, batch, statistics):
    """Weights from torch, the formulas from the paper, the activation from its definition."""
    bound = reachable = 0
    for slot, (_, x, out) in enumerate(expert_inputs(model, *batch)):
        block = reference.model.layers[slot].mlp
        gate_up, gate_up_bias, down, down_bias, router, router_bias = (
            value.detach().double().numpy()
            for value in (block.experts.gate_up_proj, block.experts.gate_up_proj_bias,
                          block.experts.down_proj, block.experts.down_proj_bias,
                          block.router.weight, block.router.bias)
        )  # fmt: skip
        wide = ("hidden_square", "up_square", "gate_square", "weighted_square", "energy", "shapley")
        expected = {name: np.zeros((EXPERTS, CHANNELS)) for name in wide}
        names = ("phi", "kappa", "tokens", "gate_mass", "output_norm", "output_square")
        expected |= {name: np.zeros(EXPERTS) for name in names}
        expected["output_sum"] = np.zeros((EXPERTS, 32))
        energy = 0.0
        for b, t in zip(*np.nonzero(batch[1]), strict=True):
            score = router @ x[b, t] + router_bias
            chosen = np.argsort(-score)[:2]
            weight = np.exp(score[chosen] - score[chosen].max())
            weight /= weight.sum()
            q = 1 / (out[b, t] @ out[b, t] + 1e-6)
            parts = []
            for e, w in zip(chosen, weight, strict=True):
                both = x[b, t] @ gate_up[e] + gate_up_bias[e]
                g, p = both[0::2], both[1::2]
                bound += int((g > 1.5).sum() + (np.abs(p) > 1.5).sum())
                reachable += 2 * CHANNELS
                cut = np.minimum(g, 1.5)
                h = (np.clip(p, -1.5, 1.5) + 1) * cut / (1 + np.exp(-1.702 * cut))
                parts.append((e, w, g, p, h, h @ down[e] + down_bias[e]))
            y = sum(w * z for _, w, *_, z in parts)
            energy += q * y @ y
            for e, w, g, p, h, z in parts:
                expected["hidden_square"][e] += h**2
                expected["up_square"][e] += p**2
                expected["gate_square"][e] += g**2
                expected["weighted_square"][e] += (w * h) ** 2
                expected["energy"][e] += q * (w * h) ** 2 * (down[e] ** 2).sum(axis=1)
                expected["shapley"][e] += q * w * h * (down[e] @ y)
                expected["phi"][e] += q * w * z @ y
                expected["kappa"][e] += q * w**2 * z @ z
                expected["tokens"][e] += 1
                expected["gate_mass"][e] += w
                expected["output_norm"][e] += np.sqrt(z @ z)
                expected["output_square"][e] += z @ z
                expected["output_sum"][e] += z
        for name, value in expected.items():
            found = getattr(statistics, name)[slot]
            # float32 forward against float64 loops
            tolerance = 2e-5 * np.abs(value).max()
            np.testing.assert_allclose(found, value, rtol=2e-4, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(statistics.layer_energy[slot], energy, rtol=1e-4)
        np.testing.assert_allclose(statistics.phi[slot].sum(), energy, rtol=1e-4)
    assert 0.02 < bound / reachable < 0.9  # the bounds act, and do not hide the rest


def test_gradient_scores_equal_those_of_torch(model, reference, batch, statistics):
    """The derivative along a multiplier of a channel is its down row times that row's gradient."""
    tokens, valid = batch
    found = weight_gradient_scores(model, tokens, valid, batch=3)
    out = reference(
        input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(valid).long()
    ).logits
    nll = torch.nn.functional.cross_entropy(
        out[:, :-1].flatten(0, 1),
        torch.from_numpy(tokens[:, 1:]).long().flatten(),
        reduction="none",
    )
    scored = torch.from_numpy(valid[:, :-1] & valid[:, 1:]).flatten()
    loss = (nll * scored).sum()
    reference.zero_grad()
    loss.backward()
    for slot, layer in enumerate(reference.model.layers):
        experts = layer.mlp.experts
        down, both = experts.down_proj, experts.gate_up_proj
        taylor = (down.grad * down).sum(dim=2).detach().numpy()
        np.testing.assert_allclose(
            statistics.taylor[slot], taylor, rtol=1e-3, atol=1e-4 * np.abs(taylor).max()
        )
        by_column = (both.grad * both).abs().sum(dim=1)
        whole = (down.grad * down).abs().sum(dim=2) + by_column[:, 0::2] + by_column[:, 1::2]
        wanted = whole.detach().numpy()
        np.testing.assert_allclose(found[slot], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    reference.zero_grad()
    np.testing.assert_allclose(statistics.loss_sum, float(loss.detach()), rtol=1e-5)


# --- pruning ---


@pytest.fixture(scope="module")
def plan():
    """Emptied, full and ragged experts."""
    keep = np.random.default_rng(5).random((2, EXPERTS, CHANNELS)) < 0.5
    keep[0, 1] = keep[1, 6] = False
    keep[0, 2] = True
    return PruningPlan(keep, (0, 1))


def test_a_pruned_model_is_the_masked_one_and_emptied_experts_keep_their_bias(
    model, reference, plan, batch
):
    tokens, valid = batch
    pruned = forward_hidden(PrunedSource(model, plan, block=8), tokens, valid, batch=3)
    masked = masked_hidden(model, tokens, valid, [plan], batch=3)[0]
    np.testing.assert_allclose(pruned[valid], masked[valid], rtol=1e-4, atol=1e-5)
    context = make_context(model.config.attention, 64, jnp.asarray(valid))
    x = model.embedding(jnp.asarray(tokens), jnp.float32)
    for index, layer in enumerate(model.layers):
        x = mask_layer(layer, plan.keep[index])(x, context)
    np.testing.assert_allclose(pruned[valid], np.asarray(x)[valid], rtol=1e-4, atol=1e-5)
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    with torch.no_grad():  # torch's biases stay where they are
        for index, layer in enumerate(reference.model.layers):
            layer.mlp.experts.down_proj[~torch.from_numpy(plan.keep[index])] = 0
    wanted = tiny.torch_logits(reference, tokens, valid)
    reference.load_state_dict(state)
    found = np.asarray(jax.jit(lambda x: model.head(x))(pruned))
    np.testing.assert_allclose(found[valid], wanted[valid], rtol=1e-4, atol=5e-5)


def test_a_constant_in_place_of_an_expert_is_its_whole_mean_output(model, plan, batch, statistics):
    """The mean output has the bias in it, so the bias itself must not come on top."""
    tokens, valid = batch
    gone = ~plan.keep.any(axis=2)
    keep = np.broadcast_to(~gone[:, :, None], plan.keep.shape).copy()
    counts = statistics.tokens
    constants = replacement_vectors(statistics.output_sum, counts, keep.sum(axis=2))
    whole = PruningPlan(keep, (0, 1), {}, constants)
    found = masked_hidden(model, tokens, valid, [whole], batch=3)[0]
    pruned = forward_hidden(PrunedSource(model, whole, block=8), tokens, valid, batch=3)
    np.testing.assert_allclose(pruned[valid], found[valid], rtol=1e-4, atol=1e-5)
    layers = []
    for slot, layer in enumerate(model.layers):
        bias = np.array(layer.mlp.experts.b_down)
        bias[gone[slot]] = constants[slot]
        layers.append(mask_layer(_with_bias(layer, bias), keep[slot]))
    context = make_context(model.config.attention, 64, jnp.asarray(valid))
    x = model.embedding(jnp.asarray(tokens), jnp.float32)
    for layer in layers:
        x = layer_forward(layer, x, context)
    np.testing.assert_allclose(found[valid], np.asarray(x)[valid], rtol=1e-4, atol=1e-5)


def _with_bias(layer, bias):
    experts = dataclasses.replace(layer.mlp.experts, b_down=jnp.asarray(bias, jnp.float32))
    return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))


def test_an_ablated_expert_is_silent_bias_and_all(model, reference, batch):
    tokens, valid = batch
    chosen = [Ablation(0, 3), Ablation(1, 2, channel=5)]
    _, losses = ablate(model, tokens, valid, chosen, batch=3)
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    for one, loss in zip(chosen, losses, strict=True):
        experts = reference.model.layers[one.layer].mlp.experts
        with torch.no_grad():
            if one.channel is None:
                experts.down_proj[one.expert] = 0
                experts.down_proj_bias[one.expert] = 0
            else:
                experts.down_proj[one.expert, one.channel] = 0
            out = torch.from_numpy(tiny.torch_logits(reference, tokens, valid))
        nll = -out.log_softmax(-1)[:, :-1].gather(2, torch.from_numpy(tokens[:, 1:, None]).long())
        scored = torch.from_numpy(valid[:, :-1] & valid[:, 1:])
        np.testing.assert_allclose(loss, float(nll[..., 0][scored].sum()), rtol=1e-5)
        reference.load_state_dict(state)


# --- formats ---


@pytest.mark.parametrize("name", ["padded-int4", "ragged-int4"])
def test_formats_that_no_program_reads_are_refused(float4, tmp_path, name):
    base = open_checkpoint(float4, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=rf"'{name}' does not exist for gpt_oss.*padded-mxfp4"):
        Export(base.about, base.about.widths, ExportFormat(name)).write(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_families_have_no_four_bit_floats(tmp_path):
    base = open_checkpoint(tiny.tiny_qwen3_moe(tmp_path / "model"), dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="'padded-mxfp4' does not exist for qwen3_moe"):
        Export(base.about, base.about.widths, ExportFormat("padded-mxfp4")).write(
            base, tmp_path / "out"
        )


def test_incomplete_blocks_are_refused(float4, tmp_path):
    base = open_checkpoint(float4, dtype=jnp.bfloat16)
    widths = ((32,) * 7 + (16,),) * 2
    with pytest.raises(ValueError, match="blocks of 32, which do not divide the expert width 16"):
        Export(base.about, widths, ExportFormat("padded-mxfp4")).write(base, tmp_path / "out")
    with pytest.raises(ValueError, match="group_size=64 must be 32 for padded-mxfp4"):
        ExportFormat("padded-mxfp4", 64)


def test_a_config_without_rope_is_refused():
    config = transformers.AutoConfig.for_model("gpt_oss").to_dict()
    del config["rope_parameters"]
    with pytest.raises(ValueError, match="lacks rope_parameters"):
        find_family("gpt_oss").config_from_hf(config)


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64}
    folder = tmp_path_factory.mktemp("command") / "model"
    tiny.save(tiny.half(tiny.tiny_model("gpt_oss", **sizes)), folder)
    text = " ".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs." for i in range(200))
    (folder.parent / "good.txt").write_text(text)
    return tiny.add_tokenizer(folder)


@pytest.mark.slow
def test_the_command_compresses_to_four_bit_floats_by_default(folder, tmp_path, capsys):
    assert run("inspect", folder, "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["family"] == "gpt_oss" and shown["routed_expert_parameters"] == 2 * 8 * 3 * 64 * 64
    stored = load_file(folder / "model.safetensors").values()
    assert shown["parameters"] == sum(value.size for value in stored)
    out = tmp_path / "out"
    assert run("compress", folder, *given(folder.parent, out), "--prune-rate", 0.25) == 0
    assert [path.name for path in (out / "exports").iterdir()] == ["padded-mxfp4"]
    checks = json.loads((out / "report.json").read_text())["verification"]
    assert checks and all(check["ok"] and check["done"] for check in checks)
    assert "logits in transformers" in {check["check"] for check in checks}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--export", "ragged-int4"], "'ragged-int4' does not exist for this model's family"),
        (["--quantizer", "gptq"], "quantizer='gptq' chooses integers"),
        (["--group-size", "64"], "group_size=64 contradicts export='padded-mxfp4'"),
        (["--export", "padded-mxfp4", "--bits", "16"], "bits=16 contradicts"),
        (["--block", "8"], "block=8 must be a multiple of group_size=32"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    folder, tmp_path, capsys, options, message
):
    shown = refused(
        capsys, tmp_path, "compress", folder, *given(folder.parent, tmp_path / "out"), *options
    )
    assert message in shown
