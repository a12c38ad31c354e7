"""Kill every stage at random file events, run it again, and compare with an undisturbed run.

`python tests/bench/kill_stages.py [--points 20] [--stages score plan ...] [--seed 0]`

Each point is a process of its own that sends itself SIGKILL in the place of a file event (rename,
fsync, allocation, new folder, removal) below the output folder; then the same command runs to its
end, and all files are compared byte for byte, paths and dates aside. A point takes about 4 s.
"""

import argparse
import gc
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import tests.conftest  # noqa: E402, F401  # fast compilation, kept on disk
from pruning.cli import commands  # noqa: E402, F401  # imported once, not by each process
from pruning.scores import states  # noqa: E402
from pruning.stages import client  # noqa: E402
from tests.support import command, tiny  # noqa: E402
from tests.support.killing import contents, counting  # noqa: E402

FORKS = multiprocessing.get_context("fork")
GRADIENTS = ("--gradients", "--weight-gradients", "--nll-ig", "2")
GPTQ = ("--quantizer", "gptq", "--export", "ragged-int4", "padded-int4")
TRAIN = ("--tokens", "448", "--batch", "2", "--epochs", "1", "--export", "ragged-bf16")
SCORE, PLAN = ("score", "MODEL", "GIVEN"), ("plan", "OUT", "--prune-rate", "0.5")
COMPRESS = ("compress", "MODEL", "GIVEN")
STAGES = {  # a command, and the commands that make its folder
    "score": (("score", "MODEL", "GIVEN", *GRADIENTS, "--expert-details"), ()),
    "details": (("score", "MODEL", "GIVEN", "--expert-details"), ()),
    "plan": (("plan", "OUT", "--prune-rate", "0.25", "0.5"), (SCORE,)),
    "choice": (("plan", "OUT", "--prune-rate", "0.25", "0.5"), (("score", "MODEL", "READ"),)),
    "repair": (
        ("export", "OUT", "--export", "ragged-bf16", "--repair", "layer"),
        (("score", "MODEL", "GIVEN", "--window", "32"), PLAN),
    ),
    "gptq, export": (("export", "OUT", "--overwrite"), ((*SCORE, *GPTQ), PLAN)),
    "export": (("export", "OUT", "--export", "padded-bf16", "ragged-bf16"), (SCORE, PLAN)),
    "verify": (("verify", "OUT"), (SCORE, PLAN, ("export", "OUT", "--export", "ragged-bf16"))),
    "compare": (("compare", "MODEL", "READ", "--prune-rate", "0.5"), ()),
    "audit": (("audit", "MODEL", "READ", "--experts", "4", "--channels", "4"), ()),
    "recover": (("recover", "STUDENT", "--output", "OUT", "--text", "TEXT", *TRAIN), ()),
    "recover, layers": (
        ("recover", "STUDENT", "--output", "OUT", "--text", "TEXT", *TRAIN, "--mode", "layer"),
        (),
    ),
    "compress": (COMPRESS, ()),
    "compress, choice": (("compress", "MODEL", "READ", "--repair", "layer"), ()),
    "compress, repair": ((*COMPRESS, "--repair", "layer"), ()),
    "compress, gptq": ((*COMPRESS, *GPTQ), ()),
    "compress, again": ((*COMPRESS, "--overwrite", "--seed", "1"), (COMPRESS,)),
}  # fmt: skip


def one_run(out: Path, at: int, log: Path, arguments: list[str]) -> None:
    """The body of a process: run a command and die at an event; a log gets the number of events."""
    with open(log, "w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    states.MEMORY_STATES = 0  # states go to scratch files
    client.free_memory = lambda: 0  # transformers is not asked
    with counting(out, at, lambda event: os.kill(os.getpid(), signal.SIGKILL)) as seen:
        code = command.run("--quiet", *arguments)
    print(f"\nevents {len(seen)}", flush=True)
    sys.exit(code)


def started(out: Path, at: int, arguments: list[str]) -> tuple[int, str]:
    """Run a command in a process that dies at event `at`, or with 0 not; its code and its log."""
    log = out.with_suffix(".log")
    # A fork: torch and jax are imported once, and neither has begun to work here.
    child = FORKS.Process(target=one_run, args=(out, at, log, arguments))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode, log.read_text()


def ended(out: Path, arguments: list[str]) -> int:
    """Run a command to its end; the number of its file events."""
    code, printed = started(out, 0, arguments)
    if code:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{printed}")
    return int(printed.rsplit("events ", 1)[1])


def kill_stage(name: str, points: int, home: Path, rng: random.Random) -> tuple[int, list[str]]:
    """Number of file events of a stage, and what went wrong at which."""
    wanted_command, before = STAGES[name]

    def words(line, out: Path) -> list[str]:
        read = command.read(home, out)
        places = {
            "MODEL": [home / "model"], "OUT": [out], "TEXT": [home / "good.txt"],
            "GIVEN": (*read, "--planner", "fair"), "READ": (*read, "--window", "32"),
            "STUDENT": [home / "student"],
        }  # fmt: skip
        return [str(word) for part in line for word in places.get(part, [part])]

    calm, out, faults = home / "calm", home / "out", []
    for folder in (calm, out):
        shutil.rmtree(folder, ignore_errors=True)
    for line in before:
        ended(calm, words(line, calm))
    start = home / "start"
    shutil.rmtree(start, ignore_errors=True)
    if before:
        shutil.copytree(calm, start)
    events = ended(calm, words(wanted_command, calm))
    wanted = contents(calm)
    for at in sorted(rng.sample(range(1, events + 1), min(points, events))):
        shutil.rmtree(out, ignore_errors=True)
        if before:
            shutil.copytree(start, out)
            recipe = out / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace(str(calm), str(out)))
        killed, _ = started(out, at, words(wanted_command, out))
        left = contents(out)
        whole = all(left.get(name) == value for name, value in wanted.items())
        again, printed = started(out, 0, words(wanted_command, out))
        found = contents(out)
        differ = {n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)}
        # Killed in its last moments a command has ended, and `export` replaces nothing unasked.
        ended_before = whole and "already exist; add --overwrite" in printed
        if killed != -signal.SIGKILL or (again and not ended_before) or differ:
            faults.append(
                f"event {at}: {killed}, then {again}, differ {sorted(differ)}, {printed[-300:]}"
            )
    return events, faults


def main() -> int:
    """Print a line for each stage; 1 if one ended otherwise than undisturbed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, bad = random.Random(options.seed), 0
    gc.freeze()  # every stage collects garbage, of which imports are none
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model = tiny.tiny_model("qwen2_moe", seed=0, **command.SIZES)
        tiny.add_tokenizer(tiny.save(model, home / "model"))
        (home / "good.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
        if any("STUDENT" in STAGES[name][0] for name in options.stages):
            for words in (("score", home / "model", *command.given(home, home / "student")),
                          ("plan", home / "student", "--prune-rate", "0.5")):  # fmt: skip
                ended(home / "student", list(map(str, words)))
        print(f"{'stage':16} {'events':>6} {'killed':>6} {'differ':>6}")
        for name in options.stages:
            events, faults = kill_stage(name, options.points, home, rng)
            points = min(options.points, events)
            print(
                f"{name:16} {events:6} {points:6} {len(faults):6}", *faults, sep="\n  ", flush=True
            )
            bad += len(faults)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
