"""No network, no account, one thread, and folders of its own for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

os.environ["OMP_NUM_THREADS"] = "1"

import gc
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import labelled
import pytest
import torch
from command import Command
from filelock import FileLock
from tiny import save_checkpoint

from emloc.runtime.stage_cache import Store

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--own-stores",
        action="store_true",
        help="let every test go through its stages itself: what it takes part in is seen then",
    )


@pytest.fixture(autouse=True, scope="module")
def _spare_the_collector():
    """Python's collector looks no more at what is there already, which is mostly libraries.

    The package collects before and behind each stage: most of what a stage on a tiny model takes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Caches and runs of this test alone."""
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EMLOC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of this session alone, one for all its workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(shared) -> Callable[[str, Callable[[Path], object]], Path]:
    """Folder of that name in `shared`, filled by whichever worker asks for it first."""

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
    """A random two-layer Llama with its tokenizer, saved as any checkpoint is."""
    return made_once("checkpoint", save_checkpoint)


@pytest.fixture(scope="session")
def sums(made_once):
    """A folder in GSM8K's columns: additions to learn, and others to be asked."""
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
    """A language model, of which a classifier takes all but the head."""
    return made_once("roberta", labelled.write_roberta)


@pytest.fixture(scope="session")
def vit(made_once):
    """An encoder saved by itself: the names of its tensors begin below the classifier's."""
    return made_once("vit", labelled.write_vit)


@pytest.fixture(scope="session")
def texts(made_once):
    """Rows whose first letter tells the class and the vector; lengths differ."""
    return made_once("texts", labelled.write_texts)


@pytest.fixture(scope="session")
def images(made_once):
    """Dark images and light ones."""
    return made_once("images", labelled.write_images)


@pytest.fixture
def tiny(checkpoint, sums):
    """Overrides of a run that takes a second: tiny model, tiny data, five steps, no tracker."""
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


@pytest.fixture
def emloc(tmp_path, request):
    """Run the command in a folder of its own and return how it ended."""
    return Command(tmp_path, lambda: request.getfixturevalue("capfd"))


@pytest.fixture
def one_run(tmp_path):
    """The only run folder below `name`."""

    def find(name: str = "adhoc") -> Path:
        (status,) = (tmp_path / "runs" / name).glob("*/status.json")
        return status.parent

    return find
