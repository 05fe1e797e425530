"""No polishing: the recovered adapter is the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from emloc.config.part import Part


@dataclass(frozen=True, kw_only=True)
class NoPolish(Part):
    """The choice `polish=none`."""

    section: ClassVar[str] = "polish"
    polishes: ClassVar[Literal[False]] = False
