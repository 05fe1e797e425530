"""Interrupts that a library has turned into an error of its own."""

import signal
import threading

import pytest
from omegaconf import OmegaConf

from emloc.config.run_folder import Run
from emloc.runtime.interrupts import noticed_interrupts
from emloc.sweeps import job


@pytest.fixture(autouse=True)
def _interrupts_are_errors():
    """Handle interrupts as Python does, also in a shell that starts its jobs without them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def read_badly() -> None:
    """Report an interrupt as a library in compiled code may."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("the file cannot be read") from None


def test_an_interrupt_is_noticed_also_if_it_becomes_another_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noticed_interrupts() as is_interrupted:
        assert not is_interrupted()
        with pytest.raises(ValueError, match="cannot be read"):
            read_badly()
        assert is_interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_the_program_and_other_threads_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def enter() -> None:
        with noticed_interrupts() as is_interrupted:
            handlers.append(signal.getsignal(signal.SIGINT))
            assert not is_interrupted()

    handlers: list[object] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        enter()
    finally:
        signal.signal(signal.SIGINT, own)
    assert handlers == [own, signal.SIG_IGN]


def test_a_run_that_is_interrupted_in_a_library_is_not_marked_as_failed(
    tmp_path, monkeypatch
) -> None:
    run = Run(tmp_path / "run")
    run.begin(OmegaConf.create({"seed": 0}), {})
    monkeypatch.setattr(job, "_work", lambda *_: read_badly())
    with pytest.raises(KeyboardInterrupt):
        job._lead(OmegaConf.create(), run, None)
    assert run.status["state"] == "interrupted"
