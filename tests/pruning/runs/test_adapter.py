"""`recover --adapter`: the file, read as PEFT reads it, gives what our own export has merged."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.command import refused, run
from tests.support.tiny import add_tokenizer, save, tiny_model

HOW = ("--tokens", 448, "--batch", 2, "--learning-rate", 0.01, "--export", "padded-bf16")
LEARNS = ("--next-token", 1, "--epochs", 3)  # on text of which the dense model knows nothing
EXPERTS = ("gate_proj", "up_proj", "down_proj")
LAST_PART = re.compile(r"(\.lora_[AB])?\.weight$")


@pytest.fixture(scope="module")
def student(scored, tmp_path_factory) -> Path:
    """A run with the padded folder that adapters are for."""
    out = Path(shutil.copytree(scored, tmp_path_factory.mktemp("student") / "out"))
    assert run("export", out, "--export", "padded-bf16") == 0
    return out


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What PEFT 0.21 reads: LoraConfig, and the change of each module that it names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for module in {LAST_PART.sub("", name) for name in stored}:
        down, up = (stored[f"{module}.lora_{part}.weight"] for part in "AB")
        assert len(down) == up.shape[1] == config["r"]
        change = config["lora_alpha"] / config["r"] * up.astype(np.float64) @ down
        changes[module.removeprefix("base_model.model.")] = change
    return config, changes


@pytest.mark.slow
@pytest.mark.parametrize(
    "trained",
    [("--train", "lora", "--rank", 5, "--attention-rank", 3),
     ("--train", "router", "--router-rank", 2)],
    ids=["lora", "router"],
)  # fmt: skip
def test_merged_by_hand_it_is_our_merged_export(student, texts, tmp_path, trained):
    out = tmp_path / "out"
    text = ("--text", texts / "good.txt", "--output", out)
    assert run("recover", student, *text, *HOW, *LEARNS, "--adapter", *trained) == 0
    config, changes = read(out / "adapter")
    assert config["peft_type"] == "LORA" and not config["use_dora"]
    base = Path(config["base_model_name_or_path"])
    assert base == student / "exports/padded-bf16"
    before, merged = tensors(base), tensors(out / "exports/padded-bf16")
    assert before.keys() == merged.keys()
    learnt: set[str] = set()
    for name, one in merged.items():
        change, moved = changes.pop(name.removesuffix(".weight"), 0.0), one != before[name]
        wanted = before[name].astype(np.float64) + change
        gap = np.abs(one.astype(np.float64) - wanted)
        assert (gap <= np.abs(wanted) * float(ml_dtypes.finfo(one.dtype).eps) + 1e-7).all(), name
        assert moved.any() == np.any(change), name
        learnt |= {
            kind for kind in (*EXPERTS, "q_proj", "mlp.gate.") if kind in name and moved.any()
        }
    assert not changes  # nothing is for a tensor that is not there
    assert learnt == {"mlp.gate.", *((*EXPERTS, "q_proj") if "lora" in trained else ())}
    targets = config["target_modules"]
    kinds = {re.sub(r"\d+", "N", target) for target in targets}
    experts = {f"mlp.experts.N.{name}" for name in EXPERTS}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert kinds == {"mlp.gate"} | (experts | attention if "lora" in trained else set())


NOT_EXPRESSIBLE = {
    "dora": (("--train", "dora"), r"PEFT has no DoRA for experts .* choose --train lora"),
    "all weights": (
        (),
        r"train='full': it trains whole weights, which are no adapter; choose --train lo",
    ),
    "whole routers": (("--train", "router"), r"router_rank=0, which trains .* --router-rank 4"),
}


@pytest.mark.parametrize("case", NOT_EXPRESSIBLE)
def test_what_peft_cannot_express_is_refused_before_any_work(
    case, student, texts, tmp_path, capsys
):
    more, message = NOT_EXPRESSIBLE[case]
    text = ("--text", texts / "good.txt", "--output", tmp_path / "out")
    found = refused(capsys, tmp_path, "recover", student, *text, *HOW, "--adapter", *more)
    assert re.search(message, found), found


def test_the_folder_that_it_adapts_must_be_there_and_of_this_plan(scored, texts, tmp_path, capsys):
    run_folder = Path(shutil.copytree(scored, tmp_path / "run"))
    text = ("--text", texts / "good.txt", "--output", tmp_path / "out", "--train", "lora")
    found = refused(capsys, tmp_path, "recover", run_folder, *text, *HOW, "--adapter")
    assert re.search(r"exports/padded-bf16, which is not there; write it first: `moe-comp", found)
    assert run("export", run_folder, "--export", "padded-bf16") == 0
    assert run("plan", run_folder, "--prune-rate", 0.25) == 0
    found = refused(capsys, tmp_path, "recover", run_folder, *text, *HOW, "--adapter")
    assert "was made by an older plan" in found


def test_families_that_store_all_experts_in_one_tensor_are_refused(texts, tmp_path, capsys):
    add_tokenizer(save(tiny_model("gpt_oss", vocab_size=300), tmp_path / "model"))
    out = tmp_path / "run"
    how = ("--weights-only", "--prune-rate", 0.5, "--bits", 16, "--output", out)
    assert run("score", tmp_path / "model", *how) == 0 and run("plan", out) == 0
    text = ("--text", texts / "good.txt", "--output", tmp_path / "out", "--train", "lora")
    found = refused(capsys, tmp_path, "recover", out, *text, *HOW, "--adapter")
    assert "hold the experts of a layer in one tensor" in found
