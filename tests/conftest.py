"""No network, no account, one thread, and folders of its own for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

os.environ["OMP_NUM_THREADS"] = "1"

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from tiny import save_checkpoint

from emloc.store import Store

torch.set_num_threads(1)


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
def checkpoint(tmp_path_factory):
    """A random two-layer Llama with its tokenizer, saved as any checkpoint is."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), chat=True)


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    """A folder in GSM8K's columns: additions to learn, and others to be asked."""
    folder = tmp_path_factory.mktemp("sums")
    for split, start, count in (("train", 0, 40), ("test", 100, 6)):
        rows = [
            {"question": f"{i} + {i + 1}?", "answer": f"adding\n#### {2 * i + 1}"}
            for i in range(start, start + count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


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


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


@pytest.fixture
def emloc(tmp_path):
    """Run the command in a folder of its own and return how it ended."""

    def run(*arguments: str, program=(sys.executable, "-m", "emloc"), **env: str) -> Ran:
        done = subprocess.run(
            [*program, *arguments],
            cwd=tmp_path,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def one_run(tmp_path):
    """The only run folder below `name`."""

    def find(name: str = "adhoc") -> Path:
        (status,) = (tmp_path / "runs" / name).glob("*/status.json")
        return status.parent

    return find
