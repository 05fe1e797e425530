"""Files of factors are written by a thread, one at a time, and its errors are raised."""

import json
from threading import Event

import pytest
import torch
from safetensors.torch import load_file

from emloc.emulators.svd import factor_writer
from emloc.emulators.svd.factor_writer import FactorWriter
from emloc.emulators.svd.factors import factorize
from emloc.runtime.journal import Journal


def factors_of(seed: int):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return factorize({"h.0.b": weight, "h.0.a": weight}, {"h.0.b": 2, "h.0.a": 2}, None, "eigen")


def write_blocks(folder, count: int, then: type[BaseException] | None = None) -> None:
    """Write the files of some blocks, and then raise an error."""
    with FactorWriter(Journal(folder)) as writer:
        for number in range(count):
            writer.write(f"h.{number}", factors_of(number))
        if then is not None:
            raise then


def test_a_file_is_written_while_the_caller_goes_on(tmp_path, monkeypatch):
    go_on, write = Event(), factor_writer.write_safetensors

    def slow(*arguments):
        assert go_on.wait(timeout=60)
        write(*arguments)

    monkeypatch.setattr(factor_writer, "write_safetensors", slow)
    factors = factors_of(0)
    with FactorWriter(Journal(tmp_path)) as writer:
        facts = writer.write("h.0", factors)
        assert not (tmp_path / "h.0.safetensors").exists()
        go_on.set()
        writer.wait()
        assert torch.equal(
            load_file(tmp_path / "h.0.safetensors")["h.0.a.u"], factors["h.0.a"].factors.u
        )
    assert [*facts] == ["h.0.a", "h.0.b"]
    journal = Journal(tmp_path)
    assert journal.lines["h.0"]["layers"] == ["h.0.a", "h.0.b"]
    assert FactorWriter(journal).facts_of("h.0") == json.loads(json.dumps(facts))


def test_the_files_are_complete_when_the_context_ends(tmp_path):
    write_blocks(tmp_path, 3)
    assert [*Journal(tmp_path).lines] == ["h.0", "h.1", "h.2"]


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_error_of_the_thread_is_raised(tmp_path, monkeypatch, blocks):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(factor_writer, "write_safetensors", fail)
    with pytest.raises(OSError, match="No space"):
        write_blocks(tmp_path, blocks)
    assert Journal(tmp_path).lines == {}


def test_the_error_of_the_caller_counts(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(factor_writer, "write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        write_blocks(tmp_path, 1, KeyboardInterrupt)
