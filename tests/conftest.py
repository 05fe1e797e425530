"""Fixtures for all tests: no network, no account, one thread, own folders for each test.

The process that starts the workers reads this file, too. It runs no test, so libraries that take
seconds to import are imported where they are used.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

os.environ["OMP_NUM_THREADS"] = "1"

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# On a busy machine a single example may take long, which says nothing about the code.
settings.register_profile("emloc", deadline=None)
settings.load_profile("emloc")


def pytest_addoption(parser):
    parser.addoption(
        "--own-stores",
        action="store_true",
        help="give every test an empty stage cache, to see all lines that a test depends on",
    )


def pytest_collection_modifyitems(items):
    """Run folders with long tests first, so that short tests fill up both workers at the end."""
    order = ["notebook", "cli", "extensions", "stage"]
    folders = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    items.sort(key=lambda item: [folders[item] != folder for folder in order])


def pytest_collectstart():
    """Import test modules in less time, as the command does with the libraries."""
    from emloc.runtime.imports import import_without_compiler

    gc.disable()
    import_without_compiler("bitsandbytes")


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _freeze_existing_objects():
    """Exclude all existing objects, mostly those of libraries, from garbage collection.

    The package collects garbage before each stage. Without this fixture the collection
    would take most of the time of a stage on a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_collection_before_each_stage():
    """Leave garbage to Python: the memory of a tiny model is never compared, except in processes.

    The package collects garbage before it measures the memory of a stage, and accelerate before
    each training. In stages that take a tenth of a second this would be a tenth of all time.
    """
    from types import SimpleNamespace

    import torch
    from accelerate.utils import memory as accelerate_memory

    from emloc.runtime import memory

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            for module in (memory, accelerate_memory):
                patch.setattr(module, "gc", SimpleNamespace(collect=int))
        yield


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Set the folders for caches, runs and datasets to folders that only this test uses."""
    import datasets

    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EMLOC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def set_umask() -> Iterator[Callable[[int], int]]:
    """Function that sets the umask of this process; the test's end restores it."""
    before = os.umask(0o022)
    try:
        yield os.umask
    finally:
        os.umask(before)


@pytest.fixture
def store(tmp_path):
    from emloc.runtime.stage_cache import Store

    return Store(tmp_path / "cache")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this test session share."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(shared) -> Callable[[str, Callable[[Path], object]], Path]:
    """Function that returns a named folder in `shared` and fills the folder on the first call.

    A lock makes sure that only one worker fills the folder.
    """

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, draft = shared / name, shared / f"{name}.draft"
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                draft.mkdir()
                fill(draft)
                draft.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def checkpoint(made_once):
    """Folder with a checkpoint of a random two-layer Llama and its tokenizer."""
    from tiny import save_checkpoint

    return made_once("checkpoint", save_checkpoint)


@pytest.fixture(scope="session")
def sums(made_once):
    """Folder with a data set in the columns of GSM8K: 40 additions to train on, 6 held out."""
    return made_once("sums", _write_sums)


def _write_sums(folder: Path) -> None:
    for split, start, count in (("train", 0, 40), ("test", 100, 6)):
        rows = [
            {"question": f"{i} + {i + 1}?", "answer": f"adding\n#### {2 * i + 1}"}
            for i in range(start, start + count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)


@pytest.fixture(scope="session")
def roberta(made_once):
    """Folder with a RoBERTa language model; a classifier uses all its weights except the head."""
    import labelled

    return made_once("roberta", labelled.write_roberta)


@pytest.fixture(scope="session")
def vit(made_once):
    """Folder with a bare ViT encoder, whose tensor names lack the prefix of a classifier."""
    import labelled

    return made_once("vit", labelled.write_vit)


@pytest.fixture(scope="session")
def texts(made_once):
    """Folder with labelled texts of several lengths; the first letter decides class and vector."""
    import labelled

    return made_once("texts", labelled.write_texts)


@pytest.fixture(scope="session")
def images(made_once):
    """Folder with images of two classes, dark and light."""
    import labelled

    return made_once("images", labelled.write_images)


@pytest.fixture
def tiny(checkpoint, sums):
    """Overrides for a run of about one second: tiny model and data, five steps, no tracker."""
    return [
        f"model.source={checkpoint}",
        "model.dtype=float32",
        "task=gsm8k",
        f"task.path={sums}",
        "calibration.samples=6",
        "lora=r4",
        "train.steps=5",
        "train.batch=4",
        "train.log_every=1",
        "eval=quick",
        "tracker=none",
    ]


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """A process that has imported all libraries and forks."""
    from forked import fork_server

    with fork_server(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def emloc(tmp_path, request):
    """Function that runs the command in `tmp_path` and returns exit code and output."""
    from command import Command

    return Command(
        tmp_path,
        lambda: request.getfixturevalue("capfd"),
        lambda: request.getfixturevalue("fork_server"),
    )


@pytest.fixture
def only_svg(monkeypatch):
    """Figures of reports as SVG alone; `cli/test_report_page.py` tests all formats."""
    monkeypatch.setattr("emloc.report.page_figures._FORMATS", ("svg",))


@pytest.fixture
def one_run(tmp_path):
    """Function that returns the only run folder below `runs/<name>`."""

    def find(name: str = "adhoc") -> Path:
        (status,) = (tmp_path / "runs" / name).glob("*/status.json")
        return status.parent

    return find


@pytest.fixture
def every_place_marked(monkeypatch):
    """Let passes mark each place as finished, however fast they are."""
    monkeypatch.setattr("emloc.anchors.pass_states.MOST_REPEATED", 0)
