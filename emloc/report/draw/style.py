"""Style of figures: a method has the same colour in every figure of every report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from emloc.config.presets import NONE, part_of

COLUMN, PAGE = 3.3, 6.75  # inches: width of one column of a paper, and of its two columns

# Okabe and Ito's palette: colour-blind readers can tell the colours apart. Its yellow is left out,
# because a yellow line is too faint.
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
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "emloc",  # the same figure gives the same bytes
}

# Methods of one family share a colour and differ in the marker. A method with anchors is of the
# family of the method without them.
_METHODS = {
    "zero_shot": (GREY, "x"),
    "lora": (BLACK, "o"),
    "rslora": (BLACK, "^"),
    "dora": (BLACK, "s"),
    "offload": (BLACK, "D"),
    "small_model": (GREY, "X"),
    "qlora": (ORANGE, "o"),
    "qlora_anchored": (ORANGE, "D"),
    "emloc": (BLUE, "o"),
    "emloc_anchored": (BLUE, "D"),
    "emloc_nf4": (BLUE, "s"),
    "emloc_nf4_anchored": (BLUE, "P"),
    "emloc_uncorrected": (SKY, "^"),
    "emloc_covariance": (GREEN, "s"),
    "svd_llm": (PURPLE, "v"),
    "offsite": (PURPLE, "P"),
    "upop": (VERMILION, "D"),
    "loram_stru": (VERMILION, "<"),
    "loram_rand": (VERMILION, ">"),
}
# Colour and marker of each kind of layer, in the order of `layers.kinds_of`.
KINDS = (
    *((BLUE, "o"), (SKY, "s"), (GREEN, "^"), (BLACK, "D")),
    *((ORANGE, "v"), (VERMILION, "P"), (PURPLE, "X"), (GREY, "<")),
)
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS = ("o", "^", "s", "D", "v", "P", "<", ">", "X", "x")
_CHANGED = 5  # markers between that of a method and that of the same method with another part
_DASHES = ("-", "--", "-.", ":")


class Style(NamedTuple):
    """Style of one line or point."""

    colour: str
    marker: str
    dash: str
    is_hollow: bool
    rule: str  # dashes of a line across the whole panel

    @property
    def marker_properties(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`."""
        face = "white" if self.is_hollow else self.colour
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face}


def line_styles(lines: Iterable[tuple[str, str, bool]]) -> dict[str, Style]:
    """Return label -> style. The order of the lines does not matter.

    Args:
        lines: label, method, and whether the run trains in a packed format (drawn hollow). Lines
            of one method share its colour; markers and dashes tell them apart, and a method with
            anchors from the one without.
    """
    lines = sorted(set(lines))
    unlisted = sorted({_family(method) for _, method, _ in lines} - _METHODS.keys())
    styles = {}
    for label, method, is_hollow in lines:
        variant = [one for one, other, _ in lines if other == method].index(label)
        family = _family(method)
        colour, marker = _METHODS.get(family) or _unlisted_method(unlisted.index(family))
        if turns := variant + _CHANGED * (family != method):
            marker = _MARKERS[(_MARKERS.index(marker) + turns) % len(_MARKERS)]
        dash = _DASHES[(variant + _is_anchored(method)) % len(_DASHES)]
        rule = ":" if method == "zero_shot" else "--"
        styles[label] = Style(colour, marker, dash, is_hollow, rule)
    return styles


def _family(method: str) -> str:
    """The method that another part was added to, as `upop` of `upop anchor=blocks`."""
    return method.partition(" ")[0]


def _is_anchored(method: str) -> bool:
    """Whether a method trains with anchors, by its preset or by a part that was added to it."""
    family, *words = method.split(" ")
    return part_of(family, dict(word.partition("=")[::2] for word in words), "anchor") != NONE


def _unlisted_method(index: int) -> tuple[str, str]:
    """Colour and marker of a method that is not in `_METHODS`."""
    return _COLOURS[index % len(_COLOURS)], _MARKERS[(index + 3) % len(_MARKERS)]
