"""A full-size model rehearsed with a few of its layers: every stage under a memory limit.

`python tests/bench/rehearsal.py [--shape qwen3|deepseek-v3] [--layers 8] [--experts 256]
[--memory-limit 6GB] [--tokens 8192] [--home DIR]`

Random weights go through estimate, score, plan, export to 4 bits and verify, as commands of their
own with the files' pages dropped before each: layers of Qwen3-30B-A3B (604 M weights, 1.2 GB each),
or a dense layer of DeepSeek-V3 and one with experts, in 8-bit floats (of all 256 experts 11.5 G
weights, which no limit of some GB holds: they are taken in groups); a vocabulary of 1,024. One line
a stage: seconds, seconds a layer, peak memory beside what `estimate` foretells (of Qwen3 without a
limit), bytes read from the disk; then the minutes of all layers of the model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

LAYERS = {"qwen3": 48, "deepseek-v3": 61}  # of the models
FORETOLD = {"score": "scoring", "plan": "plan", "export": "export", "verify": "verify"}


class Measured(NamedTuple):
    """What a command took."""

    seconds: float
    peak_bytes: int
    read_bytes: int


def drop_pages(folder: Path) -> None:
    """Forget what is in the page cache of a folder's files, so that reading them is reading."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def command(*words: str) -> Measured:
    """Run one command line; a shell between, whose peak is small, because a fork inherits it."""
    run = [sys.executable, "-m", "pruning", *words, "--quiet"]
    # The shell waits, and prints what the kernel counted of its child.
    script = (
        "import json, os, resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[1:]).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([code, used.ru_maxrss * 1024, used.ru_inblock * 512]))\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *run], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seconds = time.perf_counter() - started
    code, peak, read = json.loads(done.stdout.splitlines()[-1])
    if code:
        raise SystemExit(f"{words[0]} ended with {code}")
    return Measured(seconds, peak, read)


def written(home: Path, shape: str, layers: int, experts: int) -> tuple[Path, Path]:
    """The model and a text, unless an earlier run left them."""
    model, text = home / f"model-{layers}-{experts}", home / "text.txt"
    if not (model / "config.json").is_file():
        # In a process of its own, whose memory is not counted with that of the commands.
        code = "import sys; from pathlib import Path; from tests.{} import checkpoint; "
        code += "checkpoint(Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        if shape == "qwen3":
            words = [code.format("bench.bench_score"), str(model), str(layers), str(experts)]
        else:
            words = [code.format("support.deepseek"), str(model), str(experts)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", *words], check=True, env=environment)
    text.write_text(" ".join(f"{word * 7919 % 4096:x}" for word in range(40_000)))
    return model, text


def rehearse(home: Path, options: argparse.Namespace) -> None:
    """Run all stages and print a line for each."""
    shape, layers = options.shape, options.layers
    model, text = written(home, shape, layers, options.experts)
    out, said = home / "out", home / "estimate.json"
    given = ["--calibration", str(text), "--max-tokens", str(options.tokens), "--window", "512"]
    given += ["--planner", "fair", "--repair", "none", "--output", str(out)]
    given += ["--dtype", options.dtype]
    capped = ["--memory-limit", options.memory_limit]
    form = ["--export", "ragged-int4"]
    # Without the limit, if layers are taken whole: under it `estimate` is of a run that does all
    # stages with one allowance, and measures a text besides.
    within = [] if shape == "qwen3" else [*capped, "--batch", "1"]
    command("estimate", str(model), "--probe", *given, *form, *within, "--json", str(said))
    (foretold,) = json.loads(said.read_text())
    stages = {
        "score": ("score", str(model), *given, *capped, "--overwrite"),
        "plan": ("plan", str(out), "--prune-rate", "0.25"),
        "export": ("export", str(out), *form, *capped, "--overwrite"),
        "verify": ("verify", str(out), *capped),
    }
    print(f"scoring foretold in {foretold['scoring_seconds']:.0f} s\n")
    print(
        "| stage | s | s a layer | peak, GB | foretold, GB | read, GB "
        f"| {LAYERS[shape]} layers, min |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, words in stages.items():
        drop_pages(home)
        found = command(*words)
        foretold_bytes = foretold["memory"].get(FORETOLD[name])
        print(
            f"| {name} | {found.seconds:.0f} | {found.seconds / layers:.1f} "
            f"| {found.peak_bytes / 1e9:.2f} "
            f"| {'' if foretold_bytes is None else f'{foretold_bytes / 1e9:.2f}'} "
            f"| {found.read_bytes / 1e9:.2f} | {found.seconds / layers * LAYERS[shape] / 60:.1f} |",
            flush=True,
        )


def main() -> None:
    """Rehearse in a folder that stays, if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=LAYERS, default="qwen3")
    parser.add_argument("--layers", type=int, default=8, help="of qwen3; deepseek-v3 has 2")
    parser.add_argument("--experts", type=int, help="of a layer; default all")
    parser.add_argument("--memory-limit", default="6GB")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--home", type=Path, help="keeps model and output; default: a new folder")
    options = parser.parse_args()
    default_experts = 128 if options.shape == "qwen3" else 256
    options.experts = options.experts or default_experts
    options.layers = options.layers if options.shape == "qwen3" else 2
    if options.home is not None:
        options.home.mkdir(parents=True, exist_ok=True)
        return rehearse(options.home, options)
    with tempfile.TemporaryDirectory() as name:
        rehearse(Path(name), options)
    return None


if __name__ == "__main__":
    main()
