"""How figures look: a method has the same colour in every figure of every report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

COLUMN, PAGE = 3.3, 6.75  # inches: one column of a paper, and both

# Okabe and Ito's palette, which the colour-blind tell apart; not its yellow, too faint for a line.
BLACK, GREY = "#000000", "#767676"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

FADED = 0.15  # opacity of a band

RC: Any = {
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.3,
    "savefig.dpi": 200,
    "figure.dpi": 100,
    "pdf.fonttype": 42,  # letters stay letters
}

# Families share a colour and differ in the marker.
_METHODS = {
    "zero_shot": (GREY, "x"),
    "lora": (BLACK, "o"),
    "rslora": (BLACK, "^"),
    "dora": (BLACK, "s"),
    "offload": (BLACK, "D"),
    "small_model": (GREY, "X"),
    "qlora": (ORANGE, "o"),
    "emloc": (BLUE, "o"),
    "emloc_nf4": (BLUE, "s"),
    "emloc_uncorrected": (SKY, "^"),
    "emloc_covariance": (GREEN, "s"),
    "svd_llm": (PURPLE, "v"),
    "offsite": (PURPLE, "P"),
    "upop": (VERMILION, "D"),
    "loram_stru": (VERMILION, "<"),
    "loram_rand": (VERMILION, ">"),
}
# Of kinds of layers, which are no methods: attention in colours of its own, then the feed-forward.
KINDS = (
    *((BLUE, "o"), (SKY, "s"), (GREEN, "^"), (BLACK, "D")),
    *((ORANGE, "v"), (VERMILION, "P"), (PURPLE, "X"), (GREY, "<")),
)
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS = ("o", "^", "s", "D", "v", "P", "<", ">", "X", "x")
_DASHES = ("-", "--", "-.", ":")


class Look(NamedTuple):
    """Of one line or point."""

    colour: str
    marker: str
    dash: str
    hollow: bool
    rule: str  # dashes of a line across a panel

    @property
    def marks(self) -> dict[str, Any]:
        """As matplotlib calls it."""
        face = "white" if self.hollow else self.colour
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face}


def looks_of(lines: Iterable[tuple[str, str, bool]]) -> dict[str, Look]:
    """Label -> look, whatever the order of the lines.

    Args:
        lines: label, method and whether it was trained in a packed format, which is drawn hollow.
            Lines of one method share its colour, and have markers and dashes of their own.
    """
    every = sorted(set(lines))
    others = sorted({method for _, method, _ in every} - _METHODS.keys())
    found = {}
    for label, method, hollow in every:
        variant = [one for one, other, _ in every if other == method].index(label)
        colour, marker = _METHODS.get(method) or _other(others.index(method))
        if variant:
            marker = _MARKERS[(_MARKERS.index(marker) + variant) % len(_MARKERS)]
        rule = ":" if method == "zero_shot" else "--"
        found[label] = Look(colour, marker, _DASHES[variant % len(_DASHES)], hollow, rule)
    return found


def _other(at: int) -> tuple[str, str]:
    """Of a method that has no look of its own."""
    return _COLOURS[at % len(_COLOURS)], _MARKERS[(at + 3) % len(_MARKERS)]
