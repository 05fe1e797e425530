"""Device memory that this process keeps for a later job.

It belongs to the stage that uses it again, so it is no part of the peaks of other stages. It is
given back before the process waits for a GPU, since other jobs use that GPU meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable


class KeptMemory:
    """Who keeps memory, if anyone.

    Attributes:
        changes: how often memory was kept or no longer kept.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._release: Callable[[], None] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether memory is kept."""
        return self._release is not None

    def keep(self, release: Callable[[], None]) -> None:
        """Note that memory is kept, which `release` gives back. None may be kept before."""
        assert not self.is_kept
        self._release = release
        self.changes += 1

    def take(self) -> None:
        """Note that the memory is in use from now on."""
        assert self.is_kept
        self._release = None
        self.changes += 1

    def give_back(self) -> None:
        """Give the memory back, if any is kept."""
        if self._release is not None:
            release, self._release = self._release, None
            self.changes += 1
            release()


KEPT_MEMORY = KeptMemory()
