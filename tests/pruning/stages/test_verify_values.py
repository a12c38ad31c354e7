"""Which checks an export gets from what its parts find: no model and no program runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convert.export_format import ExportFormat
from convert.reader import CheckpointError
from moe_jax.errors import InputError
from pruning.stages import verify
from pruning.stages.checks import Check
from pruning.stages.client import Answer
from pruning.stages.probe_windows import PROBE_TOKENS, ProbeWindows
from pruning.stages.verify import verify_export, written_form
from tests.support.threads import together

PROBE = (
    ProbeWindows(np.zeros((10, PROBE_TOKENS), np.int32)),
    ProbeWindows(np.zeros((10, PROBE_TOKENS), np.int32), 7),
    ProbeWindows(np.zeros((2, 2 * PROBE_TOKENS), np.int32)),
)
PLAN: Any = SimpleNamespace(content_hash="p")
FINE = "code, config.json, tokenizer and all else that programs read: as planned; and more"
WHERE = ["", " at positions far apart", " at the ends of long windows"]


def values(windows, wrong: bool = False) -> np.ndarray:
    shape = (len(windows.tokens), PROBE_TOKENS, 3)
    return np.full(shape, 0.5 * wrong, np.float32)


class Stored(tuple):
    """A folder that was opened."""

    read_ahead = True


class World:
    """What the parts of `verify` find, to be changed by a test, and what they were asked."""

    def __init__(self, name: str):
        family = SimpleNamespace(name="family")
        about = SimpleNamespace(family=family, hf_config={}, outer=None, beside={}, folder="base")
        self.base: Any = SimpleNamespace(about=about, family=family)
        self.form = ExportFormat(name)
        self.export: Any = SimpleNamespace(
            form=self.form, base=about, mtp_specs={}, stored_name=lambda name: name,
            outer_arrays=lambda source: [("outer", source)], mtp_arrays=lambda mtp: [("mtp", mtp)],
            by_group=True,
            layer_arrays=lambda layer, index: [(f"layer {index}", layer)],
        )  # fmt: skip
        self.files: list[str] = []
        self.tokenizer: tuple | None = None
        self.names = frozenset(["a", "b"])
        self.wrong: dict[str, str] = {}  # tensor -> problem
        self.headers: CheckpointError | None = None
        self.stored_wrong: tuple[int, ...] = ()  # windows whose logits differ in JAX
        self.unread: InputError | None = None
        self.lost = ""
        self.answer = Answer([values(some) for some in PROBE], {})
        self.compared: list = []
        self.made: list = []
        self.read: list = []
        self.asked: list = []
        self.shared: list[int] = []

    def check(self, **given) -> list[Check]:
        arguments: Any = {"codes": None, "repair": None, **given}
        return verify_export(self.base, PLAN, self.form, "the folder", PROBE, **arguments)


@pytest.fixture
def world(monkeypatch):
    def make(name: str = "ragged-bf16") -> World:
        w = World(name)

        class Comparison:
            def __init__(self, target, export, *, with_codes):
                if w.headers:
                    raise w.headers
                assert (target, export) == ("the folder", w.export)
                self.names, w.with_codes = w.names, with_codes

            def add(self, arrays):
                w.compared += arrays

            def share(self, spread):
                w.shared.append(spread.process)

            def problems_of(self, names):
                return [w.wrong[name] for name in sorted(names) if name in w.wrong]

            def words(self, names):
                return f"{len(names)} equal"

        def pruned_source(base, plan, form, codes, repair=None):
            w.made.append((codes, repair))
            return "pruned"

        def mapped(source, change, by_group):
            assert source in ("pruned", "the model")
            return [change(index, f"weights {index}") for index in range(2)]

        def settled_logits(source, tokens, last, strides, spread):
            assert last == PROBE_TOKENS
            stored = isinstance(source, tuple)
            w.read.append((source, len(tokens), strides))
            found = []
            for some, stride in zip(tokens, strides, strict=True):
                number = next(i for i, each in enumerate(PROBE) if each.tokens is some)
                assert PROBE[number].stride == stride
                wrong = stored and number in w.stored_wrong
                found.append((values(PROBE[number], wrong), np.ones(some[:, -last:].shape, bool)))
            return found

        def open_checkpoint(folder, dtype):
            if w.unread:
                raise w.unread
            return Stored(("stored", folder, dtype.__name__))

        def client_answer(target, export, probe):
            w.asked.append((target, export, probe))
            return w.answer

        patched = {
            "export_of": lambda about, plan, form: w.export,
            "file_problems": lambda target, export: w.files,
            "not_copied": lambda folder: "; and more",
            "tokenizer_result": lambda target, export, trusted: w.tokenizer and (
                *w.tokenizer[:1], f"{w.tokenizer[1]} {trusted}", *w.tokenizer[2:]),
            "repair_hash": lambda repair: f"hash of {repair}",
            "codes_in": lambda folder: SimpleNamespace(
                fault=lambda **said: w.lost if said == {"plan": "p", "repair": None} else "other"),
            "pruned_source": pruned_source, "TensorComparison": Comparison,
            "mtp_source": lambda base: "mtp source", "mapped": mapped,
            "widened_layer": lambda layer: f"wide {layer}", "settled_logits": settled_logits,
            "open_checkpoint": open_checkpoint, "client_answer": client_answer,
            "mtp_prefixes": lambda family, config: ["mtp."],
            "bfloat16_experts": lambda source: (*source, "narrow"),
        }  # fmt: skip
        for name_, value in patched.items():
            monkeypatch.setattr(verify, name_, value)
        return w

    return make


def short(checks: list[Check]) -> dict[str, str]:
    """Check -> fine, wrong or undone."""
    assert len({check.check for check in checks}) == len(checks)
    word = lambda c: "fine" if c.ok and c.done else "undone" if c.ok else "wrong"  # noqa: E731
    return {check.check: word(check) for check in checks}


def details(checks: list[Check]) -> dict[str, str]:
    return {check.check: check.detail for check in checks}


IN_JAX = [f"logits in JAX{where}" for where in WHERE[:2]]
IN_TRANSFORMERS = [f"logits in transformers{where}" for where in WHERE]
LOADS = "transformers loads every tensor"


def test_an_export_as_planned_has_all_checks_fine_and_every_tensor_compared(world):
    w = world()
    checks = w.check()
    assert short(checks) == dict.fromkeys(["files", "tensors", *IN_JAX, LOADS, *IN_TRANSFORMERS],
                                          "fine")  # fmt: skip
    assert all(check.export == "ragged-bf16" for check in checks)
    said = details(checks)
    assert (said["files"], said["tensors"]) == (FINE, "2 equal")
    assert said[LOADS] == "none missing, unexpected or mismatched"
    assert w.compared == [("outer", "pruned"), ("mtp", "mtp source"), ("layer 0", "weights 0"),
                          ("layer 1", "weights 1")]  # fmt: skip
    # What transformers shows of long windows is not asked of the folder in JAX.
    assert w.read == [(["wide weights 0", "wide weights 1"], 3, [1, 7, 1]),
                      (("stored", "the folder", "float32"), 2, [1, 7])]  # fmt: skip
    assert w.asked == [("the folder", w.export, PROBE)] and w.made == [(None, None)]
    assert w.with_codes


def test_all_processes_have_the_checks_and_process_0_asks_and_compares_what_is_no_layer(
    world, monkeypatch
):
    alone = world("padded-int4")
    monkeypatch.setattr(verify, "version", lambda name: "5.1")
    expected, own = alone.check(), [*alone.compared]
    w = world("padded-int4")
    assert together(monkeypatch, 2, lambda spread: w.check(spread=spread)) == [expected] * 2
    assert len(w.asked) == 1 and sorted(w.shared) == [0, 1]
    # Both have all layers here: who makes which one, `settled_logits` decides.
    assert sorted(w.compared) == sorted([*own, *own[2:]])
    assert len(w.read) == 2 * len(alone.read) == 6
    w.lost, w.answer = "codes are gone", Answer(fault="no such class")
    found = together(monkeypatch, 2, lambda spread: w.check(codes=Path("c"), spread=spread))
    assert found == [w.check(codes=Path("c"))] * 2


def test_a_model_that_is_given_is_what_is_compared(world):
    w = world()
    w.check(model="the model")
    assert not w.made and w.compared[0] == ("outer", "the model")


def test_with_foreign_files_nothing_of_the_folder_is_run(world):
    w = world()
    w.files, w.tokenizer = ["config.json says a=1", "b.py is missing"], (False, "ids", True)
    checks = w.check()
    assert short(checks) == {
        "files": "wrong",
        "tokenizer": "wrong",
        "tensors": "fine",
        "logits in JAX": "undone",
        "logits in transformers": "undone",
    }
    assert details(checks)["files"] == "config.json says a=1; b.py is missing"
    assert details(checks)["tokenizer"] == "ids False"
    assert "nobody else's code is run" in details(checks)["logits in JAX"]
    assert not w.asked and len(w.read) == 1


def test_a_tokenizer_has_its_check_where_the_base_has_one(world):
    w = world()
    w.tokenizer = (True, "not done: x", False)
    found = w.check()
    assert short(found)["tokenizer"] == "undone" and details(found)["tokenizer"].endswith("True")
    assert [check.check for check in found][:3] == ["files", "tokenizer", "tensors"]


def test_headers_that_are_damaged_end_the_checks(world):
    w = world()
    w.headers = CheckpointError("the folder", ["a shard is missing"])
    checks = w.check()
    assert short(checks) == {"files": "fine", "tensors": "wrong"}
    assert "a shard is missing" in details(checks)["tensors"]


def test_a_tensor_that_is_wrong_is_named_where_it_belongs(world):
    w = world()
    w.export.mtp_specs = {"mtp.c": None}
    w.names |= {"mtp.c"}
    assert short(w.check())["layers that predict further tokens"] == "fine"
    w.wrong = {"mtp.c": "c is wrong"}
    checks = w.check()
    assert short(checks)["tensors"] == "fine" and details(checks)["tensors"] == "2 equal"
    assert details(checks)["layers that predict further tokens"] == "c is wrong"
    w.wrong = {"b": "b is wrong"}
    checks = w.check()
    assert details(checks)["tensors"] == "b is wrong" and short(checks)["tensors"] == "wrong"
    assert short(checks)["layers that predict further tokens"] == "fine"


@pytest.mark.parametrize("number", [0, 1])
def test_logits_that_differ_in_jax_are_found_at_their_windows(world, number):
    w = world()
    w.stored_wrong = (number,)
    found = short(w.check())
    assert [name for name, how in found.items() if how == "wrong"] == [IN_JAX[number]]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_logits_that_differ_in_transformers_are_found_at_their_windows(world, number):
    w = world()
    w.answer.logits[number] += 0.5
    found = short(w.check())
    assert [name for name, how in found.items() if how == "wrong"] == [IN_TRANSFORMERS[number]]
    # Of the ends of long windows a quarter may differ.
    w.answer.logits[number][...] = 0
    w.answer.logits[number][:, : PROBE_TOKENS // 5] = 0.5
    assert (short(w.check())[IN_TRANSFORMERS[number]] == "fine") == (number == 2)


def test_a_folder_that_we_cannot_read_is_shown_to_nobody(world):
    w = world()
    w.unread = InputError("no such key")
    checks = w.check()
    assert short(checks) == {"files": "fine", "tensors": "fine", "logits in JAX": "wrong",
                             "logits in transformers": "undone"}  # fmt: skip
    assert details(checks)["logits in JAX"] == "no such key"
    assert details(checks)["logits in transformers"] == "not done: JAX does not read the folder"
    assert not w.asked


@pytest.mark.parametrize("name", ["ragged-int4", "padded-int4"])
def test_with_codes_that_are_lost_programs_are_compared_with_the_folder(world, name):
    w = world(name)
    w.lost = "the codes are no longer in x"
    checks = w.check(codes="codes")
    assert short(checks) == {"files": "fine", "tensors": "fine", "4-bit codes": "undone",
                             "logits in JAX": "undone", LOADS: "fine",
                             **dict.fromkeys(IN_TRANSFORMERS, "fine")}  # fmt: skip
    for check in ("4-bit codes", "logits in JAX"):
        assert details(checks)[check] == (
            "not done: the codes are no longer in x; `moe-compress export --overwrite` chooses "
            "them again"
        )
    assert not w.with_codes and w.made == [(None, None)]
    assert w.read[1][1] == 3  # long ones too
    w.lost = ""
    assert short(w.check(codes="codes"))["logits in JAX"] == "fine"
    assert w.with_codes and w.made[1] == ("codes", None)
    # Codes of another repair are lost as well; those of rounding to nearest are no codes.
    assert short(w.check(codes="codes", repair="r"))["4-bit codes"] == "undone"
    assert w.made[2] == (None, "r")
    plain = world("ragged-bf16")
    plain.lost = "the codes are no longer in x"
    assert short(plain.check(codes="codes"))["logits in JAX"] == "fine" and plain.with_codes


@pytest.mark.parametrize(("name", "major", "narrow"), [
    ("padded-int4", "5.1", True), ("padded-int4", "4.57", False), ("ragged-int4", "5.0", False),
    ("padded-bf16", "5.0", False), ("padded-int4", "10.0", True),
])  # fmt: skip
def test_experts_that_transformers_narrows_are_compared_narrowed(world, monkeypatch, name, major,
                                                                 narrow):  # fmt: skip
    w = world(name)
    monkeypatch.setattr(verify, "version", lambda package: major)
    w.check()
    last = ("stored", "the folder", "float32", "narrow")
    assert (w.read[-1][0] == last) == narrow and len(w.read) == 2 + narrow
    w.answer = Answer(undone="no memory")
    w.check()
    assert w.read[-1][0] == last[:3]


def test_what_transformers_did_not_do_and_what_went_wrong(world):
    w = world()
    w.answer = Answer(undone="no memory")
    checks = w.check()
    assert LOADS not in short(checks)
    assert details(checks)["logits in transformers"] == "not done: no memory"
    for loading in (None, {}):  # it died before it had loaded the folder, or behind that
        w.answer = Answer(loading=loading, fault="SIGSEGV: a")
        checks = w.check()
        assert short(checks)[LOADS] == "wrong" and details(checks)[LOADS] == "SIGSEGV: a"
        assert "logits in transformers" not in short(checks)
    w.answer = Answer([values(PROBE[0])], {}, undone="too long")
    checks = w.check()
    assert [short(checks)[name] for name in IN_TRANSFORMERS] == ["fine", "undone", "undone"]
    assert details(checks)[IN_TRANSFORMERS[2]] == "not done: too long"


@pytest.mark.parametrize(("outer", "beside", "loading", "said"), [
    (None, {}, {"missing_keys": ["mtp.a"], "unexpected_keys": ["mtp.b"]}, ""),
    (None, {}, {"missing_keys": ["a", "b", "c", "d"]}, "{'missing_keys': ['a', 'b', 'c']}"),
    (None, {}, {"unexpected_keys": ["a"], "missing_keys": []}, "{'unexpected_keys': ['a']}"),
    ({}, {}, {"missing_keys": ["visual.a"]}, "{'missing_keys': ['visual.a']}"),
    ({"x": 1}, {}, {"missing_keys": ["model.visual.a", "eye"]},
     ", but for 2 of other parts, of which the model has none"),
    ({"x": 1}, {"eye": 1}, {"missing_keys": ["eye"]}, "{'missing_keys': ['eye']}"),
    ({"x": 1}, {}, {"missing_keys": ["model.language_model.a", "eye", "lm_head.weight"]},
     "{'missing_keys': ['model.language_model.a', 'lm_head.weight']}, but for 1 of other parts, of "
     "which the model has none"),
])  # fmt: skip
def test_what_loading_says_of_tensors_decides(world, outer, beside, loading, said):
    w = world()
    w.export.base.outer, w.export.base.beside = outer, beside
    w.answer = Answer(w.answer.logits, loading)
    checks = w.check()
    fine = "none missing, unexpected or mismatched"
    wrong = said.startswith("{")
    assert short(checks)[LOADS] == ("wrong" if wrong else "fine")
    assert details(checks)[LOADS] == (said if wrong else fine + said)


def test_the_form_is_that_which_config_json_says(monkeypatch):
    tried = []

    def problems(folder, form):
        tried.append(form.mtp)
        return [] if form.mtp == folder else ["other"]

    monkeypatch.setattr(verify, "export_of", lambda base, plan, form: form)
    monkeypatch.setattr(verify, "config_problems", problems)
    form = ExportFormat("ragged-bf16", mtp="keep")
    found: Any = lambda folder: written_form(folder, None, PLAN, form).mtp  # noqa: E731
    assert (found("keep"), tried) == ("keep", ["keep"])
    assert [found("drop"), found("prune"), found("nothing")] == ["drop", "prune", "keep"]
