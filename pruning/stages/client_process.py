"""A program of its own: the logits of folders in transformers, each in a fork that may die.

`pruning.stages.client` starts it by its path, so it imports nothing of ours and above all no jax.
torch and transformers take seconds to import and are imported once. Each line of standard input is
a request, a JSON object:

  folder: the checkpoint.
  trust: whether the Python file in it is run; the caller has compared its bytes.
  auto_class: of transformers, which loads the model.
  storage: how weights are stored, as `convert.export_format` calls it.
  known: whether every transformers has its class; of others it may know nothing.
  last: of how many last positions P of a sequence logits are wanted, or of all if it has fewer.
  together: how many tokens are run at a time, if a sequence is not longer.
  strides: of each of the files of tokens, positions from a token to the next.
  exchange: a folder with tokens-0.npy, int32 [B, T], and further ones. It gets logits-0.npy,
    float32 [B, P, V], and so on, loading.json, what loading said of the tensors, and log.txt, what
    was printed. loading.json comes last; in its place comes undone.txt with the reason if something
    but the folder is at fault.

or, for token ids:

  folders: the checkpoints.
  texts: that their tokenizers are given; no code of theirs is run.
  exchange: gets ids.json, for each folder a list of ids by text, or the reason why there is none.

Each line of standard output is the exit code of a fork, negative for a signal. The program ends
with its standard input, which is with the process that started it, or after five minutes without
work. Its argument is a folder for code of checkpoints that is imported. Whoever ends last of the
two processes removes that folder and the exchange: either may be killed.
"""

import contextlib
import json
import os
import select
import shutil
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

IDLE = 300  # seconds
UNKNOWN = ("does not recognize this architecture", "Unrecognized configuration class")
NO_GPU = "No GPU or XPU found"  # transformers 4 of 8-bit floats, asked to dequantise them or not
FULL = ("can't allocate memory", "not enough memory", "std::bad_alloc")  # as torch says it


def serve() -> None:
    """Answer requests until there are none."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    sys.addaudithook(_no_network)
    modules = sys.argv[1]
    try:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        # Once for all forks: what every folder needs, and what those of 4 bits do.
        import transformers.generation
        import transformers.modeling_utils  # noqa: F401

        with contextlib.suppress(ImportError):
            import compressed_tensors.quantization  # noqa: F401

        while select.select([0], [], [], IDLE)[0] and (line := sys.stdin.readline()):
            child = os.fork()
            if not child:
                _run(json.loads(line))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # the next line of input is its end
                print(code, file=answers)
    finally:
        shutil.rmtree(modules, ignore_errors=True)


def _no_network(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError("the check of an export uses no network")


def _run(request: dict) -> None:
    """Do one request and end the process."""
    exchange, code = Path(request["exchange"]), 1
    log = os.open(exchange / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with contextlib.suppress(OSError):  # if memory ends, this process goes and not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    threading.Thread(target=_end_with_input, args=(exchange,), daemon=True).start()
    try:
        warnings.simplefilter("ignore")
        answer = _tokenize if "texts" in request else _answer
        answer(request, exchange)
        code = 0
    except ImportError as error:
        (exchange / "undone.txt").write_text(str(error))
    except BaseException as error:
        lacks = not request.get("known", True) and any(words in str(error) for words in UNKNOWN)
        lacks |= request.get("storage") == "fp8" and str(error).startswith(NO_GPU)
        if lacks:
            (exchange / "undone.txt").write_text(str(error).splitlines()[0])
        elif isinstance(error, MemoryError) or any(words in str(error) for words in FULL):
            (exchange / "undone.txt").write_text("its memory ran out")
        else:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_input(exchange: Path) -> None:
    """The caller writes nothing while it waits: its pipe only ends, with the caller."""
    os.read(0, 1)
    shutil.rmtree(exchange, ignore_errors=True)
    os._exit(1)


def _answer(request: dict, exchange: Path) -> None:
    import numpy as np
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if request["storage"] in ("mxfp4", "fp8"):
        # Its kernels would need a GPU, and round activations; this way the values are exact.
        from transformers.utils import quantization_config as known

        kind = known.Mxfp4Config if request["storage"] == "mxfp4" else known.FineGrainedFP8Config
        options["quantization_config"] = kind(dequantize=True)
    loaded: Any = getattr(transformers, request["auto_class"]).from_pretrained(
        request["folder"],
        dtype=torch.float32,
        trust_remote_code=request["trust"],
        output_loading_info=True,
        local_files_only=True,
        **options,
    )
    model, info = loaded
    model = torch.nn.Module.float(model).eval()  # quantised models refuse their own .float
    for number, stride in enumerate(request["strides"]):
        place = exchange / f"tokens-{number}.npy"
        tokens = torch.from_numpy(np.load(place, allow_pickle=False)).long()
        options = {"logits_to_keep": request["last"]}
        with torch.no_grad():
            logits = [
                model(some, **_positions(some, stride), **options).logits.float()
                for some in tokens.split(max(1, request["together"] // tokens.shape[1]))
            ]
        found = place.with_name(place.name.replace("tokens", "logits"))
        np.save(found, torch.cat(logits).numpy(), allow_pickle=False)
    said = {key: [str(one) for one in value] for key, value in info.items()}
    (exchange / "loading.json").write_text(json.dumps(said))


def _positions(tokens: Any, stride: int) -> dict[str, Any]:
    """What tells a model that its tokens [B, T] stand apart, in one text all the same."""
    import torch

    if stride == 1:
        return {}
    places = (stride * torch.arange(tokens.shape[1])).expand(tokens.shape)
    return {"position_ids": places, "attention_mask": torch.ones_like(tokens)}


def _tokenize(request: dict, exchange: Path) -> None:
    from transformers import AutoTokenizer

    found = []
    for folder in request["folders"]:
        # The configuration of a type of our own is read by our code alone, if it stretches a rope.
        for trusted in (False, True) if folder in request["trusted"] else (False,):
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=trusted, local_files_only=True
                )
                ids = [tokenizer(text)["input_ids"] for text in request["texts"]]
            except Exception as error:  # whatever its classes raise
                ids = " ".join(str(error).split())[:300] or type(error).__name__
            if not isinstance(ids, str):
                break
        found.append(ids)
    (exchange / "ids.json").write_text(json.dumps(found))


if __name__ == "__main__":
    serve()
