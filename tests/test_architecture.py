"""Imports point one way: moe_jax <- convert <- pruning, read from the source with `ast`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("moe_jax", "convert", "pruning")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
# The command and its stages join method and files. `commands` are the bodies of `cli`, `verify`
# the stage that reads an export back.
GLUE = {"pipeline", "cli", "commands", "__main__", "evaluate", "stages", "verify", "demo"}
GLUE |= {"preflight", "output_folder", "sizes", "gptq_stage", "audit_stage", "compare"}
GLUE |= {"scoring", "planning", "parts", "apply_stage", "sweep_stage"}
GLUE |= {"clients", "estimate", "stored", "card_stage"}


def imports(name: str) -> set[str]:
    """Full names that a module imports anywhere, also inside functions and TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; write the full name"
            assert node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name)}


def test_all_three_packages_are_read():
    assert {name.split(".")[0] for name in FILES} == set(PACKAGES)
    assert "convert" in packages("pruning.stages") and "moe_jax" in packages("convert.rules")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("moe_jax", {"convert", "pruning", "tests"}), ("convert", {"pruning", "tests"})],
)
def test_lower_packages_import_nothing_from_above(package, forbidden):
    wrong = {
        name: sorted(packages(name) & forbidden)
        for name in FILES
        if name.split(".")[0] == package and packages(name) & forbidden
    }
    assert not wrong


def test_only_the_glue_of_pruning_imports_convert():
    users = {
        name.split(".")[1]
        for name in FILES
        if name.startswith("pruning.") and "convert" in packages(name)
    }
    assert users <= GLUE


def test_method_files_reach_no_converter_through_other_files():
    """Following imports inside pruning from a method file never meets a file with converters."""
    for name in FILES:
        parts = name.split(".")
        if parts[0] != "pruning" or parts[1] in GLUE | {"__init__"}:
            continue
        waiting, seen = [name], set()
        while waiting:
            current = waiting.pop()
            seen.add(current)
            assert "convert" not in packages(current), f"{name} reaches convert through {current}"
            inside = {i for i in imports(current) if i in FILES and i.startswith("pruning.")}
            waiting += inside - seen


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
