"""Strict numerics for every test: no silent promotion, no reduced-precision matmuls."""

import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Workers and what they start share the cores: a second thread of a small product only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where transformers copies a checkpoint's code to import it: one folder a worker for all tests,
# because Python remembers the first one, and two workers would write the same files.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="moe-jax-tests-code-")
# Where Python may not write beside its sources, every process that a test starts would compile
# jax, torch and transformers anew: four seconds of its six.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.pycache_prefix = f"{tempfile.gettempdir()}/moe-jax-tests-python-{os.getuid()}"
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# Compiling is most of the suite's time: compile fast instead of well, and nothing twice. The
# fusion emitters alone take half of a compilation; two workers leave no core for parts of one.
# Later versions than 0.10 end the process at that flag, which they no longer know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/moe-jax-tests-{os.getuid()}"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

from moe_jax.programs import free_programs

# How long a first example takes says how busy the machine is, and fails no test.
hypothesis.settings.register_profile(
    "suite", suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_files():
    """A worker that kept every file's programs would run out of memory maps in some ten minutes."""
    free_programs()
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """At exit would be too late: workers of xdist end without."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_runtest_setup():
    """Every stage of a command collects garbage, and would look at all that was ever imported."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: one of them at the end would leave a worker idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def scratch_files(monkeypatch) -> list[int]:
    """Bytes of every scratch file that is made, in their order."""
    sizes, allocate = [], os.posix_fallocate

    def allocating(descriptor: int, start: int, size: int) -> None:
        sizes.append(size)
        allocate(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", allocating)
    return sizes


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """One tiny model as a single file, as shards, and with other weights."""
    from tests.support import command, tiny

    folder = tmp_path_factory.mktemp("models")
    for name, seed, arguments in (
        ("single", 0, {}), ("sharded", 0, {"max_shard_size": "100KB"}), ("other", 1, {}),
    ):  # fmt: skip
        model = tiny.tiny_model("qwen2_moe", seed=seed, **command.SIZES)
        tiny.add_tokenizer(tiny.save(model, folder / name, **arguments))
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "good.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("x" * 63)
    (folder / "one.txt").write_text("x")
    (folder / "latin.txt").write_bytes("Über".encode("latin-1") * 100)
    (folder / "broken.jsonl.gz").write_bytes(b"\x1f\x8b\x08 no gzip after all")
    (folder / "lines.jsonl").write_text('{"body": "x"}\n')
    return folder


@pytest.fixture(scope="session")
def scored(models, texts, tmp_path_factory) -> Path:
    """Statistics, a plan and one export of the single model."""
    from tests.support import command

    out = tmp_path_factory.mktemp("scored") / "out"
    assert command.run("score", models / "single", *command.given(texts, out), "--bits", 16) == 0
    assert command.run("plan", out, "--prune-rate", 0.5) == 0
    assert command.run("export", out, "--export", "ragged-bf16") == 0
    return out
