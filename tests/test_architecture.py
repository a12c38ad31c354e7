"""Imports point one way: contracts of import-linter in pyproject.toml, and what they cannot say."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("moe_jax", "convert", "pruning")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def test_every_contract_of_the_layout_is_kept():
    code = "from importlinter.cli import lint_imports_command as c; c()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout, done.stdout


def test_importing_the_library_needs_no_test_dependency():
    """Torch and its friends may be imported inside functions only, where they are optional."""
    heavy = {"torch", "transformers", "pytest", "hypothesis", "compressed_tensors"}
    for name, path in FILES.items():
        # The modelling file of an export runs in the reader's environment, where torch is.
        if name.startswith("convert.formats.modeling_"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {module.split(".")[0] for module in found}, name
