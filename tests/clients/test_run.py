"""How `tests/clients/run.py` judges what a client did; the clients themselves are run by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert.clients import Verdict
from tests.clients import folders, run
from tests.clients.folders import TOKENS

REFUSES, ROUNDS = "ValueError: no such model", 3e-6


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    forms = ["layered-bf16", "padded-bf16", "ragged-int4"]
    return list(folders.cases(["kimi_k2", "deepseek"], forms, tmp_path_factory.mktemp("clients")))


@pytest.fixture
def outcome(cases, monkeypatch, capsys):
    """Run the command with a client that does as told; its exit code and what it printed."""

    def tried(client: str, act: Callable[[np.ndarray, Path], str], family: str, form: str):
        chosen = [case for case in cases if (case.family, case.form) == (family, form)]
        monkeypatch.setattr(run, "environment", lambda client, cache: cache)
        monkeypatch.setattr(run, "cases", lambda families, forms, work: iter(chosen))
        monkeypatch.setattr(
            run, "run_client", lambda *arguments: act(chosen[0].logits, arguments[-1])
        )
        code = run.main(["--clients", client])
        return code, capsys.readouterr().out

    return tried


def gives(difference: float):
    """A client that loads a folder and computes its logits up to this."""

    def act(logits: np.ndarray, out: Path) -> str:
        np.savez(out, logits=logits + difference)
        return ""

    return act


def flips(positions: int):
    """A client whose router chooses another expert at so many of the 10 positions of a text."""

    def act(logits: np.ndarray, out: Path) -> str:
        found = logits + 0.03
        found[0, :positions, 5] += 0.5
        found[1, :positions, 5] += 0.5
        np.savez(out, logits=found)
        return ""

    return act


def refuses(logits: np.ndarray, out: Path) -> str:
    return REFUSES


@pytest.mark.parametrize(
    ("client", "family", "form", "act", "code"),
    [
        ("transformers 4.57", "deepseek", "layered-bf16", gives(ROUNDS), 0),
        ("transformers 4.57", "deepseek", "layered-bf16", gives(1e-3), 1),
        ("transformers 4.57", "deepseek", "layered-bf16", gives(np.nan), 1),
        ("transformers 4.57", "deepseek", "layered-bf16", refuses, 1),
        # said not to load it
        ("llama.cpp", "deepseek", "layered-bf16", gives(ROUNDS), 1),
        # what its CPU build computes of it says nothing
        ("vLLM", "kimi_k2", "padded-bf16", gives(0.7), 0),
        ("vLLM", "kimi_k2", "layered-bf16", gives(0.7), 1),
        # 4-bit layers run in bfloat16 there, so that a choice of experts may be another
        ("vLLM", "kimi_k2", "ragged-int4", flips(1), 0),
        ("vLLM", "kimi_k2", "ragged-int4", flips(4), 1),
        ("vLLM", "kimi_k2", "ragged-int4", gives(0.2), 1),
        ("vLLM", "kimi_k2", "ragged-int4", gives(np.nan), 1),
        ("vLLM", "deepseek", "layered-bf16", flips(1), 1),
    ],
)
def test_a_run_fails_where_a_client_contradicts_its_verdict(
    outcome, client, family, form, act, code
):
    found, shown = outcome(client, act, family, form)
    assert found == code and ("FAILURE: the verdict is" in shown) == bool(code)


def test_a_run_in_which_nothing_loads_fails_even_if_that_was_foreseen(outcome):
    code, shown = outcome("llama.cpp", refuses, "deepseek", "layered-bf16")
    assert code == 1 and REFUSES in shown
    assert "FAILURE" not in shown and "0 loaded, 0 against" in shown


def test_cases_hold_the_rounded_model_and_a_verdict_of_every_client(cases):
    assert [(case.family, case.form) for case in cases] == [
        (family, form) for family in ("kimi_k2", "deepseek")
        for form in ("ragged-int4", "layered-bf16", "padded-bf16")
    ]  # fmt: skip
    for case in cases:
        assert case.logits.shape == (*TOKENS.shape, 288) and np.isfinite(case.logits).all()
        assert all(isinstance(case.verdicts[name], Verdict) for name in run.CLIENTS)
