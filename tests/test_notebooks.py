"""Every notebook runs from top to bottom and draws what it promises."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Instead of a notebook's own parameters: what it draws does not depend on how much text it reads.
FEW = {
    "CALIBRATION_TOKENS": 512,
    "SAMPLE_TOKENS": 256,
    "ABLATION_TOKENS": 64,
    "ABLATED_EXPERTS": 12,
    "EVALUATION_TOKENS": 64,
    "COMPARED": ["random", "fair-act"],
    "BLOCKS": [32],
    "LEAST_WIDTHS": [128],
    "WINDOW": 32,
}
DRAWS = re.compile(r"^(\w+\.)?plot_\w+\(|plt\.|display\(", re.MULTILINE)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


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
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    drawing = [cell for cell in cells if DRAWS.search(cell.source)]
    for cell in drawing:
        images = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        assert images, f"no plot from:\n{cell.source}"
    assert len(drawing) >= 3


def shorten(notebook) -> None:
    """Replace the numbers in a cell tagged "parameters" by those of a quick run."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            names = re.findall(r"(?m)^(\w+) =", cell.source)
            cell.source = "\n".join(f"{name} = {FEW[name]!r}" for name in names)
