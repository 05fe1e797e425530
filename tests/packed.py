"""Packed formats for tests: nf4 of the package, and the three-bit format of a plug-in."""

import sys
from pathlib import Path

from emloc.precision import Precision
from emloc.precision.nf4 import Nf4

THREE_BITS = Path(__file__).parent / "extensions" / "three_bits"
sys.path.append(str(THREE_BITS))

from three_bits import ThreeBits  # noqa: E402

NF4 = Nf4(name="nf4", bits=4)
TOY = ThreeBits(name="three_bits", bits=3, group=64)


def precision_of(bits: int) -> Precision | None:
    """Return the packed format with `bits` bits; None for 16 bits, which need no format."""
    return {16: None, 4: NF4, 3: TOY}[bits]
