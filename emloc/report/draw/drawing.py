"""One figure with the sentences and the numbers that belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure, its caption in sentences, and one record for each point that it shows."""

    figure: Figure
    caption: str
    records: Sequence[Mapping[str, object]]

    @property
    def alt(self) -> str:
        """Text for readers who cannot see the figure: what each panel shows against what."""
        panels = [
            (" ".join(axes.get_title().split()), axes.get_ylabel(), axes.get_xlabel())
            for axes in self.figure.axes
        ]
        texts = [
            f"{title}: {y} against {x}" if title else f"{y} against {x}"
            for title, y, x in panels
            if x and y
        ]
        return "; ".join(dict.fromkeys(texts))


def numbered_pages(stem: str, pages: Sequence[Drawing]) -> dict[str, Drawing]:
    """File stem of each page: the second page and later ones carry their number."""
    return {stem if number == 1 else f"{stem}_{number}": p for number, p in enumerate(pages, 1)}
