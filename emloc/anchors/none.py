"""No anchors: the emulator is trained as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from emloc.config.part import Part


@dataclass(frozen=True, kw_only=True)
class NoAnchor(Part):
    """The choice `anchor=none`."""

    section: ClassVar[str] = "anchor"
    anchors: ClassVar[Literal[False]] = False
