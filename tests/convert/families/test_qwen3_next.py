"""Qwen3-Next beyond what all families share: tensors that draft tokens, statistics, 4 bits."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from convert import CheckpointError, find_family, load_model, open_checkpoint, portable_config
from convert.export import Export
from convert.export_format import MIXED, ExportFormat
from moe_jax.experts.moe import MoE
from moe_jax.quant import QTensor
from moe_jax.stream import forward_hidden
from pruning.budget.plan import PruningPlan
from pruning.scores.collect import collect_statistics
from pruning.scores.weight_gradient import weight_gradient_scores
from pruning.shrink.gptq_model import quantize_model, with_codes
from pruning.shrink.masked import masked_hidden
from pruning.shrink.prune import PrunedSource
from tests.convert.families.test_families import unpack
from tests.pruning.runs.test_estimate import QWEN, verdicts
from tests.support import tiny
from tests.support.command import change_config, given, run

SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 3, "vocab_size": 300,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
EXPERTS, CHANNELS = 8, 64
LINEAR = re.compile(r"\.linear_attn\.")
FOUR_OR_SIXTEEN = [
    n for n in find_family("qwen3_next").formats if ExportFormat(n).bits != 8 and n != MIXED
]


@pytest.fixture(scope="module")
def reference():
    return tiny.tiny_model("qwen3_next", **SIZES)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    return load_model(tiny.save(reference, tmp_path_factory.mktemp("plain") / "model"))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(4).integers(0, 300, (3, 12)).astype(np.int32)
    return tokens, np.arange(12)[None] < np.array([[12], [7], [10]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as published ones are: bfloat16, an interval, and tensors below `mtp`."""
    sizes = SIZES | {"layer_types": None, "num_hidden_layers": 4}
    folder = tmp_path_factory.mktemp("published") / "model"
    tiny.save(tiny.half(tiny.tiny_model("qwen3_next", **sizes)), folder)
    tensors = load_torch(folder / "model.safetensors")
    layer = "model.layers.3."
    tensors |= {
        name.replace(layer, "mtp.layers.0."): value.clone()
        for name, value in tensors.items()
        if name.startswith(layer)
    }
    tensors |= {"mtp.fc.weight": torch.ones(64, 128), "mtp.norm.weight": torch.ones(64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config | {"full_attention_interval": 4}))
    text = " ".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs." for i in range(200))
    (folder.parent / "good.txt").write_text(text)
    return tiny.add_tokenizer(folder)


# --- reading ---


def test_tensors_that_draft_tokens_are_left_out_and_named(folder):
    source = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    assert set(source.about.mtp) == {name for name in stored if name.startswith("mtp.")}
    assert len(source.about.mtp) > 2
    assert portable_config(source.about.hf_config)["num_nextn_predict_layers"] == 0
    assert source.config.linear_layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": ["linear_attention"] * 3},
            "has 3 entries, the model has 4 layers",
        ),
        ({"layer_types": ["sliding_attention"] * 4}, "must name 'linear_attention' or"),
        ({"linear_num_value_heads": 3}, "num_value_heads=3 must be a multiple of num_key_heads=2"),
        ({"full_attention_interval": 2}, r"layers\.1\.self_attn\.q_proj\.weight is missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).symlink_to(folder / name)
    text = (target / "config.json").read_text()
    (target / "config.json").unlink()
    (target / "config.json").write_text(text)
    change_config(target, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(target)


# --- statistics ---


@pytest.fixture(scope="module")
def statistics(model, batch):
    return collect_statistics(model, *batch, gradients=True, batch=3)


def test_forward_sums_equal_loops_over_what_torch_gives_its_experts(reference, batch, statistics):
    tokens, valid = batch
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out.double().numpy()))
        for layer in reference.model.layers
    ] + [
        layer.mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].double().numpy()))
        for layer in reference.model.layers
    ]
    tiny.torch_logits(reference, tokens, valid)
    for hook in hooks:
        hook.remove()
    for slot, layer in enumerate(reference.model.layers):
        x, out = seen[2 * slot], seen[2 * slot + 1]
        router, both, down = (
            value.detach().double().numpy()
            for value in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj,
                          layer.mlp.experts.down_proj)
        )  # fmt: skip
        expected = {name: np.zeros((EXPERTS, CHANNELS)) for name in ("hidden_square", "shapley")}
        expected |= {name: np.zeros(EXPERTS) for name in ("tokens", "gate_mass", "phi")}
        for place in zip(*np.nonzero(valid), strict=True):
            score = np.exp(router @ x[place])
            chosen = np.argsort(-score)[:2]
            weight = score[chosen] / score[chosen].sum()
            q = 1 / (out[place] @ out[place] + 1e-6)
            hidden = []
            for e in chosen:
                g, p = np.split(both[e] @ x[place], 2)
                hidden.append(g / (1 + np.exp(-g)) * p)
            y = sum(w * down[e] @ h for e, w, h in zip(chosen, weight, hidden, strict=True))
            for e, w, h in zip(chosen, weight, hidden, strict=True):
                expected["hidden_square"][e] += h**2
                expected["shapley"][e] += q * w * h * (y @ down[e])
                expected["tokens"][e] += 1
                expected["gate_mass"][e] += w
                expected["phi"][e] += q * w * (down[e] @ h) @ y
        for name, value in expected.items():
            found = getattr(statistics, name)[slot]
            atol = 5e-5 * np.abs(value).max()  # float32 against float64 loops
            np.testing.assert_allclose(found, value, rtol=5e-4, atol=atol, err_msg=name)


def test_gradient_scores_through_linear_attention_equal_those_of_torch(
    model, reference, batch, statistics
):
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
    loss = (nll * torch.from_numpy(valid[:, :-1] & valid[:, 1:]).flatten()).sum()
    reference.zero_grad()
    loss.backward()
    for slot, layer in enumerate(reference.model.layers):
        both, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        taylor = (down.grad * down).sum(dim=1).detach().numpy()
        atol = 2e-4 * np.abs(taylor).max()
        np.testing.assert_allclose(statistics.taylor[slot], taylor, rtol=1e-3, atol=atol)
        rows = (both.grad * both).abs().sum(dim=2).unflatten(1, (2, CHANNELS)).sum(dim=1)
        wanted = (rows + (down.grad * down).abs().sum(dim=1)).detach().numpy()
        atol = 2e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(found[slot], wanted, rtol=1e-3, atol=atol)
    reference.zero_grad()
    np.testing.assert_allclose(statistics.loss_sum, float(loss.detach()), rtol=1e-5)


# --- pruning and 4 bits ---


@pytest.fixture(scope="module")
def plan():
    """Emptied, full and ragged experts in whole groups."""
    rng = np.random.default_rng(5)
    keep = np.zeros((3, EXPERTS, CHANNELS), bool)
    for place in np.ndindex(3, EXPERTS):
        keep[place][rng.permutation(CHANNELS)[: 32 * rng.integers(0, 3)]] = True
    return PruningPlan(keep, (0, 1, 2))


def test_a_pruned_model_is_the_masked_one(model, plan, batch):
    tokens, valid = batch
    assert {0, 32, 64} == set(plan.counts.flat)
    pruned = forward_hidden(PrunedSource(model, plan, block=32), tokens, valid, batch=3)
    masked = masked_hidden(model, tokens, valid, [plan], batch=3)[0]
    np.testing.assert_allclose(pruned[valid], masked[valid], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def coded(plan, tmp_path_factory):
    """A bfloat16 checkpoint, its pruned form and the GPTQ codes of that."""
    path = tmp_path_factory.mktemp("coded")
    tiny.save(tiny.half(tiny.tiny_model("qwen3_next", **SIZES)), path / "base")
    base = open_checkpoint(path / "base", dtype=jnp.bfloat16)
    own = PruningPlan(plan.keep, (0, 1, 2), {"model_hash": base.fingerprint})
    pruned = PrunedSource(base, own)
    tokens = np.random.default_rng(0).integers(0, 300, (72, 48)).astype(np.int32)
    found = quantize_model(
        pruned, tokens, np.ones(tokens.shape, bool), path / "codes", group_size=32, provenance={}
    )
    return base, pruned, with_codes(pruned, path / "codes", 32), found


@pytest.mark.slow
def test_gptq_rounds_all_but_linear_attention(coded, plan):
    base, _, source, errors = coded
    for index, error in enumerate(errors):
        layer = source.layer(index)
        assert isinstance(layer.mlp, MoE) and isinstance(layer.mlp.experts.w_up, QTensor)
        attention = vars(layer.attention).values()
        linear = index in base.config.linear_layers
        assert sum(isinstance(value, QTensor) for value in attention) == (0 if linear else 4)
        experts = 3 * np.count_nonzero(plan.counts[index]) + 3
        assert error.matrices == experts + (0 if linear else 4)
        assert error.gptq < error.nearest


@pytest.mark.parametrize("name", FOUR_OR_SIXTEEN)
def test_untouched_tensors_are_exported_byte_for_byte(coded, plan, tmp_path, name):
    base, pruned, source, _ = coded
    form = ExportFormat(name, 32)
    widths = tuple(map(tuple, plan.counts.tolist()))
    model = source if form.is_packed else pruned
    folder = Export(base.about, widths, form).write(model, tmp_path / name)
    before = load_file(base.about.folder / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    rounded = re.compile(r"experts?\.(\d+\.)?(gate|up|down)_proj|self_attn\.[qkvo]_proj")
    same = {n for n in before if not (rounded.search(n) and (form.is_packed or ".experts." in n))}
    assert sum(bool(LINEAR.search(name)) for name in same) == 2 * 7
    for tensor in same:
        assert after[tensor].tobytes() == before[tensor].tobytes(), tensor
    if form.is_packed:
        config = json.loads((folder / "config.json").read_text())
        ignored = set(config["quantization_config"]["ignore"])
        stem = "model.layers.0.linear_attn."
        assert {stem + part for part in ("in_proj_qkvz", "in_proj_ba", "out_proj")} <= ignored
        packed = {key for key in after if key.endswith("_packed")}
        assert packed and not any(LINEAR.search(key) for key in packed)
        assert "model.layers.1.self_attn.q_proj.weight_packed" in packed
        assert unpack(folder)["model.layers.1.self_attn.q_proj.weight"].shape == (128, 64)


# --- the command, and who loads what it writes ---


@pytest.mark.slow
def test_the_command_says_what_it_leaves_out_and_its_folders_load_in_transformers(
    folder, tmp_path, capsys
):
    assert run("inspect", folder, "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    stored = load_file(folder / "model.safetensors")
    left_out = [name for name in stored if name.startswith("mtp.")]
    assert shown["family"] == "qwen3_next" and shown["mtp_tensors"] == len(left_out)
    counted = sum(value.size for name, value in stored.items() if name not in left_out)
    assert shown["parameters"] == counted
    out = tmp_path / "out"
    assert run("compress", folder, *given(folder.parent, out), "--prune-rate", 0.25) == 0
    assert f"{len(left_out)} tensors such as mtp." in capsys.readouterr().err
    checks = json.loads((out / "report.json").read_text())["verification"]
    assert checks and all(check["ok"] and check["done"] for check in checks)
    assert "logits in transformers" in {check["check"] for check in checks}
    for export in (out / "exports").iterdir():
        config = transformers.AutoConfig.from_pretrained(export, trust_remote_code=True)
        assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]


NEXT = QWEN | {
    "model_type": "qwen3_next", "num_hidden_layers": 4, "shared_expert_intermediate_size": 512,
    "num_attention_heads": 16, "num_key_value_heads": 2, "full_attention_interval": 4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "parallel", "vllm", "sglang", "llama"),
    [
        ({}, 1, "yes", "yes", "yes"),
        ({"linear_num_key_heads": 4}, 8, "no", "no", "yes"),
        ({"full_attention_interval": 2}, 1, "yes", "yes", "yes"),
        ({"layer_types": ["full_attention"] + ["linear_attention"] * 3}, 1, "yes", "no", "no"),
        ({"mlp_only_layers": [0]}, 1, "yes", "no", "no"),
        ({"linear_value_head_dim": 64}, 1, "yes", "yes", "no"),
        ({"attention_bias": True}, 1, "no", "no", "no"),
    ],
)
def test_clients_load_what_their_source_says(tmp_path, change, parallel, vllm, sglang, llama):
    found = verdicts(tmp_path, NEXT | change, "--tensor-parallel", parallel)
    said = {"vLLM": vllm, "SGLang": sglang, "llama.cpp": llama}
    assert said == {client: found["padded-bf16", client] for client in said}
    assert found["ragged-int4", "vLLM"] == found["layered-bf16", "vLLM"] == "no"
    for client in ("transformers 5", "transformers 4.57"):
        assert found["padded-int4", client] == "yes" and found["ragged-int4", client] == "slower"


def test_sglang_needs_the_interval_that_transformers_5_does_not_write(tmp_path):
    config = {key: value for key, value in NEXT.items() if key != "full_attention_interval"}
    found = verdicts(tmp_path, config)
    assert (found["padded-bf16", "SGLang"], found["padded-bf16", "vLLM"]) == ("no", "yes")


def test_a_config_with_the_defaults_left_out_is_that_of_transformers():
    bare = {key: value for key, value in NEXT.items() if key not in ("head_dim",)}
    whole = transformers.AutoConfig.for_model(**bare).to_dict()
    read = find_family("qwen3_next").config_from_hf
    assert read(bare) == read(whole)
