"""The README.md of an exported folder: what it says is what the files say, and its lines run."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.stages.export import export
from tests.support import tiny
from tests.support.command import run

RAGGED, PADDED = "ragged-bf16", "padded-bf16"


def card_of(folder: Path) -> tuple[dict, str]:
    """Front matter and text of a card."""
    before, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), text


def row(text: str, name: str) -> list[str]:
    """The cells behind the one table row that starts with a name."""
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.M)
    return found.split(" | ")


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def exported(scored: Path, model: Path, out: Path, form: str) -> Path:
    """The plan of `scored`, exported from another folder with the same weights."""
    shutil.copytree(scored, out)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model": str(model)}))
    assert run("--quiet", "export", out, "--export", form, "--overwrite") == 0
    return out / "exports" / form


def test_hashes_tokens_and_sizes_are_those_of_the_files(scored, models, texts):
    folder = scored / "exports" / RAGGED
    front, text = card_of(folder)
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["moe", "pruned", "bf16", "moe-jax"]
    assert "base_model" not in front and "license" not in front  # nobody said so
    statistics = json.loads((scored / "statistics.json").read_text())
    provenance = json.loads((scored / "plan.json").read_text())["provenance"]
    assert provenance["model_hash"] == statistics["model_hash"]
    hashes = re.findall(r"`([0-9a-f]{64})`", text)
    files = (scored / "plan.safetensors", texts / "good.txt")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert hashes == [statistics["model_hash"], *digests]
    (source,) = statistics["sources"]
    documents, tokens, _ = row(text, "good.txt")
    assert (number(documents), number(tokens)) == (source["documents"], source["tokens"])
    assert f"{statistics['tokens']:,} tokens were scored" in text
    stored = [load_file(at / "model.safetensors") for at in (models / "single", folder)]
    weights = [sum(value.size for value in tensors.values()) for tensors in stored]
    size = [(at / "model.safetensors").stat().st_size for at in (models / "single", folder)]
    assert [number(cell) for cell in row(text, "parameters")] == weights
    assert [number(cell) for cell in row(text, "bytes of weight files")] == size
    bits = [f"{8 * size[i] / weights[i]:.2f}" for i in range(2)]
    assert row(text, "bits per parameter") == bits
    assert "Nothing was measured" in text and "perplexity" not in text


def test_the_recipe_on_the_card_makes_the_same_plan(scored, tmp_path):
    """The stored recipe says 0.25, but the plan was made at one half."""
    out = shutil.copytree(scored, tmp_path / "out")
    _, text = card_of(out / "exports" / RAGGED)
    (block,) = blocks(text, "yaml")
    said, recipe = yaml.safe_load(block), yaml.safe_load((out / "recipe.yaml").read_text())
    assert said["calibration"] == ["good.txt"] and said["model"] == "single"
    files = {name: recipe[name] for name in ("model", "calibration", "output")}
    (out / "recipe.yaml").write_text(yaml.safe_dump(said | files))
    shutil.copy(out / "plan.safetensors", tmp_path / "before")
    (out / "plan.safetensors").unlink()
    assert run("--quiet", "plan", out) == 0
    assert (out / "plan.safetensors").read_bytes() == (tmp_path / "before").read_bytes()


@pytest.mark.parametrize(
    ("card", "inherited"),
    [
        ("---\r\nlicense: other\r\nlicense_name: mine\r\nlanguage: [en, no]\r\n"
         "tags: [chat]\r\n---\r\n# M\r\n",
         {"license": "other", "license_name": "mine", "language": ["en", "no"]}),
        ("# M\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
    ],
)  # fmt: skip
def test_the_card_of_the_base_is_kept_and_its_licence_goes_on(
    scored, models, tmp_path, card, inherited
):
    model = shutil.copytree(models / "single", tmp_path / "model")
    (model / "README.md").write_bytes(card.encode())
    folder = exported(scored, model, tmp_path / "out", RAGGED)
    assert (folder / "BASE_README.md").read_bytes() == card.encode()
    front, text = card_of(folder)
    keys = ("license", "license_name", "license_link", "language")
    assert {key: front[key] for key in keys if key in front} == inherited
    assert front["tags"][0] == "moe" and "(BASE_README.md)" in text


def test_a_folder_of_the_hubs_cache_is_named_by_its_repository(scored, models, tmp_path):
    model = tmp_path / "models--Some--Model--7B" / "snapshots" / "c0ffee"
    shutil.copytree(models / "single", model)
    front, text = card_of(exported(scored, model, tmp_path / "out", PADDED))
    assert front["base_model"] == "Some/Model--7B" and "base_model_relation" not in front
    assert row(text, "revision") == ["`c0ffee`"]


@pytest.fixture(scope="module")
def padded(scored, models, tmp_path_factory) -> Path:
    """The same plan, whose experts differ in width, padded to one."""
    return exported(scored, models / "single", tmp_path_factory.mktemp("padded") / "out", PADDED)


def test_padding_is_told_apart_from_parameters(scored, padded):
    (_, ragged), (_, text) = card_of(scored / "exports" / RAGGED), card_of(padded)
    assert row(text, "parameters") == row(ragged, "parameters")
    stored = sum(value.size for value in load_file(padded / "model.safetensors").values())
    assert f"The folder stores {stored:,} parameters" in text
    assert "The folder stores" not in ragged


@pytest.mark.slow
def test_the_lines_for_transformers_run_in_a_padded_and_in_a_ragged_folder(
    scored, padded, tmp_path
):
    folders = (padded, scored / "exports" / RAGGED)
    snippets = [blocks(card_of(folder)[1], "python") for folder in folders]
    assert [len(found) for found in snippets] == [1, 1]
    # One process for both: importing torch takes longer than all else.
    program = "import os\n" + "".join(
        f"os.chdir({str(folder)!r})\n{code}assert len(tokens[0]) > 40\n"
        f"print(type(model).__name__)\n"
        for folder, (code,) in zip(folders, snippets, strict=True)
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Once upon a time") == 2
    names = re.findall(r"^\w+ForCausalLM$", found.stdout, re.M)
    assert names == ["Qwen2MoeForCausalLM", "RaggedQwen2MoeForCausalLM"]


def test_only_programs_that_load_a_folder_get_lines(scored, padded):
    titles = [re.findall(r"^### (.*)$", card_of(folder)[1], re.M)
              for folder in (padded, scored / "exports" / RAGGED)]  # fmt: skip
    rest = ["moe-jax", "Recipe", "Calibration text"]
    assert titles[0] == ["transformers", "vLLM", "SGLang", "llama.cpp", *rest]
    assert titles[1] == ["transformers", "vLLM", *rest]
    lines = "".join(blocks(card_of(scored / "exports" / RAGGED)[1], "sh"))
    assert "vllm serve . --trust-remote-code --enforce-eager" in lines


@pytest.mark.parametrize(
    ("family", "form", "line"),
    [
        ("deepseek_v3", "layered-bf16", "VLLM_MLA_DISABLE=1 vllm serve . --trust-remote-code"),
        ("deepseek_v3", "padded-bf16", "vllm serve ."),
        ("olmoe", "layered-bf16", "vllm serve . --trust-remote-code"),
        ("qwen3_next", "layered-bf16", None),
        ("qwen3_next", "padded-bf16",
         "python LLAMA_CPP/convert_hf_to_gguf.py . --outfile model.gguf --no-mtp"),
    ],
)  # fmt: skip
def test_the_lines_for_other_programs_have_the_options_that_these_need(
    tmp_path, family, form, line
):
    """Without which the programs refused such folders in `tests/clients`."""
    linear = {"linear_value_head_dim": 8, "full_attention_interval": 2}
    sizes = linear if family == "qwen3_next" else {"hidden_size": 64}
    file = tiny.save(tiny.tiny_model(family, **sizes), tmp_path / "model") / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"topk_method": "noaux_tc"}))
    base = open_checkpoint(tmp_path / "model", dtype=jnp.bfloat16)
    plan = PruningPlan(np.ones((2, 8, 16), bool), (0, 1))
    folder = export(base, plan, ExportFormat(form), tmp_path / "out", Steps(quiet=True))
    lines = "".join(blocks(card_of(folder)[1], "sh")).splitlines()
    assert (line in lines) if line else not any("vllm" in found for found in lines)


def test_a_plan_that_says_nothing_of_itself_gets_a_card_that_invents_nothing(tmp_path):
    """Of gpt-oss, whose channels have biases as well; nothing is pruned."""
    model = tiny.half(tiny.tiny_model("gpt_oss", hidden_size=64, intermediate_size=64))
    base = open_checkpoint(tiny.save(model, tmp_path / "model"), dtype=jnp.bfloat16)
    for name, kept in (("whole", 64), ("half", 32)):
        plan = PruningPlan(np.tile(np.arange(64) < kept, (2, 8, 1)), (0, 1))
        folder = export(base, plan, ExportFormat(PADDED), tmp_path / name, Steps(quiet=True))
        front, text = card_of(folder)
        assert ("pruned" in front["tags"]) == (kept == 32)
        assert ("not pruned, bf16" in text) == (kept == 64)
        stored = sum(value.size for value in load_file(folder / "model.safetensors").values())
        assert number(row(text, "parameters")[1]) == stored
        assert "does not say what it was scored on" in text and "AutoTokenizer" not in text
        assert set(yaml.safe_load(blocks(text, "yaml")[0])) == {
            "model", "prune_rate", "export", "bits",
        }  # fmt: skip
