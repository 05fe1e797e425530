"""No adapter: the model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from emloc.config.part import Part


@dataclass(frozen=True, kw_only=True)
class NoAdapter(Part):
    """Stands where a run trains nothing: no `Adapter`, since nothing can be asked of it."""

    trains: ClassVar[Literal[False]] = False
