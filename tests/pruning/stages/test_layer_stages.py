"""The stages that go layer by layer: when they run, with what, and what they say. Nothing runs."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.spread import ALONE
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe
from pruning.shrink.gptq_errors import LayerErrors
from pruning.shrink.repair_choice import RepairedLayer
from pruning.shrink.repair_model import repaired_in
from pruning.stages import gptq, repair
from tests.support.told import Told

LAYERS = 3
PLAN = PruningPlan(np.array([[[True, False]]]), (0,))
SOURCES = [{"path": "/a/b.txt", "sha256": "ab", "tokens": 9}]


class Base:
    """As much of a model as the stages read."""

    fingerprint = "abc"
    about = SimpleNamespace(native=None)

    def __len__(self):
        return LAYERS


def job_of(out: Path, windows: int = 5, native: object = None, **options) -> Any:
    recipe = CompressionRecipe(model="m", output=str(out), window=4, batch=2, dtype="bfloat16",
                               **{"export": ("ragged-int4",), "bits": 4, **options})  # fmt: skip
    base = Base()
    base.about = SimpleNamespace(native=native)
    tokens = np.arange(windows * 4).reshape(windows, 4)
    text = SimpleNamespace(tokens=tokens, valid=tokens > 0, total=17, sources=SOURCES)
    return SimpleNamespace(
        recipe=recipe, base=base, calibration=text, dtype="the dtype", spread=ALONE
    )


@pytest.fixture
def made(monkeypatch) -> list[dict]:
    """What was asked of GPTQ and of the repair, which write nothing but their folder."""
    asked: list[dict] = []

    def run(kind, source, *given, on_layer, **options):
        asked.append({"kind": kind, "source": source, "given": given, **options})
        for index in range(LAYERS):
            on_layer(index)

    def quantize_model(source, tokens, valid, folder, **options):
        run("gptq", source, tokens, valid, folder, **options)
        found = [LayerErrors(0.5, 0.1, 7, 1), LayerErrors(0.3, 0.1, 9, 0)]
        closed(gptq.codes_in(folder), options["provenance"], map(dataclasses.asdict, found))
        return found

    def repair_model(source, plan, tokens, valid, folder, **options):
        run("repair", source, plan, tokens, valid, folder, **options)
        closed(repaired_in(folder), options["provenance"], map(dataclasses.asdict, REPAIRED))

    def closed(files, provenance, layers):
        layers = list(layers)
        files.open(provenance)
        for index in range(len(layers)):
            files.add(index, {"x": np.zeros(1)}, provenance, layers, ([np.zeros(1)],))
        files.close(provenance, layers)

    monkeypatch.setattr(gptq, "quantize_model", quantize_model)
    monkeypatch.setattr(gptq, "repaired_source", lambda *given: given)
    monkeypatch.setattr(repair, "repair_model", repair_model)
    return asked


REPAIRED = [
    RepairedLayer(0, "layer", 6, 5, 1, {"none": 3.0, "expert": 2.0, "layer": 1.0}),
    RepairedLayer(1, "expert", 7, 3, 0, {"none": 3.0, "expert": 2.0, "layer": 4.0}),
    RepairedLayer(2, "none", 8, 0, 2, {"none": 3.0}),
    RepairedLayer(3, "none", 0, 0, 0, {}),  # has no experts
]
BARS = [(number, LAYERS) for number in (1, 2, 3)]


def test_codes_are_chosen_once_for_a_plan_and_a_repair(tmp_path, made):
    job, steps = job_of(tmp_path, quantizer="gptq", group_size=64), Told()
    folder = gptq.quantize(job, PLAN, steps)
    assert folder == tmp_path / "gptq" and steps.bars == {"gptq": BARS}
    assert steps.lines == [
        "gptq: 0.25 x the output error of rounding to nearest on held-out text; "
        "1 of 16 matrices had too little text and were rounded to nearest"
    ]
    (asked,) = made
    assert asked["source"] == (job.base, PLAN, None)
    tokens, valid, place = asked["given"]
    assert tokens is job.calibration.tokens and valid is job.calibration.valid and place == folder
    assert (asked["group_size"], asked["batch"], asked["dtype"]) == (64, 2, "the dtype")
    assert asked["provenance"] == {
        "model_hash": "abc", "plan": PLAN.content_hash, "window": 4, "batch": 2, "tokens": 17,
        "dtype": "bfloat16", "sources": [{"sha256": "ab", "tokens": 9}], "group_size": 64,
        "repair": None,
    }  # fmt: skip
    assert gptq.quantize(job, PLAN, steps) == folder and len(made) == 1  # found
    place = tmp_path / "repair"
    place.mkdir()
    (place / repair.repaired_in(place).summary).write_text("{}")
    assert gptq.quantize(job, PLAN, steps, place) == folder and len(made) == 2
    assert made[1]["source"][2] == place and made[1]["provenance"]["repair"] is not None
    assert "are of another plan, repair or text; they are made again" in steps.lines[1]


@pytest.mark.parametrize(
    "options", [{"quantizer": "rtn"}, {"quantizer": "gptq", "export": ("ragged-bf16",), "bits": 16}]
)
def test_without_codes_to_choose_nothing_is_begun(tmp_path, made, options):
    assert gptq.quantize(job_of(tmp_path, **options), PLAN, Told()) is None and not made


def test_a_summary_of_layers_without_any_error_divides_by_nothing():
    line = gptq.summary_line([LayerErrors(0.0, 0.0, 4, 4)])
    assert line.startswith("gptq: 0.00 x ") and "4 of 4 matrices" in line
    assert gptq.summary_line([]).startswith("gptq: 0.00 x ")


@pytest.mark.parametrize("mode", ["expert", "layer"])
def test_a_plan_is_repaired_once(tmp_path, made, mode):
    job, steps = job_of(tmp_path, repair=mode), Told()
    folder = repair.repair(job, PLAN, steps)
    assert folder == tmp_path / "repair" and steps.bars == {"repair": BARS}
    whole = "1 of 3 layers as a whole, " if mode == "layer" else ""
    assert steps.lines == [
        f"repaired on 17 tokens: {whole}8 of 21 experts changed, 3 starved of text"
    ]
    (asked,) = made
    assert asked["source"] is job.base
    plan, tokens, valid, place = asked["given"]
    assert (plan, place) == (PLAN, folder)
    assert tokens is job.calibration.tokens and valid is job.calibration.valid
    assert (asked["mode"], asked["batch"], asked["dtype"]) == (mode, 2, "the dtype")
    assert asked["provenance"]["mode"] == mode and asked["provenance"]["plan"] == PLAN.content_hash
    assert repair.repair(job, PLAN, steps) == folder and len(made) == 1
    assert repair.repair_facts(folder) == {
        "mode": mode, "tokens": 17, "experts": 21, "changed": 8, "starved": 3, "layers": 3,
        "expert": 1, "layer": 1,
    }  # fmt: skip
    assert repair.stored_repair(job.recipe, PLAN) == folder
    other = PruningPlan(~PLAN.keep, (0,))
    assert repair.stored_repair(job.recipe, other) is None
    assert repair.repair_facts(None) == repair.repair_facts(tmp_path / "none") == {}


def test_what_needs_no_repair_or_has_too_little_text_is_left(tmp_path, made):
    steps = Told()
    assert repair.repair(job_of(tmp_path, repair="none"), PLAN, steps) is None
    whole = PruningPlan(np.ones((1, 1, 2), bool), (0,))
    assert repair.repair(job_of(tmp_path, repair="layer"), whole, steps) is None
    assert not steps.lines and not made
    assert repair.repair(job_of(tmp_path, 2, repair="layer"), PLAN, steps) is None
    assert steps.lines == ["not repaired: that takes 3 windows of calibration text, there are 2; "
                           "give more text or a shorter --window"]  # fmt: skip
    assert not made
    assert repair.repair(job_of(tmp_path, 3, repair="layer"), PLAN, steps) is not None


@pytest.mark.parametrize(("native", "requantize", "said"), [
    (None, False, False), ("int4", False, True), ("int4", True, False), (None, True, False),
])  # fmt: skip
def test_that_a_models_own_codes_keep_it_from_a_repair_is_said(
    tmp_path, made, native, requantize, said
):
    steps = Told()
    job = job_of(tmp_path, repair="none", native=native, requantize=requantize)
    assert repair.repair(job, PLAN, steps) is None and not made
    assert [line.startswith("not repaired: the model's 4-bit codes") for line in steps.lines] == (
        [True] if said else []
    )
