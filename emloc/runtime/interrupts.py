"""Notice an interrupt (Ctrl-C) that a library has turned into an error of its own.

Python raises KeyboardInterrupt in whatever code runs. If compiled code called this code, such as
the reader of safetensors files, it may report that its call has failed instead.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noticed_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether the `with` block has been interrupted so far.

    Without effect in other threads than the main one, and where the program handles interrupts in
    another way than Python does.
    """
    noticed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noticed
        noticed = True
        signal.default_int_handler(number, frame)

    usual = signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not usual:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noticed
    finally:
        signal.signal(signal.SIGINT, usual)
