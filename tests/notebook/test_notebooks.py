"""Every notebook is short, is stored without outputs, and runs in Jupyter without an error."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

HOME = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(HOME.glob("*.ipynb"))
CELLS = 11  # most cells of a notebook
LINES = 5  # most lines of a function or class that a notebook defines
SECONDS = 240  # time limit of one cell
MAGIC = "%matplotlib inline"

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    return book


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def parsed(path):
    """Return the syntax tree of all code cells, without the only allowed magic command."""
    lines = "\n".join(cell.source for cell in code(path)).splitlines()
    return ast.parse("\n".join(line for line in lines if line != MAGIC))


@pytest.fixture(scope="session")
def shared_cache(shared):
    """One stage cache for all notebooks, as for a reader who runs them in order."""
    return shared / "cache_of_notebooks"


def test_all_five_notebooks_exist():
    stems = {path.stem for path in NOTEBOOKS}
    first_four = {"01_one_layer", "02_first_run", "03_read_results", "04_compression_ratio"}
    assert stems >= first_four | {"05_anchors"}


@every
def test_is_short(path):
    assert 3 <= len(read(path).cells) <= CELLS


@every
def test_is_stored_without_outputs_and_execution_counts(path):
    for cell in code(path):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert all(set(cell.metadata) <= {"tags"} for cell in read(path).cells)


@every
def test_defines_only_very_short_functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(parsed(path)):
        if isinstance(node, kinds):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            assert node.end_lineno - first < LINES, node.name


@every
def test_asserts_its_own_numbers(path):
    assert any(isinstance(node, ast.Assert) for node in ast.walk(parsed(path)))


@every
def test_begins_with_its_title_and_explains_its_code(path):
    kinds = [cell.cell_type for cell in read(path).cells]
    assert read(path).cells[0].source.startswith("# ")
    assert kinds.count("markdown") >= kinds.count("code")


@every
def test_links_to_notebooks_that_exist(path):
    for cell in read(path).cells:
        for part in cell.source.split("](")[1:]:
            target = part.partition(")")[0]
            assert not target.endswith(".ipynb") or (HOME / target).exists(), target


@pytest.mark.timeout(600)
@every
def test_runs_from_its_own_folder_and_writes_no_file_there(
    path, shared_cache, fork_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("EMLOC_CACHE", str(shared_cache))
    # Jupyter starts this as its kernel, and so do the notebooks that run the command.
    monkeypatch.setattr(sys, "executable", str(fork_server.python))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    before = sorted(HOME.rglob("*"))
    book = read(path)
    resources = {"metadata": {"path": str(HOME)}}
    NotebookClient(book, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    assert sorted(HOME.rglob("*")) == before
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
