"""`eval --tasks` against the harness's own model of transformers, and what else it does."""

import contextlib
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, processors

import pruning
from pruning.demo import DEMO
from pruning.demo.questions import write_questions
from pruning.kit.progress import Steps
from pruning.measure import answers, harness
from tests.support import tiny
from tests.support.command import change_config, refused, run

TASKS = DEMO / "tasks"
QUIET = Steps(quiet=True)
BEGIN, END = "<s>", "</s>"


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
    assert run("--quiet", "eval", folder, "--tasks", "demo_next,demo_sums", "demo_text",
               "--task-path", "demo", "--output", output, "--limit", limit, *options) == 0  # fmt: skip
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
    for (task, document), answers_ in two.items():
        asked += len(answers_)
        for mine, their in zip(one[task, document], answers_, strict=True):
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
