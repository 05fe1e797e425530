"""Packed formats for tests: those of the package, and the five-bit format of a plug-in."""

import sys
from pathlib import Path

from emloc.precision import Precision
from emloc.precision.nf4 import Nf4
from emloc.precision.uniform import Uniform

FIVE_BITS = Path(__file__).parent / "extensions" / "five_bits"
sys.path.append(str(FIVE_BITS))

from five_bits import FiveBits  # noqa: E402

NF4 = Nf4(name="nf4", bits=4)
INT3 = Uniform(name="int3", bits=3)
INT2 = Uniform(name="int2", bits=2)
TOY = FiveBits(name="five_bits", bits=5, group=64)


def precision_of(bits: int) -> Precision | None:
    """Return the packed format with `bits` bits; None for 16 bits, which need no format."""
    return {16: None, 5: TOY, 4: NF4, 3: INT3, 2: INT2}[bits]
