"""`eval --tasks` against the harness's own model of transformers, and what else it does."""

import contextlib
import json
import random
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

import pruning
from pruning.demo import DEMO
from pruning.demo.questions import write_questions
from pruning.kit.progress import Steps
from pruning.measure import answers, harness
from pruning.recipe.recipe import load_recipe
from pruning.runs.compared import task_plan
from pruning.runs.task import Task
from pruning.scores.statistics import load_statistics
from pruning.stages.job import open_job
from pruning.stages.judged import compared
from tests.support import tiny
from tests.support.command import read, refused, run
from tests.support.told import Told

TASKS = DEMO / "tasks"
QUIET = Steps(quiet=True)
BEGIN, END = "<s>", "</s>"


@pytest.fixture(scope="module", autouse=True)
def _documents_elsewhere(tmp_path_factory):
    """`datasets` keeps what it has read, as a rule below the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("documents"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that reads 256 bytes, whose tokenizer puts <s> before every text."""
    model = tiny.tiny_model(
        "qwen3_moe", vocab_size=258, max_position_embeddings=256, eos_token_id=257
    )
    folder = tiny.add_tokenizer(tiny.save(model, tmp_path_factory.mktemp("tasks") / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BEGIN, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def responses(samples) -> dict:
    """What a model answered, by task and document."""
    return {
        (task, sample["doc_id"]): [one for some in sample["resps"] for one in some]
        for task, found in samples.items()
        for sample in found
    }


def theirs(folder: Path, limit: int, **options) -> dict:
    """The same tasks by the harness's own model, in float32."""
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=32, **options)
    with contextlib.chdir(TASKS):
        tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
        loaded = tasks.load(["demo_next", "demo_sums", "demo_text"])
        return evaluate(model, loaded, limit=limit, bootstrap_iters=0)


def ours(folder: Path, output: Path, limit: int, *options) -> tuple[dict, dict]:
    """The results file and the samples that the command writes."""
    names = ("demo_next,demo_sums", "demo_text")
    assert run("--quiet", "eval", folder, "--tasks", *names, "--task-path", "demo",
               "--output", output, "--limit", limit, *options) == 0  # fmt: skip
    (results,) = output.glob("*/results_*.json")
    samples = {
        re.fullmatch(r"samples_(\w+)_[\dT:.-]+", path.stem)[1]: [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in output.glob("*/samples_*.jsonl")
    }
    return json.loads(results.read_text()), samples


@pytest.mark.parametrize("first", [True, False], ids=["with <s>", "without"])
def test_answers_and_measures_are_those_of_the_harness_own_model(folder, tmp_path, first):
    limit, how = (40, {}) if first else (5, {"add_bos_token": False})
    found, samples = ours(folder, tmp_path, limit, *([] if first else ["--no-first-tokens"]))
    expected = theirs(folder, limit, **how)
    one, two = responses(samples), responses(expected["samples"])
    assert one.keys() == two.keys()
    asked = 0
    for (task, document), given in two.items():
        asked += len(given)
        for mine, their in zip(one[task, document], given, strict=True):
            if task == "demo_sums":
                assert mine == their
                continue
            mine, their = (mine, their) if task == "demo_next" else ([mine], [their])
            assert float(mine[0]) == pytest.approx(their[0], abs=1e-4, rel=1e-6)
            assert [str(value) for value in mine[1:]] == [str(value) for value in their[1:]]
    assert asked >= 200 or not first
    assert len({str(one[key]) for key in one if key[0] == "demo_sums"}) > 1
    for task, values in expected["results"].items():
        for name, value in values.items():
            if "stderr" not in name and isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-6), name
    assert found["n-samples"] == expected["n-samples"] and found["configs"].keys() == set(samples)


# --- a small task for models that read 64 bytes ---

LETTERS = """\
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: below/letters.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
TEXT = ("doc_to_target: answer", 'doc_to_target: "{{context}}"')
COUNT = 60


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """A folder of tasks: which letter comes next?"""
    folder, draw = tmp_path_factory.mktemp("letters"), random.Random(0)
    (folder / "below").mkdir()
    (folder / "below" / "letters.yaml").write_text(LETTERS)
    with (folder / "below" / "letters.jsonl").open("w") as file:
        for _ in range(COUNT):
            word = "".join(draw.sample("abcdefghijklmnop", draw.randint(3, 12)))
            row = {"context": word, "choices": [*"xyz"], "answer": draw.randrange(3)}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many questions models are asked, call by call."""
    counts, ask = [], harness.answer

    def counting(source, questions, **options):
        counts.append(len(questions))
        return ask(source, questions, **options)

    monkeypatch.setattr(harness, "answer", counting)
    return counts


def test_a_comparison_asks_every_plan_what_the_harness_asks_it(
    models, texts, letters, tmp_path, asked
):
    out, text, names = tmp_path / "out", texts / "good.txt", ("unpruned", "uniform-act")
    command = ("--quiet", "compare", models / "single", "--calibration", text, "--evaluation", text,
               "--evaluation-tokens", 60, "--rules", "uniform-act", "--prune-rate", 0.5, "--bits",
               16, 4, "--block", 32, "--tasks", "letters", "--task-path", letters, "--output", out,
               "--batch", 4)  # fmt: skip
    assert run(*command) == 0
    found = json.loads((out / "compare.json").read_text())
    rows = {(one["rule"], one["bits"]): one["tasks"] for one in found["results"]}
    assert rows.keys() == {("uniform-act", 16), *((name, 4) for name in names)}
    assert asked == [3 * COUNT] * 4  # the dense model, too
    assert "What the models still answer" in (out / "compare.html").read_text()
    assert len((out / "compare-tasks.csv").read_text().splitlines()) == 4

    # The plan as a folder of transformers whose removed channels are zero, in 16 bits as ours.
    statistics, provenance = load_statistics(out / "statistics.safetensors")
    job = open_job(load_recipe(out / "recipe.yaml"))
    kept = next(one["kept"] for one in found["results"] if one["rule"] == "uniform-act")
    plan = task_plan(job, statistics, provenance, Task("uniform-act", 0.5), kept)
    dense, masked = (
        shutil.copytree(models / "single", tmp_path / name) for name in ("dense", "masked")
    )
    weights = load_file(dense / "model.safetensors")
    weights = {n: value.astype(bfloat16).astype(np.float32) for n, value in weights.items()}
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    for layer, experts in zip(plan.layer_indices, plan.keep, strict=True):
        for expert, keep in enumerate(experts):
            weights[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"][:, ~keep] = 0
    save_file(weights, masked / "model.safetensors", metadata={"format": "pt"})
    (one,) = rows["uniform-act", 16]
    for folder, said in ((dense, one["first"]), (masked, one["second"])):
        model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=32)
        with contextlib.chdir(letters):
            tasks = TaskManager(include_path=str(letters), include_defaults=False)
            expected = evaluate(model, tasks.load(["letters"]), bootstrap_iters=0)
        assert said == expected["results"]["letters"]["acc,none"]
    assert one["gained"] + one["lost"] > 0, "else a plan that is not used passes"

    # Nothing is asked twice; other documents are.
    before = (out / "compare.json").read_bytes()
    assert run(*command) == 0 and (out / "compare.json").read_bytes() == before
    assert asked == [3 * COUNT] * 4
    assert run(*command, "--limit", 9) == 0
    fewer = json.loads((out / "compare.json").read_text())
    assert {row["documents"] for result in fewer["results"] for row in result["tasks"]} == {9}
    assert not any(asked[4:]) and fewer["asked"]["limit"] == 9


def test_tasks_of_a_comparison_are_looked_up_before_anything_is_scored(
    models, texts, tmp_path, capsys
):
    command = ("compare", models / "single", *read(texts, tmp_path / "out"), "--evaluation",
               texts / "good.txt")  # fmt: skip
    said = refused(capsys, tmp_path, *command, "--tasks", "no_such_task", "--task-path", "demo")
    assert "knows no 'no_such_task'" in said
    said = refused(capsys, tmp_path, *command, "--limit", 3)
    assert "there is no task to measure; name one with --tasks" in said


def test_a_pruned_model_stands_beside_its_dense_one(scored, letters, tmp_path, capsys, asked):
    out = shutil.copytree(scored, tmp_path / "out")
    capsys.readouterr()
    said = tmp_path / "said.json"
    assert run("--quiet", "eval", out, "--tasks", "letters", "--task-path", letters,
               "--json", said) == 0  # fmt: skip
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    right = {}
    for name in ("dense", "ragged-bf16"):
        (path,) = out.glob(f"tasks/*{'single' if name == 'dense' else name}/samples_*.jsonl")
        right[name] = np.array([json.loads(line)["acc"] for line in path.read_text().splitlines()])
    assert asked == [3 * COUNT, 3 * COUNT]

    # An export by itself is of the same run, and was asked before.
    found = pruning.evaluate_tasks(
        out / "exports" / "ragged-bf16", ["letters"], task_path=letters, steps=QUIET
    )
    assert asked[2:] == [0, 0]
    assert found["results"]["dense"]["letters"]["acc,none"] == right["dense"].mean()
    (row,) = found["compared"]["ragged-bf16"]
    assert found["compared"] == json.loads(said.read_text())["compared"] == compared(out)
    change = right["ragged-bf16"] - right["dense"]
    gained, lost = (change > 0).sum(), (change < 0).sum()
    assert gained and lost, "else the test sees no flip"
    assert (row["documents"], row["gained"], row["lost"]) == (COUNT, gained, lost)
    assert row["difference"] == pytest.approx(change.mean())
    assert row["error"] == pytest.approx(scipy.stats.sem(change))
    assert row["p"] == pytest.approx(scipy.stats.binomtest(int(gained), gained + lost).pvalue)
    assert row["within_noise"] == (abs(row["difference"]) < 2 * row["error"])
    assert row["first_error"] == pytest.approx(scipy.stats.sem(right["dense"]))
    assert "|letters|" in shown and ("within noise" in shown) == row["within_noise"]
    assert f"{gained + lost} (+{gained} -{lost})" in shown


def test_plans_are_measured_by_masking_and_all_models_asked_alike(scored, letters, tmp_path):
    out = shutil.copytree(scored, tmp_path / "out")
    recipe, steps = (out / "recipe.yaml").read_text(), Told()
    assert "memory_limit: null" in recipe
    (out / "recipe.yaml").write_text(recipe.replace("memory_limit: null", "memory_limit: 8GB"))
    found = pruning.evaluate_tasks(
        out, ["letters"], [0, 0.5], task_path=letters, limit=10, fewshot=2, steps=steps
    )
    assert f"the memory limit in {out}/recipe.yaml does not hold for tasks" in steps.lines
    asked = [
        [json.loads(line)["arguments"] for line in path.read_text().splitlines()]
        for path in out.glob("tasks/*/samples_letters_*.jsonl")
    ]
    assert len(asked) == 3 and asked[0] == asked[1] == asked[2]
    assert all(one["gen_args_0"]["arg_0"].count("\n\n") == 2 for one in asked[0])
    same, other = found["compared"]["prune-rate 0.0"][0], found["compared"]["prune-rate 0.5"][0]
    assert same["gained"] == same["lost"] == 0 and same["within_noise"] and same["p"] == 1
    assert other["documents"] == 10 and other["shots"] == 2


def test_an_interrupted_run_goes_on_with_what_was_not_answered(
    models, letters, tmp_path, monkeypatch, asked
):
    command = ("--quiet", "eval", models / "single", "--tasks", "letters", "--task-path", letters,
               "--output", tmp_path / "out")  # fmt: skip
    monkeypatch.setattr(answers, "PASS_BYTES", 20 * 16 * 32 * 4)  # twenty rows of 16 tokens
    counting = harness.answer

    def killed(*arguments, **options):
        for number, found in enumerate(counting(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(harness, "answer", killed)
    assert run(*command) == 130
    (record,) = (tmp_path / "out" / "answers").glob("*.jsonl")
    with record.open("a") as file:
        file.write('{"question": "torn')
    kept = record.read_text().count("\n")
    assert kept == 3 * 40  # two passes: the three choices of a word are one row
    monkeypatch.setattr(harness, "answer", counting)
    assert run(*command) == 0
    assert asked == [3 * COUNT, 3 * COUNT - kept]
    assert run("--quiet", "eval", models / "single", "--tasks", "letters", "--task-path", letters,
               "--output", tmp_path / "anew") == 0  # fmt: skip
    one, two = (
        json.loads(next((tmp_path / name).glob("*/results_*.json")).read_text())["results"]
        for name in ("out", "anew")
    )
    assert one == two

    record.write_text("no JSON\n" + record.read_text())
    assert run(*command) == 2


def test_what_cannot_be_asked_is_said_before_any_work(
    models, letters, tmp_path, monkeypatch, capsys, texts
):
    command = ("eval", models / "single", "--task-path", letters)
    said = refused(capsys, tmp_path, *command, "--tasks", "letters", "--text", texts / "good.txt")
    assert "tasks and text are two measurements" in said
    said = refused(capsys, tmp_path, *command, "--tasks", "letters", "--memory-limit", "2GB")
    assert "leave --memory-limit out" in said
    said = refused(capsys, tmp_path, *command, "--tasks", "letters")
    assert "name a folder with --output" in said
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, tmp_path, "eval", "demo", "--tasks", "letters", "--task-path", letters)
    assert "demo is in no output folder of a run; name a folder with --output" in said
    said = refused(capsys, tmp_path, "eval", "./demo", "--tasks", "letters")
    assert "holds no export" in said
    command = (*command, "--output", tmp_path / "out", "--tasks")
    said = refused(capsys, tmp_path, *command, "letters", "--limit", 0)
    assert "limit=0 must be at least 1" in said
    said = refused(capsys, tmp_path, *command, "letters", "--window", 1)
    assert "window=1 must be at least 2" in said
    said = refused(capsys, tmp_path, *command, ",")
    assert "there is no task to measure; name one with --tasks" in said
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(capsys, tmp_path, *command, "letters")
    assert "pip install 'moe-jax[tasks]'" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("task: letters", "task: letterz"), "knows no 'letters' .*; did you mean letterz"),
        (("json\n", "nobody/letters\n"), "task letters cannot be loaded: .*HF_HUB_OFFLINE is set"
         ".*--task-path"),
        (("below/letters", "letters"), "task letters cannot be loaded: FileNotFoundError"),
        (("multiple_choice", "generate_until\ngeneration_kwargs: {do_sample: true}"),
         "task letters asks in generation_kwargs for do_sample"),
        (("multiple_choice", "generate_until\ngeneration_kwargs: {num_beams: 4}"),
         "task letters asks in generation_kwargs for num_beams"),
        (("multiple_choice", "generate_until\ngeneration_kwargs: {max_gen_toks: 64}"),
         "task letters asks for 64 new tokens and the window is 64"),
        (("multiple_choice", "loglikelihood_rolling"),
         "names neither a bos_token nor an eos_token"),
        (("multiple_choice", "multiple_choice\nunsafe_code: true"), "task letters runs code"),
    ],
)  # fmt: skip
def test_a_task_that_is_not_to_be_had_is_named_with_a_cure(
    models, letters, tmp_path, capsys, monkeypatch, change, message
):
    from pruning.measure import tasks

    # The harness's own 14,000 tasks take many seconds to list.
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, include_defaults=True: (
        TaskManager(include_path=include_path, include_defaults=False)
    ))  # fmt: skip
    own = shutil.copytree(letters, tmp_path / "tasks")
    (own / "below" / "letters.yaml").write_text(LETTERS.replace(*change).replace(*TEXT))
    said = refused(capsys, own, "--quiet", "eval", models / "single", "--tasks", "letters",
                   "--task-path", own, "--output", tmp_path / "out")  # fmt: skip
    assert re.search(message, said), said


def test_the_questions_in_the_package_are_those_that_its_script_writes(tmp_path):
    write_questions(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in TASKS.glob("*.jsonl")}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (TASKS / path.name).read_bytes()
