"""Packed formats for tests: the package's own, and a plug-in's of three bits."""

import sys
from pathlib import Path

from emloc.precision import Precision
from emloc.precision.nf4 import Nf4

THREE_BITS = Path(__file__).parent / "extensions" / "three_bits"
sys.path.append(str(THREE_BITS))

from three_bits import ThreeBits  # noqa: E402

NF4 = Nf4(name="nf4", bits=4)
TOY = ThreeBits(name="three_bits", bits=3, group=64)


def held_at(bits: int) -> Precision | None:
    """The format of that width; None at 16 bits."""
    return {16: None, 4: NF4, 3: TOY}[bits]
