"""The demo through the command line, as a user runs it, and what its output must hold."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.cli import main
from pruning.demo import DEMO
from pruning.kit.progress import Steps
from pruning.recipe.recipe import load_recipe
from pruning.runs.compress import random_plan
from pruning.scores.statistics import load_statistics
from pruning.stages import plan as planning
from pruning.stages.export import export
from pruning.stages.job import open_job
from pruning.stages.sizes import folder_bytes

TEXTS = sorted(str(path) for path in (DEMO / "text").glob("evaluation-*.txt"))
CALIBRATION = str(DEMO / "text" / "calibration.jsonl")
# Choice and repair have their own tests.
SMALL = ["--max-tokens", "16384", "--batch", "4", "--planner", "fair", "--repair", "none"]


def run(*arguments: str) -> int:
    return main(["--quiet", *map(str, arguments)])


def held_out(folder: Path, characters: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "held-out.txt"
    path.write_text("\n".join(Path(name).read_text()[:characters] for name in TEXTS))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A short held-out text, so that evaluation is quick; no verdict hangs on it."""
    return held_out(tmp_path_factory.mktemp("text"), 1000)


@pytest.fixture(scope="module")
def output(tmp_path_factory, text) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    formats = ["ragged-int4", "ragged-bf16"]
    code = run("compress", "demo", "--output", out, "--evaluation", text, "--export", *formats,
               *SMALL)  # fmt: skip
    assert code == 0
    return out


@pytest.mark.slow
def test_the_output_folder_keeps_its_contract(output):
    names = {path.name for path in output.iterdir()}
    assert {"recipe.yaml", "model.json", "statistics.safetensors", "statistics.json", "plan.json",
            "plan.safetensors", "exports", "report.json",
            "report.html"} == names  # fmt: skip
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert recipe["prune_rate"] == 0.25 and recipe["group_size"] == 32
    keep = load_file(output / "plan.safetensors")
    assert set(keep) == {f"keep.{layer}" for layer in range(4)}
    assert all(mask.shape == (16, 128) and mask.dtype == bool for mask in keep.values())
    assert sum(mask.sum() for mask in keep.values()) == 0.75 * 4 * 16 * 128


def test_the_exported_tensors_are_the_kept_channels_of_the_source(output):
    source = load_file(DEMO / "model" / "model.safetensors")
    stored = load_file(output / "exports" / "ragged-bf16" / "model.safetensors")
    keep = load_file(output / "plan.safetensors")
    for layer in range(4):
        for expert in range(16):
            index = np.flatnonzero(keep[f"keep.{layer}"][expert])
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            if not len(index):
                assert not any(name.startswith(prefix) for name in stored)
                continue
            for name in ("gate_proj", "up_proj"):
                expected = source[f"{prefix}{name}.weight"][index]
                np.testing.assert_array_equal(stored[f"{prefix}{name}.weight"], expected)
            expected = source[f"{prefix}down_proj.weight"][:, index]
            np.testing.assert_array_equal(stored[f"{prefix}down_proj.weight"], expected)
    for name in set(source) - {name for name in source if ".experts." in name}:
        np.testing.assert_array_equal(stored[name], source[name])


def test_the_report_says_what_is_on_disk_and_every_check_holds(output):
    report = json.loads((output / "report.json").read_text())
    for name in ("ragged-int4", "ragged-bf16"):
        size = sum(f.stat().st_size for f in (output / "exports" / name).glob("*.safetensors"))
        assert report["sizes"]["exports"][name]["bytes"] == size
        assert size < report["sizes"]["source_bytes"]
    assert all(check["ok"] and check["done"] for check in report["verification"])
    # four figures of the plan, and how the kept set settled over the parts of the text
    assert (output / "report.html").read_text().count("data:image/png") == 7
    assert (output / "report.html").stat().st_size < 2e6
    routers = report["calibration"]
    np.testing.assert_allclose(np.sum(routers["usage"], axis=1), np.ones(4))
    assert all(0 < entropy < np.log(16) for entropy in routers["router_entropy"])
    checks = {(check["export"], check["check"]) for check in report["verification"]}
    assert ("ragged-int4", "logits in transformers") in checks
    card = (output / "exports" / "ragged-bf16" / "README.md").read_text()
    rows = {
        name: [f"| {check['check']} | ok | {check['detail']} |" for check in report["verification"]
               if check["export"] == name]
        for name in ("ragged-bf16", "ragged-int4")
    }  # fmt: skip
    assert len(rows["ragged-bf16"]) == 6 and all(row in card for row in rows["ragged-bf16"])
    assert not all(row in card for row in rows["ragged-int4"])
    (quality,) = report["quality"].values()
    assert quality["dense"]["nll"] < quality["pruned"]["nll"]
    assert quality["ragged-int4"]["kl"] > 0
    # 16-bit weights on disk are those in memory
    assert quality["ragged-bf16"]["nll"] == pytest.approx(quality["pruned"]["nll"], abs=1e-4)


def test_the_report_knows_what_pruning_and_rounding_do_alone(output, tmp_path):
    """By the bytes of folders that do one of the two."""
    alone = json.loads((output / "report.json").read_text())["alone"]
    pruned = folder_bytes(output / "exports" / "ragged-bf16")
    base = open_checkpoint(DEMO / "model", dtype=jnp.bfloat16)
    whole = PruningPlan(np.ones((4, 16, 128), bool), (0, 1, 2, 3))
    rounded = export(
        base, whole, ExportFormat("ragged-int4"), tmp_path / "whole", Steps(quiet=True)
    )
    assert alone == {
        "ragged-int4": {"pruned_bytes": pruned, "rounded_bytes": folder_bytes(rounded)},
        "ragged-bf16": {"pruned_bytes": pruned, "rounded_bytes": None},
    }


def test_random_channels_are_measured_on_the_same_text_at_the_same_size(output):
    report = json.loads((output / "report.json").read_text())
    ((text, quality),) = report["quality"].items()
    random = report["random"]
    assert random["kept"] == report["sizes"]["channels_kept"] and random["seed"] == 0
    assert random["quality"][text]["tokens"] == quality["pruned"]["tokens"]
    assert random["quality"][text]["nll"] > quality["dense"]["nll"]
    assert random["quality"][text]["nll"] != quality["pruned"]["nll"]
    assert "evaluate random channels" in [stage["name"] for stage in report["stages"]]
    assert report["not_run"] == {}


def test_every_text_has_a_sample_and_the_first_is_the_one_that_was_always_there(output):
    report = json.loads((output / "report.json").read_text())
    (sample,) = report["samples"]
    assert sample["text"] == "held-out" and sample["export"] == "ragged-int4"
    assert sample["prompt"] and sample["dense"] and sample["compressed"]
    assert report["sample"] == {key: sample[key] for key in report["sample"]}


def test_the_page_says_how_to_load_and_how_to_repeat(output, text):
    report = json.loads((output / "report.json").read_text())
    assert report["command"] == (
        f"moe-compress compress demo --output {output} --evaluation {text} --max-tokens 16384 "
        "--batch 4 --planner fair --export ragged-int4 ragged-bf16 --repair none"
    )
    page = (output / "report.html").read_text()
    assert report["command"] in page
    for name in ("ragged-int4", "ragged-bf16"):
        card = (output / "exports" / name / "README.md").read_text()
        clients = report["loading"][name]["clients"]
        for client, (verdict, rule) in clients.items():
            said = {"slower": "yes, slowly"}.get(verdict, verdict)
            assert f"| {client} | {said} | {rule} |" in card and rule in page
    assert "vllm serve . --trust-remote-code --enforce-eager" in page


@pytest.mark.parametrize(
    ("width", "more"),
    [("free", {}), ("capped", {"cap": 48}), ("layer", {}), ("uniform", {}), ("experts", {}),
     ("combined", {"expert_rate": 0.25}), ("free", {"layer_rate": ("0=0.25",)})],
)  # fmt: skip
def test_random_channels_obey_the_width_policy_and_choose_by_nothing(scored, width, more):
    recipe = load_recipe(scored / "recipe.yaml", width=width, prune_rate=0.5, **more)
    job = open_job(recipe)
    statistics, notes = load_statistics(scored / "statistics.safetensors")
    plan = planning.plan(job.recipe, statistics, notes, job.base)
    found = random_plan(job, statistics, plan)
    assert found.keep.sum() == plan.keep.sum() and (found.keep != plan.keep).any()
    counts, size = found.counts, found.keep.shape[2]
    if width in ("experts", "combined"):
        np.testing.assert_array_equal(np.sort(counts), np.sort(plan.counts))
        assert (found.counts != plan.counts).any()
    if width in ("layer", "uniform"):
        assert (counts == counts[:, :1]).all()
    if width == "capped":
        assert counts.max() <= 48
    if "layer_rate" in more:
        assert counts[0].sum() == 0.75 * 8 * size
    score = np.asarray(statistics.shapley)
    if width != "experts":  # of channels, rather than of experts
        kept = [np.mean([score[i][keep[i]].mean() for i in range(2)])
                for keep in (plan.keep, found.keep)]  # fmt: skip
        assert kept[1] < kept[0]
    np.testing.assert_array_equal(random_plan(job, statistics, plan).keep, found.keep)


def test_a_plan_that_removes_nothing_is_not_compared_with_chance(scored):
    job = open_job(load_recipe(scored / "recipe.yaml"))
    statistics, _ = load_statistics(scored / "statistics.safetensors")
    whole = PruningPlan(np.ones(statistics.shape, bool), (0, 1))
    with pytest.raises(ValueError, match="nothing was removed"):
        random_plan(job, statistics, whole)


def test_the_model_card_of_an_export_says_what_was_measured_of_it(output):
    report = json.loads((output / "report.json").read_text())
    ((text, quality),) = report["quality"].items()
    for name in ("ragged-int4", "ragged-bf16"):
        folder = output / "exports" / name
        _, front, card = (folder / "README.md").read_text().split("---\n", 2)
        front = yaml.safe_load(front)
        assert front["license"] == "apache-2.0" and name.partition("-")[2] in front["tags"]
        base = (DEMO / "model" / "README.md").read_bytes()
        assert (folder / "BASE_README.md").read_bytes() == base
        rows = [line.strip("| ").split(" | ") for line in card.splitlines()
                if line.startswith(f"| {text} | ")]  # fmt: skip
        assert [cells[1] for cells in rows] == ["dense", "pruned", name]
        for cells in rows:
            found = quality[cells[1]]
            assert cells[2:4] == [f"{found['perplexity']:.3f}", f"{found['nll']:.4f}"]
            if found["kl"] is not None:
                assert cells[4:6] == [f"{found['kl']:.4f}", f"{100 * found['top1']:.1f}%"]
            assert cells[6] == f"{found['tokens']:,}"
        size = report["sizes"]["exports"][name]
        assert f" | {size['bytes']:,} |" in card and f" | {size['parameters']:,} |" in card
        assert "Nothing was measured" not in card


def test_a_second_run_into_the_same_folder_is_refused(output, text, capsys):
    assert run("compress", "demo", "--output", output, "--evaluation", text) == 2
    assert "already exists" in capsys.readouterr().err


def test_stages_read_what_the_stage_before_wrote(output, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("score", "demo", "--output", out, *SMALL) == 0
    # A sweep writes a folder per rate that the later stages take like any other.
    assert run("plan", out, "--prune-rate", "0.25", "0.5") == 0
    assert run("export", out / "plans" / "0.5", "--export", "ragged-bf16") == 0
    stored = load_file(out / "plans" / "0.5" / "exports" / "ragged-bf16" / "model.safetensors")
    widths = [v.shape[0] for n, v in stored.items() if ".experts." in n and "gate_proj" in n]
    assert sum(widths) == 0.5 * 4 * 16 * 128
    assert run("plan", out, "--prune-rate", "0.25") == 0
    assert run("export", out, "--export", "padded-bf16") == 0
    assert run("verify", out) == 0
    capsys.readouterr()
    # The plan of a ragged run has widths of its own; the statistics equal those of compress.
    ours, theirs = (load_file(folder / "statistics.safetensors") for folder in (out, output))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    json_path = tmp_path / "quality.json"
    folder = out / "exports" / "padded-bf16"
    assert run("eval", folder, "--text", text, "--json", json_path) == 0
    found = json.loads(json_path.read_text())
    assert found["window"] == 256 and found["stride"] == 128
    (quality,) = found["texts"].values()
    report = json.loads((output / "report.json").read_text())
    (expected,) = report["quality"].values()
    assert quality["nll"] == pytest.approx(expected["pruned"]["nll"], abs=1e-4)
    assert run("report", output) == 0
    assert "ragged-int4" in capsys.readouterr().out


@pytest.mark.slow
def test_pruning_what_matters_least_costs_clearly_less_than_pruning_at_random(output, tmp_path):
    """Held-out loss at 25 %: the default rule against random channels, three seeds."""
    losses = {}
    text = ("--text", held_out(tmp_path, 4000), "--stride", "255")  # windows next to each other
    out = shutil.copytree(output, tmp_path / "out")
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    default = (recipe["criterion"], recipe["planner"], 0)
    variants = [default, *(("random", "uniform", seed) for seed in range(3))]
    for criterion, planner, seed in variants:
        changed = recipe | {"criterion": criterion, "planner": planner, "seed": seed}
        (out / "recipe.yaml").write_text(yaml.safe_dump(changed))
        json_path = tmp_path / "sweep.json"
        code = run("eval", out, "--prune-rate", "0.25", *text, "--json", json_path)
        assert code == 0
        rows = json.loads(json_path.read_text())["texts"]
        dense, pruned = (next(iter(rows[name].values()))["nll"] for name in rows)
        losses[criterion, seed] = pruned - dense
    ours = losses.pop((default[0], 0))
    assert 0 < ours < 0.75 * min(losses.values()), (ours, losses)


def test_inspect_counts_parameters_from_headers(capsys):
    assert run("inspect", "demo", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    source = load_file(DEMO / "model" / "model.safetensors")
    assert found["parameters"] == sum(value.size for value in source.values())
    assert found["family"] == "qwen3_moe" and found["experts_per_layer"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune-rate", "1.0"], r"prune_rate=1.0 must lie in \[0, 1\)"),
        (["--group-size", "128", "--block", "96"], "block=96 must be a multiple of group_size=128"),
        (["--criterion", "acts"], "did you mean 'act'"),
        (["--calibration", "missing.txt"], "missing.txt does not exist"),
        (["--block", "3", "--bits", "16"], "block=3"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, capsys, arguments, message):
    import re

    out = tmp_path / "out"
    assert run("compress", "demo", "--output", out, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (out / "statistics.safetensors").exists()


def test_help_of_every_command_teaches_with_an_example(capsys):
    for command in (
        "compress", "inspect", "score", "plan", "export", "apply", "verify", "eval", "report",
        "estimate", "audit", "compare", "completion",
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=r"^0$"):
            main([command, "--help"])
        assert f"moe-compress {command}" in capsys.readouterr().out.split("example:")[1]
