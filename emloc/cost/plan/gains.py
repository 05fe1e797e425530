"""How much of LoRA's gain each kind of emulator has kept so far, in the results of the project.

The runs are those of Qwen2.5-Coder-0.5B on GSM8K (`experiments/results/`), 400 steps, with anchors
in four rounds. Other models and tasks keep more or less, but mostly in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from statistics import mean

from emloc.config.paths import EXPERIMENTS
from emloc.report.rows.csv_files import read_words

ORIGIN = "measured on Qwen2.5-Coder-0.5B and GSM8K"
_FILES = ("anchors_qwen.csv", "frontier_qwen.csv")
# Grid points of these files that differ in nothing but emulator, bits, ratio and correction.
_METHODS = {
    *("lora", "qlora", "offload", "emloc_uncorrected", "emloc"),
    *("qlora_anchored", "emloc_anchored", "emloc_nf4_anchored"),
}
_ROUNDS = "4"
_VARIANTS = (
    "_steps",
    "_places_",
    "_int8",
    "_no_refit",
    "qlora_identity",
)  # parts of the names of other grid points


@dataclass(frozen=True)
class Trained:
    """What a LoRA is trained through."""

    factorised: bool
    bits: int
    anchored: bool = False
    shared: str = "none"  # `emulator.shared` of factors
    corrected: bool = False  # whether the LoRA is corrected as in the paper


def measured_gain(trained: Trained, ratio: float | None) -> float | None:
    """Return the share of LoRA's gain that was kept; None if it was not measured.

    Between two measured ratios it is interpolated, and above the largest it is that of the largest.
    Shared factors keep at least what own factors of the same ratio do.

    Args:
        trained: what is trained through.
        ratio: share of the parameters that the factors keep; None without factors.
    """
    alike = {trained, replace(trained, shared="none")}
    gains = [
        _interpolated(_points().get(one, {}), 1.0 if ratio is None else ratio) for one in alike
    ]
    return max((gain for gain in gains if gain is not None), default=None)


def _interpolated(points: Mapping[float, float], ratio: float) -> float | None:
    """Return the gain at a ratio, from the gains at some ratios; None below all of them."""
    ratios = sorted(points)
    if not ratios or ratio < ratios[0]:
        return None
    for low, high in pairwise(ratios):
        if ratio <= high:
            share = (ratio - low) / (high - low)
            return points[low] + share * (points[high] - points[low])
    return points[ratios[-1]]


@cache
def _points() -> dict[Trained, dict[float, float]]:
    """What is trained through -> mean gain by ratio (1 without factors)."""
    gains: dict[Trained, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in _FILES:
        for line in read_words(EXPERIMENTS / "results" / file)[1]:
            is_anchored = line["anchor"] == "blocks"
            if line["method"] not in _METHODS or not line["gain_kept"]:
                continue
            if any(part in line["cell"] for part in _VARIANTS):
                continue
            if is_anchored and line["anchor.rounds"] != _ROUNDS:
                continue
            if line["anchor"] not in ("none", "blocks"):
                continue
            factorised = line["emulator"] == "svd"
            shared = (line.get("emulator.shared") or "none") if factorised else "none"
            trained = Trained(
                factorised,
                int(line["compression.bits"]),
                is_anchored,
                shared,
                corrected=line["method"] == "emloc",
            )
            ratio = float(line["compression.ratio"]) if factorised else 1.0
            gains[trained][ratio].append(float(line["gain_kept"]))
    return {
        trained: {ratio: mean(several) for ratio, several in by_ratio.items()}
        for trained, by_ratio in gains.items()
    }
