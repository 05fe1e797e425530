"""Which job a line of the console is about, where several write to it."""

import io
import logging
from multiprocessing import current_process

import pytest

from emloc.sweeps.named_lines import name_console_lines


@pytest.fixture
def handlers(tmp_path, monkeypatch):
    """The console's and the file's, as Hydra sets them up."""
    console, file = logging.StreamHandler(io.StringIO()), logging.FileHandler(tmp_path / "run.log")
    monkeypatch.setattr(logging.getLogger(), "handlers", [console, file])
    yield console, file
    file.close()


def lines(handlers) -> tuple[str, str]:
    for message in ("train: step 1 of 2", "lora-s0: done"):
        logging.getLogger("emloc").warning(message)
    console, file = handlers
    file.flush()
    with open(file.baseFilename) as stream:
        return console.stream.getvalue(), stream.read()


def test_a_worker_names_its_run_once_a_line_and_on_the_console_alone(handlers, monkeypatch):
    monkeypatch.setattr(current_process(), "_name", "LokyProcess-1")
    name_console_lines("lora-s0")
    console, file = lines(handlers)
    said = [line.split("] ")[1] for line in console.splitlines()]
    assert said == ["lora-s0: train: step 1 of 2", "lora-s0: done"]
    assert file == "train: step 1 of 2\nlora-s0: done\n"


def test_one_job_after_the_other_needs_no_names(handlers):
    name_console_lines("lora-s0")
    assert lines(handlers)[0] == "train: step 1 of 2\nlora-s0: done\n"
