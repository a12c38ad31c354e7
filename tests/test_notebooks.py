"""Every notebook runs from top to bottom, draws what it promises, and needs nothing private."""

import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Instead of a notebook's own parameters: what it draws does not depend on how much text it reads.
FEW = {
    "CALIBRATION_TOKENS": 512,
    "LESS_TEXT": [128],
    "SAMPLE_TOKENS": 256,
    "ABLATION_TOKENS": 64,
    "ABLATED_EXPERTS": 12,
    "EVALUATION_TOKENS": 64,
    "TRAINING_STEPS": 2,
    "TRAINING_TOKENS": 512,
    "TRAINED": ["full"],
    "COMPARED": ["random", "fair-act"],
    "BLOCKS": [32],
    "LEAST_WIDTHS": [128],
    "WINDOW": 32,
}
FACES = {"moe_jax", "convert", "pruning"}
MAY_IMPORT = FACES | {"numpy", "matplotlib"} | sys.stdlib_module_names
DRAWS = re.compile(r"^(\w+\.)?plot_\w+\(|plt\.|display\(", re.MULTILINE)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_figures_and_nothing_of_a_machine(path):
    cells = code_cells(nbformat.read(path, 4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert_drawn(cells)
    for output in (output for cell in cells for output in cell.outputs):
        assert output.get("name", "stdout") == "stdout", f"progress or warnings:\n{output.text}"
        told = {k: v for k, v in output.get("data", output).items() if k != "image/png"}
        assert not re.search(r"(?<![\w.<])/(home|root|tmp|usr|work|Users)/", json.dumps(told))
    assert not any("execution" in cell.metadata for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_only_faces_numpy_matplotlib_and_the_standard_library(path):
    modules = [name for cell in code_cells(nbformat.read(path, 4)) for name in imported(cell)]
    assert FACES & set(modules)
    for name in modules:
        top, _, inner = name.partition(".")
        assert top in MAY_IMPORT and not (top in FACES and inner), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of zmq and tornado, not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_shows_its_plots(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "work").mkdir()
    notebook = nbformat.read(path, 4)
    shorten(notebook)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "work")}},
    )
    client.execute()  # a failing cell raises with its traceback
    assert len(assert_drawn(code_cells(notebook))) >= 3


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assert_drawn(cells: list) -> list:
    """The cells that draw, each of which must have a picture among its outputs."""
    drawing = [cell for cell in cells if DRAWS.search(cell.source)]
    for cell in drawing:
        images = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        assert images, f"no plot from:\n{cell.source}"
    return drawing


def imported(cell) -> list[str]:
    """Full names of the modules that a cell imports from."""
    tree = ast.parse(re.sub(r"(?m)^%.*", "", cell.source))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    return found


def shorten(notebook) -> None:
    """Replace the numbers in a cell tagged "parameters" by those of a quick run."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            names = re.findall(r"(?m)^(\w+) =", cell.source)
            cell.source = "\n".join(f"{name} = {FEW[name]!r}" for name in names)
