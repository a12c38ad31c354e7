"""Every check of an export is failed by what it is there for, and by nothing else."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.cli.tables import checks_table
from pruning.kit.errors import VerificationError
from pruning.kit.progress import Steps
from pruning.runs.verify import verify
from pruning.stages import client
from pruning.stages import verify as verifying
from pruning.stages.checks import Check
from pruning.stages.client import Answer, client_answer
from pruning.stages.probe_windows import ProbeWindows, random_probe
from pruning.stages.sizes import export_of, form_of
from pruning.stages.stored import stored_base, stored_recipe
from tests.support.command import change_config, change_tensor, given, run

FORMS = ("ragged-bf16", "ragged-int4", "padded-bf16")
EXPERT = "model.layers.1.mlp.experts.{expert}.{part}_proj.{suffix}"
NOTHING = Answer(undone="of no interest here")


@pytest.fixture(scope="module")
def exported(models, texts, tmp_path_factory) -> Path:
    """A folder with exports of the single model."""
    out = tmp_path_factory.mktemp("verify") / "out"
    assert run("--quiet", "score", models / "single", *given(texts, out)) == 0
    assert run("--quiet", "plan", out, "--prune-rate", 0.5, "--width", "uniform") == 0
    assert run("--quiet", "export", out, "--export", *FORMS) == 0
    return out


@pytest.fixture
def one(exported, tmp_path, monkeypatch):
    """The folder with one of its exports, and nobody asks transformers."""
    monkeypatch.setattr(verifying, "client_answer", lambda *_: NOTHING)

    def copy(form: str) -> Path:
        out = tmp_path / "out"
        others = shutil.ignore_patterns(*(name for name in FORMS if name != form))
        shutil.copytree(exported, out, ignore=others)
        return out / "exports" / form

    return copy


def failed(export: Path) -> dict[str, str]:
    """What `verify` says of an export that is not as planned: check -> detail."""
    with pytest.raises(VerificationError) as error:
        verify(export.parent.parent)
    parts = re.split(
        rf"(?:^|; ){export.name}: ([^:]+): ", str(error.value).split(". Do not use")[0]
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def checks_of(export: Path) -> list[Check]:
    """All checks of one export, as `verify` makes them."""
    recipe = stored_recipe(export.parent.parent)
    base, plan = stored_base(recipe, Steps()), PruningPlan.load(export.parent.parent)
    form = dataclasses.replace(form_of(recipe, export.name, plan), mtp="drop")
    return verifying.verify_export(base, plan, form, export, random_probe(base))


def set_value(export: Path, name: str, place: tuple[int, ...], value) -> tuple:
    """Change one element; (the new one, the old one) as they are on disk."""
    seen = []

    def change(tensor):
        tensor = tensor.copy()
        old = tensor[place]
        tensor[place] = value(old) if callable(value) else value
        seen.extend([tensor[place], old])
        return tensor

    change_tensor(export, name, change)
    return tuple(seen)


def next_up(old):
    """The next number in bfloat16."""
    return (old.view(np.uint16) + np.uint16(1)).view(ml_dtypes.bfloat16)


def test_what_was_compared_is_said(exported, capsys):
    assert run("--quiet", "verify", exported) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for form in FORMS:
        specs = load_file(exported / "exports" / form / "model.safetensors")
        size = sum(value.nbytes for value in specs.values()) / 1e3
        assert f"tensors ok {len(specs)} tensors, {size:.1f} kB, bit for bit as planned" in shown
    assert shown.count("config.json, tokenizer and all else that programs read: as planned") == 3
    assert shown.count("logits in transformers ok max difference") == 3
    assert "FAILED" not in shown and "not done" not in shown


def test_one_weight_of_any_kind_is_named_with_its_place(one):
    """The least change that bfloat16 can hold."""
    export, down = one("ragged-bf16"), EXPERT.format(expert=3, part="down", suffix="weight")
    new, old = set_value(export, down, (0, 0), next_up)
    # No logit tells of it.
    assert failed(export) == {"tensors": f"{down}[0, 0] is {new}, not {old}"}
    set_value(export, down, (0, 0), old)
    names = {
        down: (7, 5),
        "model.layers.0.self_attn.k_proj.weight": (2, 31),
        "model.layers.1.mlp.gate.weight": (0, 1),
        "model.norm.weight": (4,),
        "model.embed_tokens.weight": (256, 30),
    }
    found = {n: set_value(export, n, place, next_up) for n, place in names.items()}
    sentences = [f"{n}{list(names[n])} is {found[n][0]}, not {found[n][1]}" for n in sorted(names)]
    assert failed(export)["tensors"] == "; ".join(sentences)
    # No more than five are named.
    set_value(export, "model.layers.0.input_layernorm.weight", (0,), next_up)
    assert failed(export)["tensors"].endswith("; and 1 more")
    assert failed(export)["tensors"].count(", not ") == 5


def test_one_code_and_one_scale_in_four_bits_are_named(one):
    export = one("ragged-int4")
    code = EXPERT.format(expert=0, part="up", suffix="weight_packed")
    scale = EXPERT.format(expert=2, part="gate", suffix="weight_scale")
    codes = set_value(export, code, (3, 1), lambda old: old ^ 1)
    scales = set_value(export, scale, (5, 0), next_up)
    assert failed(export)["tensors"] == (
        f"{code}[3, 1] is {codes[0]}, not {codes[1]}; {scale}[5, 0] is {scales[0]}, not {scales[1]}"
    )


def test_a_scale_that_is_too_small_is_named(one):
    export = one("ragged-int4")
    scale = "model.layers.0.self_attn.q_proj.weight_scale"
    set_value(export, scale, (1, 0), 1e-30)
    said = failed(export)["tensors"]
    assert re.fullmatch(rf"{re.escape(scale)}\[1, 0\] is a scale of \S+e-31, less than \S+", said)


def rewrite(export: Path, change) -> None:
    path = export / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


UP = EXPERT.format(expert=3, part="up", suffix="weight")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda all_: all_.pop(UP), f"{UP} is missing"),
        (lambda all_: all_.update(extra=np.ones(3, np.float32)), "extra is not part of the export"),
        (lambda all_: all_.update({UP: all_[UP].astype(np.float32)}),
         f"{UP} is float32, not bfloat16"),
        (lambda all_: all_.update({UP: np.ascontiguousarray(all_[UP][:-1])}),
         f"{UP} has shape [31, 32], not [32, 32]"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_missing_foreign_or_of_another_kind_is_named(one, change, sentence):
    export = one("ragged-bf16")
    rewrite(export, change)
    said = failed(export)
    assert said.pop("tensors") == sentence
    # Only what no longer makes a model is refused by its reader, too.
    assert said.keys() == ({"logits in JAX"} if "float32" not in sentence else set())


def test_damaged_headers_and_other_files_in_their_place_end_in_a_failed_check(one):
    export = one("ragged-bf16")
    (export / "model.safetensors").write_bytes(b"\x00" * 100)
    assert "no safetensors header" in failed(export)["tensors"]
    (export / "config.json").write_text("[" * 100_000)
    assert "config.json" in failed(export)["files"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda index: index.pop(UP), "does not name 1 tensor(s), such as " + UP),
        (lambda index: index.update(new=index[UP]), "names 1 tensor(s), such as new, that no"),
        (lambda index: index.update({UP: "model-00002-of-00002.safetensors"}),
         "shard model-00002-of-00002.safetensors is missing"),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_named_though_our_reader_believes_the_shards(one, change, sentence):
    export = one("ragged-bf16")
    shard = export / "model-00001-of-00002.safetensors"
    (export / "model.safetensors").rename(shard)
    index = dict.fromkeys(load_file(shard), shard.name)
    change(index)
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert sentence in failed(export)["tensors"]


def test_foreign_code_is_found_before_anything_runs_it(exported, tmp_path):
    """With transformers at hand, which runs what lies in the folder."""
    out, ran = tmp_path / "out", tmp_path / "ran"
    shutil.copytree(exported, out, ignore=shutil.ignore_patterns("padded-*", "ragged-int4"))
    export = out / "exports" / "ragged-bf16"
    code = export / "modeling_ragged_moe.py"
    own = code.read_text()
    code.write_text(f"{own}\nopen({str(ran)!r}, 'w').close()\n")
    said = failed(export)
    assert set(said) == {"files"} and said["files"].startswith("modeling_ragged_moe.py is not that")
    assert not ran.exists()
    (asked,) = (check for check in checks_of(export) if check.check == "logits in transformers")
    assert asked.ok and not asked.done and "nobody else's code is run" in asked.detail
    code.write_text(own)
    (export / "helper.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    assert failed(export) == {"files": "helper.py is not part of the export"}
    assert not ran.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rms_norm_eps": 1e-4}, "config.json says rms_norm_eps=0.0001, not 1e-06"),
        ({"norm_topk_prob": 0}, "config.json says norm_topk_prob=0, not false"),
        ({"torch_dtype": "float16"}, 'config.json says torch_dtype="float16", not "bfloat16"'),
        ({"new": [1]}, "config.json says new=[1], not nothing"),
    ],
)
def test_another_value_in_config_json_is_named(one, changes, sentence):
    export = one("ragged-bf16")
    change_config(export, **changes)
    assert failed(export)["files"] == sentence
    # The same values in another layout are the same config.
    fine = json.loads((export / "config.json").read_text())
    fine = {k: v for k, v in fine.items() if k != "new"}
    own = export_of_(export).config
    (export / "config.json").write_text(json.dumps({k: own[k] for k in reversed(own)}))
    assert all(check.ok for check in checks_of(export)) and fine.keys() == own.keys()


def export_of_(export: Path):
    recipe = stored_recipe(export.parent.parent)
    base, plan = stored_base(recipe, Steps()), PruningPlan.load(export.parent.parent)
    return export_of(base.about, plan, form_of(recipe, export.name, plan))


def test_files_that_are_copied_must_be_those_of_the_base_and_cards_are_free(one, models):
    export = one("padded-bf16")
    (export / "README.md").write_text("my own card")
    (export / "LICENSE").write_text("mine")
    assert all(check.ok for check in checks_of(export))
    tokenizer = export / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"!"', '"?"', 1))
    (export / "generation_config.json").unlink()
    said = failed(export)["files"]
    base = models / "single"
    assert said == (
        f"tokenizer.json is not that of {base}/tokenizer.json; generation_config.json is missing"
    )


def test_what_transformers_says_of_the_tensors_fails_a_check_of_its_own(one, monkeypatch):
    export = one("ragged-bf16")
    said = {"missing_keys": ["lm_head.weight"], "unexpected_keys": [], "mismatched_keys": []}

    def answer(folder, export, probe):
        size = export.base.config.vocab_size
        logits = [np.zeros((*some.tokens.shape, size), np.float32) for some in probe]
        return Answer(logits=logits, loading=said)

    monkeypatch.setattr(verifying, "client_answer", answer)
    found = failed(export)
    assert found["transformers loads every tensor"] == "{'missing_keys': ['lm_head.weight']}"
    assert found.keys() == {"transformers loads every tensor", "logits in transformers"}


CLIENT = """
import importlib.util, os, signal, socket, sys, time
from pathlib import Path
sys.modules |= dict.fromkeys(
    ("transformers", "transformers.generation", "transformers.modeling_utils",
     "compressed_tensors", "compressed_tensors.quantization"), type(sys)("nothing"))
spec = importlib.util.spec_from_file_location("client_process", {program!r})
client = importlib.util.module_from_spec(spec)
spec.loader.exec_module(client)

def killed(): os.kill(os.getpid(), signal.SIGKILL)
def crashed(): os.kill(os.getpid(), signal.SIGSEGV)
def refused(): raise ValueError("this folder is no model")
def filled(): raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
def lacking(): raise ImportError("accelerate is not installed")
def gpu(): raise RuntimeError("No GPU or XPU found. A GPU or XPU is needed for FP8 quantization.")
def wrong(): raise ValueError("a is wrong, no matter that No GPU or XPU found")
def online(): socket.create_connection(("127.0.0.1", 9))
def silent(): time.sleep(100)
def parent(): os.kill(os.getppid(), signal.SIGKILL)

def _answer(request, exchange):
    print("seen", request["folder"])
    globals()[Path(request["folder"]).name]()

client._answer = _answer
client.serve()
"""
ENDS = {
    "killed": ("undone", "the process was killed, as systems do where memory ends"),
    "crashed": ("fault", "SIGSEGV: seen"),
    "refused": ("fault", "ended with code 1: seen .* ValueError: this folder is no model"),
    "filled": ("undone", "its memory ran out"),
    "lacking": ("undone", "accelerate is not installed"),
    "gpu": ("fault", "RuntimeError: No GPU or XPU found"),  # of 16 bits, which need none
    "online": ("fault", "OSError: the check of an export uses no network"),
    "silent": ("undone", "the process gave no answer in 1 s"),
    "parent": ("undone", "its process ended with SIGKILL"),
}


def scripted_answer(folder, monkeypatch, name, export) -> Answer:
    """What is made of a client that does what a function of `CLIENT` does."""
    program = folder / "client.py"
    program.write_text(CLIENT.format(program=str(client.PROGRAM)))
    monkeypatch.setattr(client, "PROGRAM", program)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    (folder / "temporary").mkdir()
    client._process.cache_clear()
    try:
        windows = ProbeWindows(np.zeros((1, 4), np.int32))
        return client_answer(folder / name, export, (windows,))
    finally:
        client._end()
        assert os.listdir(folder / "temporary") == []


@pytest.mark.parametrize("name", ["gpu", "wrong"])
def test_only_that_transformers_4_wants_a_gpu_for_8_bits_leaves_a_check_undone(
    exported, tmp_path, monkeypatch, name
):
    export = export_of_(exported / "exports" / "padded-bf16")
    export = dataclasses.replace(export, form=ExportFormat("padded-fp8"))
    found = scripted_answer(tmp_path, monkeypatch, name, export)
    assert found.undone.startswith("No GPU or XPU found") == (name == "gpu")
    assert bool(found.fault) == (name == "wrong") and found.logits is None


@pytest.mark.parametrize("name", ENDS)
def test_a_process_that_dies_is_the_end_of_a_check_and_not_of_the_run(
    exported, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(client, "PATIENCE", 1 if name == "silent" else 100)
    export = export_of_(exported / "exports" / "padded-bf16")
    found = scripted_answer(tmp_path, monkeypatch, name, export)
    where, words = ENDS[name]
    assert re.search(words, getattr(found, where)) and found.logits is None
    assert not (found.undone if where == "fault" else found.fault)


CALLER = """
import sys
from pathlib import Path
from pruning.stages import client

client.PROGRAM = Path(sys.argv[1])
exchange = Path(client.tempfile.mkdtemp(prefix="moe-client-"))
client._ask(client.json.dumps({"folder": "silent", "exchange": str(exchange)}), 100)
"""


def test_of_a_killed_run_transformers_leaves_nothing(tmp_path):
    program, temporary = tmp_path / "client.py", tmp_path / "temporary"
    program.write_text(CLIENT.format(program=str(client.PROGRAM)))
    temporary.mkdir()
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(program)], env=os.environ | {"TMPDIR": str(temporary)}
    )
    for _ in range(600):
        if list(temporary.glob("*/log.txt")):  # it works
            break
        time.sleep(0.1)
    caller.kill()
    caller.wait()
    for _ in range(100):
        if not (left := os.listdir(temporary)):
            break
        time.sleep(0.1)
    assert left == []


def test_a_killed_process_leaves_a_check_that_is_not_done(one, monkeypatch):
    answer = Answer(undone="the process was killed, as systems do where memory ends")
    export = one("padded-bf16")
    monkeypatch.setattr(verifying, "client_answer", lambda *_: answer)
    checks = verify(export.parent.parent)
    (asked,) = (check for check in checks if not check.done)
    assert asked.check == "logits in transformers" and asked.ok
    assert asked.detail == f"not done: {answer.undone}"
    (row,) = (row for row in checks_table(checks).rows if row[1] == asked.check)
    assert row[2:] == ["not done", asked.detail]
    # A fault of the folder is a failed check.
    monkeypatch.setattr(verifying, "client_answer", lambda *_: Answer(fault="ended with code 1: x"))
    assert failed(export) == {"transformers loads every tensor": "ended with code 1: x"}


def test_where_memory_is_short_transformers_is_not_asked_and_the_run_says_so(
    exported, tmp_path, monkeypatch, capsys
):
    shutil.copytree(exported, tmp_path / "out")
    monkeypatch.setattr(client, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(client, "_ask", None)  # nothing is started
    assert run("--quiet", "verify", tmp_path / "out", "--json", "-") == 0
    undone = [check for check in json.loads(capsys.readouterr().out) if not check["done"]]
    assert [check["export"] for check in undone] == list(dict.fromkeys(c["export"] for c in undone))
    assert len(undone) == 3
    for check in undone:
        assert check["check"] == "logits in transformers" and check["ok"]
        assert re.search(
            r"needs about 9\d\d\.\d MB of memory and 1048\.6 kB are free", check["detail"]
        )


def test_codes_that_are_gone_are_said_and_all_else_is_compared(one, exported, tmp_path):
    export = one("ragged-int4")
    recipe = export.parent.parent / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("quantizer: rtn", "quantizer: gptq"))
    checks = {check.check: check for check in verify(export.parent.parent)}
    for name in ("4-bit codes", "logits in JAX"):
        assert not checks[name].done and "no longer in" in checks[name].detail
    kept = [n for n in load_file(export / "model.safetensors") if "weight_" not in n]
    assert checks["tensors"].detail.startswith(f"{len(kept)} tensors")
    name = "model.layers.0.mlp.gate.weight"
    set_value(export, name, (1, 1), 3)
    assert failed(export)["tensors"].startswith(f"{name}[1, 1] is 3.0, not ")
