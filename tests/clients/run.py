"""Load every exported format in the programs users have, and compare with our logits.

Run by hand from the repository root; it installs each client into an environment of its own, some
gigabytes, once:

    python tests/clients/run.py [--clients ...] [--families ...] [--formats ...] [--cache FOLDER]

Prints a table of maximal differences. It ends with 1 if a client does not do what `convert.clients`
says of it, that is, loads a folder and computes its logits up to rounding, or does not; or if none
loaded any.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from convert.export_format import FLOAT8, FORMATS, MIXED
from tests.clients.environments import CLIENTS, ROUNDED, environment, run_client
from tests.clients.folders import FAMILIES, TOKENS, Case, cases

MOST = 0.75  # of the positions that a client in less than float32 must get right


class Difference(NamedTuple):
    """How far a client's numbers are from ours, over the vocabulary.

    Attributes:
      largest: at the worst position.
      most: at three quarters of the positions. In less than float32 a router may choose another
        expert where two are nearly equal, which moves that position and those that see it.
    """

    largest: float
    most: float


def difference(ours: np.ndarray, found: Path) -> Difference:
    """Difference of logits, or of their log-probabilities if the client gives only those.

    Args:
      ours: logits [B, T, V].
      found: what a client wrote.

    Returns:
      The difference; infinite if any number is missing.
    """
    with np.load(found) as arrays:
        if "logits" in arrays:
            theirs = arrays["logits"]
        else:
            theirs = arrays["logprobs"]
            ours = ours - np.logaddexp.reduce(ours, axis=-1, keepdims=True)
    if np.isnan(theirs).any():
        return Difference(np.inf, np.inf)
    worst = np.abs(theirs - ours).max(axis=-1)  # [B, T]
    return Difference(float(worst.max()), float(np.quantile(worst, MOST)))


def table(cells: dict[tuple[str, str], dict[str, str]], clients: list[str]) -> str:
    """Markdown: a row per family and format, a column per client."""
    lines = [["family", "format", *clients], ["---"] * (2 + len(clients))]
    lines += [[*key, *(row[client] for client in clients)] for key, row in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Do what the module says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    # Blocks of 8-bit floats are wider than these, and bits of each layer come with a plan.
    formats = [name for name in FORMATS if name not in (FLOAT8, MIXED)]
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    cache = Path.home() / ".cache" / "moe-jax-clients"
    parser.add_argument("--cache", type=Path, default=cache)
    given = parser.parse_args(arguments)
    environments = {name: environment(CLIENTS[name], given.cache) for name in given.clients}
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    notes: list[str] = []
    loaded = failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        np.save(work / "tokens.npy", TOKENS)
        for case in cases(given.families, given.formats, work):
            for name in given.clients:
                value, reason = attempt(case, name, environments[name], work)
                cell = "not loaded" if value is None else f"{value.largest:.1e}"
                cells[case.family, case.form][name] = cell
                wrong = contradiction(case, name, value)
                loaded, failures = loaded + (value is not None), failures + bool(wrong)
                said = "; ".join(filter(None, (reason, wrong)))
                if said:
                    notes.append(f"- {name}, {case.family}, {case.form}: {said}")
                print(f"{case.family} {case.form} {name}: {cell} {said}", flush=True)
    print("\n" + table(cells, given.clients), *notes, sep="\n")
    print(f"\n{loaded} loaded, {failures} against the verdicts of convert.clients")
    return int(failures > 0 or loaded == 0)


def contradiction(case: Case, name: str, value: Difference | None) -> str:
    """What speaks against the verdict on a case, "" if nothing does or the client is blind to it.

    Args:
      case: what was tried.
      name: of the client.
      value: of its numbers, None where it did not load.
    """
    client, verdict = CLIENTS[name], case.verdicts[name]
    config = json.loads((case.folder / "config.json").read_text())
    if client.blind(config, case.form):
        return ""
    if client.rounds(config, case.form):
        works = value is not None and value.most <= ROUNDED
    else:
        works = value is not None and value.largest <= client.tolerance
    if works == (verdict.verdict != "no"):
        return ""
    return f"FAILURE: the verdict is {verdict.verdict!r} ({verdict.rule})"


def attempt(case: Case, name: str, folder: Path, work: Path) -> tuple[Difference | None, str]:
    """(difference or None, why the client could not)."""
    out = work / f"{case.family}-{case.form}-{CLIENTS[name].script}.npz"
    reason = run_client(CLIENTS[name], folder, case.folder, work / "tokens.npy", out)
    return (None, reason) if reason else (difference(case.logits, out), "")


if __name__ == "__main__":
    sys.exit(main())
