"""What is asked of another process and made of its answer: the process itself is made up."""

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.config import LatentAttentionConfig
from pruning.stages import client
from pruning.stages.client import Answer, client_answer, client_bytes, client_ids, uneven_blocks
from pruning.stages.probe_windows import ProbeWindows, WindowShape
from tests.pruning.scores.test_layer import CONFIG

MIB = 1 << 20


def export_of(config=CONFIG, **form) -> Any:
    """As much of an export as is read: 700 elements, 200 of them packed, and 30 beside."""
    tensors = {"a": SimpleNamespace(shape=(50, 10), packed=False),
               "b": SimpleNamespace(shape=(20, 10), packed=True)}  # fmt: skip
    family = SimpleNamespace(auto_class="AutoModelForCausalLM")
    base = SimpleNamespace(config=config, beside={"eye": ("bfloat16", (5, 6))}, family=family,
                           outer=None)  # fmt: skip
    return SimpleNamespace(
        tensors=tensors, base=base, code_files=form.pop("code_files", ()), nbytes=50 * MIB,
        config={"model_type": form.pop("model_type", "qwen2_moe")},
        form=SimpleNamespace(**{"is_float8": False, "storage": "bf16", **form}),
    )  # fmt: skip


LATENT = LatentAttentionConfig(num_heads=3, query_rank=None, kv_rank=4, plain_dim=4, rope_dim=2,
                               value_dim=4)  # fmt: skip
SINKS = dataclasses.replace(CONFIG.attention, sinks=True)


@pytest.mark.parametrize(("attention", "heads"), [(CONFIG.attention, 1), (SINKS, 2), (LATENT, 3)])
def test_memory_is_that_of_weights_logits_and_the_windows_run_at_a_time(attention, heads):
    config = dataclasses.replace(CONFIG, attention=attention)

    def needed(*shapes):
        return client_bytes(export_of(config), [WindowShape(*shape) for shape in shapes])

    def expected(compared, tokens, length):
        # Of a token 4 scores for each that it sees, and 2 experts of 12 channels, 16 wide.
        work = max((t * (4 * heads * n + 2 * 4 * (12 + 16)) 
                    for t, n in zip(tokens, length, strict=True)), default=0)  # fmt: skip
        return 896 * MIB + int(4 * (1.25 * (700 + 30) + 3 * compared * 64 + work))

    assert needed() == expected(0, [], [])
    assert needed((8, 32)) == expected(8 * 32, [256], [32])  # all windows fit 512 tokens
    assert needed((40, 32)) == expected(40 * 32, [512], [32])
    assert needed((3, 300)) == expected(3 * 32, [300], [300])
    assert needed((2, 600)) == expected(2 * 32, [600], [600])
    assert needed((8, 32), (2, 160)) == expected(8 * 32 + 64, [256, 320], [32, 160])
    assert needed((2, 160), (8, 16)) == expected(64 + 128, [320], [160])


def test_blocks_of_two_sizes_are_those_of_no_whole_number():
    def uneven(shape, *, packed=True, is_float8=True):
        export = export_of(is_float8=is_float8)
        export.tensors = {"w": SimpleNamespace(shape=shape, packed=packed)}
        return uneven_blocks(export)

    for shape in ((256, 128), (128, 384), (100, 128), (128, 64)):
        assert uneven(shape) == ""
    for shape in ((200, 128), (128, 200), (129, 1)):
        assert uneven(shape).startswith(f"w {list(shape)} ends with an incomplete block of 128")
        assert uneven(shape, packed=False) == uneven(shape, is_float8=False) == ""


PROBE = (ProbeWindows(np.arange(64, dtype=np.int32).reshape(2, 32), 3),
         ProbeWindows(np.arange(80, dtype=np.int32).reshape(1, 80)))  # fmt: skip


@pytest.fixture
def process(monkeypatch):
    """A process that does what a function says, and the requests that it was given."""
    asked = []

    def with_(do=lambda exchange, request: 0, free=1 << 40, installed=("torch", "transformers")):
        def ask(request, patience):
            request = json.loads(request)
            asked.append((request, patience))
            return do(Path(request["exchange"]), request)

        monkeypatch.setattr(client, "_ask", ask)
        monkeypatch.setattr(client, "free_memory", lambda: free)
        monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: name in installed)
        return asked

    return with_


def answered(exchange: Path, request: dict) -> int:
    for number in range(len(request["strides"])):
        tokens = np.load(exchange / f"tokens-{number}.npy")
        np.save(exchange / f"logits-{number}.npy", tokens[:, -2:, None] / 2)
    (exchange / "loading.json").write_text('{"missing_keys": ["x"]}')
    return 0


def test_a_process_is_asked_about_all_windows_that_fit_its_memory(process, tmp_path):
    asked = process(answered)
    answer = client_answer(tmp_path, export_of(), PROBE)
    assert (answer.fault, answer.undone) == ("", "")
    assert answer.loading == {"missing_keys": ["x"]}
    for found, some in zip(answer.logits, PROBE, strict=True):
        np.testing.assert_array_equal(found, some.tokens[:, -2:, None] / 2)
    ((request, patience),) = asked
    assert patience == 900 + 10  # of 50 MiB, at 5 in a second
    assert not Path(request.pop("exchange")).exists()
    assert request == {
        "folder": str(tmp_path), "trust": False, "auto_class": "AutoModelForCausalLM",
        "storage": "bf16", "known": True, "last": 32, "together": 512, "strides": [3, 1],
    }  # fmt: skip
    client_answer(tmp_path, export_of(code_files=("m.py",), model_type="other"), PROBE)
    assert (asked[1][0]["trust"], asked[1][0]["known"]) == (True, False)
    wrapped = export_of(model_type="other")
    wrapped.base.outer = {"model_type": "glm4v_moe"}
    client_answer(tmp_path, wrapped, PROBE)
    assert asked[2][0]["known"]


def test_of_windows_that_are_too_long_the_others_are_asked_about(process, tmp_path):
    export, shapes = export_of(), [some.shape for some in PROBE]
    both, one = client_bytes(export, shapes), client_bytes(export, shapes[:1])
    process(answered, free=both)
    assert len(client_answer(tmp_path, export, PROBE).logits) == 2
    process(answered, free=both - 1)
    answer = client_answer(tmp_path, export, PROBE)
    assert len(answer.logits) == 1 and answer.undone.startswith("it needs about")
    asked = process(answered, free=one - 1)
    before = len(asked)
    answer = client_answer(tmp_path, export, PROBE)
    assert answer.logits is None and answer.undone.endswith("on a larger machine")
    assert len(asked) == before


@pytest.mark.parametrize("installed", [(), ("torch",), ("transformers",)])
def test_without_the_programs_nobody_is_asked(process, tmp_path, installed):
    asked = process(installed=installed)
    answer = client_answer(tmp_path, export_of(), PROBE)
    assert answer == Answer(undone="torch and transformers are not installed") and not asked


def test_what_transformers_cannot_read_is_not_asked(process, tmp_path):
    asked = process()
    export = export_of(is_float8=True)
    export.tensors["c"] = SimpleNamespace(shape=(200, 128), packed=True)
    assert "incomplete block" in client_answer(tmp_path, export, PROBE).undone and not asked


def left(code: int, **files: str):
    def do(exchange, request):
        for name, text in files.items():
            kind = "json" if name == "loading" else "txt"
            (exchange / f"{name}.{kind}").write_text(text)
        return code

    return do


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        (
            left(-signal.SIGKILL),
            Answer(undone="the process was killed, as systems do where memory ends"),
        ),
        (left(-signal.SIGSEGV, log="a\n  b"), Answer(fault="SIGSEGV: a b")),
        (left(1, log="x" * 3000), Answer(fault="ended with code 1: " + "x" * 2000)),
        (left(0, log="odd"), Answer(fault="ended with code 0: odd")),
        (left(3, loading="{}"), Answer(fault="ended with code 3: ")),
        (left(0, undone="why", loading="{}"), Answer(undone="why")),
        (left(-signal.SIGKILL, undone="why"), Answer(undone="why")),
    ],
)
def test_how_a_process_ended_says_what_is_known(process, tmp_path, do, expected):
    process(do)
    assert client_answer(tmp_path, export_of(), PROBE) == expected


@pytest.mark.parametrize(
    ("error", "said"),
    [(TimeoutError(), "the process gave no answer in"), (OSError("no forks"), "no forks")],
)
def test_a_process_that_does_not_answer_leaves_all_undone(process, tmp_path, error, said):
    def do(exchange, request):
        raise error

    process(do)
    answer = client_answer(tmp_path, export_of(), PROBE)
    assert answer.undone.startswith(said) and not answer.fault and answer.logits is None
    undone = client_ids([tmp_path, tmp_path], ["a"])
    assert undone == [str(error) or "the process gave no answer"] * 2


def test_ids_are_those_of_every_folder_or_the_reason_for_none(process, tmp_path):
    def do(exchange, request):
        (exchange / "ids.json").write_text(json.dumps([[[1, 2]], "no tokenizer"]))
        return 0

    asked = process(do)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert client_ids(folders, ("x",), trusted=folders[1:]) == [[[1, 2]], "no tokenizer"]
    ((request, patience),) = asked
    request.pop("exchange")
    assert patience == 900 and request == {
        "folders": [str(folder) for folder in folders],
        "texts": ["x"],
        "trusted": [str(folders[1])],
    }
    process(left(0, undone="why"))
    assert client_ids(folders, ("x",)) == ["why"] * 2
    process(left(0))
    assert client_ids(folders, ("x",)) == ["the process ended without an answer"] * 2
    process(free=896 * MIB - 1)
    assert [why.startswith("it needs about") for why in client_ids(folders, ("x",))] == [True] * 2
    process(do, free=896 * MIB)
    assert client_ids(folders, ("x",))[0] == [[1, 2]]
    process(installed=("torch",))
    assert client_ids(folders, ("x",)) == ["it is not installed"] * 2
