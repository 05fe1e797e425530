"""No adapter: the run trains nothing and scores the model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from emloc.config.part import Part


@dataclass(frozen=True, kw_only=True)
class NoAdapter(Part):
    """The choice `adapter=none`. It is no `Adapter`, because it can neither be saved nor loaded."""

    section: ClassVar[str] = "adapter"
    trains: ClassVar[Literal[False]] = False
