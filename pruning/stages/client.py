"""What transformers makes of an exported folder, asked of another process, which may die."""

import atexit
import contextlib
import functools
import importlib.util
import json
import math
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.export import Export
from convert.export_format import FLOAT8_BLOCK
from convert.families import FAMILIES
from moe_jax.config import AttentionConfig
from pruning.kit.memory import allowance, free_memory
from pruning.kit.words import amount, duration
from pruning.stages.probe_windows import PROBE_TOKENS, Probe, WindowShape, compared

PROGRAM = Path(__file__).with_name("client_process.py")
# Of torch and transformers themselves, and of what they hold beside the weights for a moment.
PROCESS_BYTES, SHARE = 896 << 20, 1.25
TOGETHER = 512  # tokens that are run at a time; of longer windows one
SCORES_HELD = 4  # of a layer's attention as float32: they, with a mask, their softmax, and its copy
PATIENCE, PER_SECOND = 900, 5 << 20  # seconds for a folder of no size, bytes that take one more
TAIL = 2000  # characters of what a process printed last

Ids = list[list[int]]  # of every text


@dataclass(frozen=True)
class Answer:
    """What a program makes of a folder, or why that is not known.

    Attributes:
      logits: of each of the windows float32 [B, P, V], or of the first ones; None without.
      loading: what it says of missing, unexpected or misshaped tensors, by kind.
      fault: what went wrong with the folder, "" if nothing.
      undone: why nobody knows, be it only of the last windows; "" if somebody does.
    """

    logits: list[np.ndarray] | None = None
    loading: dict[str, list[str]] | None = None
    fault: str = ""
    undone: str = ""


def client_bytes(export: Export, shapes: Sequence[WindowShape]) -> int:
    """Bytes of memory that transformers takes for the logits of a folder, an upper estimate.

    It holds every weight as float32, dequantised, and in passing some of them twice; of the windows
    that it runs at a time the scores of a layer's attention, and what its experts make of them.

    Args:
      export: what the folder holds.
      shapes: of windows on whose ends logits are compared.
    """
    c = export.base.config
    weights = sum(math.prod(stored.shape) for stored in export.tensors.values())
    weights += sum(math.prod(shape) for _, shape in export.base.beside.values())
    logits = 3 * compared(shapes) * c.vocab_size
    # torch never holds the scores of all heads unless heads differ in width or have sinks.
    grouped = isinstance(c.attention, AttentionConfig) and not c.attention.sinks
    heads = 1 if grouped else c.attention.num_heads
    work = 0
    for windows, length, _ in shapes:
        tokens = length * max(1, min(windows, TOGETHER // length))
        row = c.moe.experts_per_token * 4 * (c.moe.d_expert + c.d_model)
        work = max(work, tokens * (SCORES_HELD * heads * length + row))
    return PROCESS_BYTES + int(4 * (SHARE * weights + logits + work))


def uneven_blocks(export: Export) -> str:
    """Why transformers, which takes all blocks to be of one size where it dequantises, cannot read
    an export in 8-bit floats; "" if it can. Its kernels for GPUs can."""
    for name, stored in export.tensors.items() if export.form.is_float8 else ():
        if stored.packed and any(n > FLOAT8_BLOCK and n % FLOAT8_BLOCK for n in stored.shape):
            return (
                f"{name} {list(stored.shape)} ends with an incomplete block of {FLOAT8_BLOCK}, "
                "which transformers reads rightly on a GPU only"
            )
    return ""


def client_answer(folder: Path, export: Export, probe: Probe) -> Answer:
    """Logits of a folder in transformers, where it is installed and its memory is free.

    Args:
      folder: an export whose code and config.json are known to be ours.
      export: what it holds.
      probe: windows; logits are of their last `PROBE_TOKENS`. Are the last too long for the memory,
        it is asked about the others.
    """
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return Answer(undone="torch and transformers are not installed")
    if uneven := uneven_blocks(export):
        return Answer(undone=uneven)
    shapes, free = [some.shape for some in probe], free_memory()
    undone = ""
    while shapes and (needed := client_bytes(export, shapes)) > free:
        undone = (
            f"it needs about {amount(needed)} of memory and {amount(free)} are free; run "
            "`moe-compress verify` on a larger machine"
        )
        shapes.pop()
    if not shapes:
        return Answer(undone=undone)
    asked = probe[: len(shapes)]
    with tempfile.TemporaryDirectory(prefix="moe-client-") as exchange:
        for number, some in enumerate(asked):
            np.save(Path(exchange) / f"tokens-{number}.npy", some.tokens, allow_pickle=False)
        request = {
            "folder": str(folder.absolute()),
            "trust": bool(export.code_files),
            "auto_class": export.base.family.auto_class,
            "storage": export.form.storage,
            "known": (export.base.outer or export.config)["model_type"] in FAMILIES,
            "last": PROBE_TOKENS,
            "together": TOGETHER,
            "strides": [some.stride for some in asked],
            "exchange": exchange,
        }
        patience = PATIENCE + export.nbytes / PER_SECOND
        try:
            code = _ask(json.dumps(request), patience)
        except TimeoutError:
            return Answer(undone=f"the process gave no answer in {duration(patience)}")
        except OSError as error:
            return Answer(undone=str(error))
        return _read(Path(exchange), code, len(asked), undone)


def client_ids(
    folders: Sequence[Path], texts: Sequence[str], trusted: Sequence[Path] = ()
) -> list[Ids | str]:
    """Token ids of texts by the tokenizer of each folder in transformers, or why there are none.

    No code of a folder is run but that of `trusted` ones, where it does not load without.
    """
    if not importlib.util.find_spec("transformers"):
        return ["it is not installed"] * len(folders)
    if PROCESS_BYTES > (free := free_memory()):
        why = f"it needs about {amount(PROCESS_BYTES)} of memory and {amount(free)} are free"
        return [why] * len(folders)
    with tempfile.TemporaryDirectory(prefix="moe-client-") as exchange:
        places = [str(folder.absolute()) for folder in folders]
        request = {"folders": places, "texts": list(texts), "exchange": exchange}
        request["trusted"] = [str(folder.absolute()) for folder in trusted]
        try:
            _ask(json.dumps(request), PATIENCE)
        except (TimeoutError, OSError) as error:
            return [str(error) or "the process gave no answer"] * len(folders)
        answer = Path(exchange) / "ids.json"
        if answer.exists():
            return json.loads(answer.read_text())
        reason = Path(exchange) / "undone.txt"
        why = reason.read_text() if reason.exists() else "the process ended without an answer"
        return [why] * len(folders)


def _read(exchange: Path, code: int, asked: int, undone: str) -> Answer:
    """What a process left that ended with this code and was asked about so many windows, not about
    others for the reason `undone`."""
    reason, loading = exchange / "undone.txt", exchange / "loading.json"
    if reason.exists():
        return Answer(undone=reason.read_text())
    if code == -signal.SIGKILL:
        return Answer(undone="the process was killed, as systems do where memory ends")
    if code or not loading.exists():
        log = exchange / "log.txt"
        ending = f"ended with code {code}" if code >= 0 else signal.Signals(-code).name
        return Answer(fault=f"{ending}: {_tail(log.read_bytes() if log.exists() else b'')}")
    logits = [np.load(exchange / f"logits-{i}.npy", allow_pickle=False) for i in range(asked)]
    return Answer(logits=logits, loading=json.loads(loading.read_text()), undone=undone)


def _tail(printed: bytes) -> str:
    return " ".join(printed.decode(errors="replace").split())[-TAIL:]


class _Process:
    """The program that answers requests, and ends by itself when none come."""

    def __init__(self):
        self._printed = tempfile.TemporaryFile()
        self._modules = tempfile.mkdtemp(prefix="moe-client-")
        pipe = subprocess.PIPE
        # -P: the folder we are in may hold a torch.py.
        command = [sys.executable, "-P", str(PROGRAM), self._modules]
        self._running = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._printed)
        atexit.register(self.end)

    def ask(self, request: str, patience: float) -> int | None:
        """The exit code of the fork that did it; None if the program had ended, or was about to.

        Raises:
          TimeoutError: it took longer than `patience`, in seconds.
          ChildProcessError: the program itself died.
        """
        running = self._running
        assert running.stdin is not None and running.stdout is not None
        try:
            running.stdin.write(request.encode() + b"\n")
            running.stdin.flush()
        except BrokenPipeError:
            pass
        answers = select.poll()
        answers.register(running.stdout, select.POLLIN)
        if not answers.poll(1000 * patience):
            raise TimeoutError
        if line := running.stdout.readline():
            return int(line)
        if code := running.wait():
            self._printed.seek(0)
            how = f"code {code}" if code > 0 else signal.Signals(-code).name
            raise ChildProcessError(f"its process ended with {how} {_tail(self._printed.read())}")
        return None

    def end(self) -> None:
        """End the program, and with its pipe the fork that works for it."""
        atexit.unregister(self.end)
        self._running.kill()
        with contextlib.suppress(BrokenPipeError), self._running, self._printed:
            pass
        shutil.rmtree(self._modules, ignore_errors=True)


_process = functools.cache(_Process)


def _ask(request: str, patience: float) -> int:
    """As of `_Process.ask`, of the program that runs or of a new one."""
    for _ in range(2):
        process = _process()
        try:
            code = process.ask(request, patience)
        except BaseException:  # also of a key pressed: its answer would come to another
            _end()
            raise
        if code is None or allowance().limit is not None:  # what waits for more takes memory, too
            _end()
        if code is not None:
            return code
    raise ChildProcessError("its process ended without an answer")


def _end() -> None:
    _process().end()
    _process.cache_clear()
