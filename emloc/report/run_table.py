"""The table of a summary: each number in its unit and with its digits, and the notes below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from emloc.config.run_folder import DONE
from emloc.report.paper import QUANTITIES
from emloc.report.rows.csv_files import STD, is_number
from emloc.report.summary import FACTS, NOT_RUN, SIZE
from emloc.report.table import EMPTY, Table, best

KINDS = 6  # kinds of rows at most that have columns of their own


@dataclass(frozen=True)
class Column:
    """A column of numbers in a table."""

    name: str  # in the summary
    head: str  # in the table, with its unit
    form: str = ""  # digits; z: no minus before a zero; empty: the summary has the words
    factor: float = 1.0  # from the summary's unit to the table's
    larger: bool | None = None  # whether a larger number is better; None: neither is
    printed: bool = True  # whether a paper prints it
    note: str = ""

    def words(self, summary: pd.DataFrame) -> list[str]:
        """The numbers of all lines, each with ± and its standard deviation where there is one."""
        if not self.form:
            return list(summary[self.name])
        means = self._words(summary[self.name])
        spreads = self._words(summary.get(f"{self.name}{STD}", [float("nan")] * len(summary)))
        pairs = zip(means, spreads, strict=True)
        return [f"{mean} ± {spread}" if spread else mean for mean, spread in pairs]

    def _words(self, values: Sequence[float]) -> list[str]:
        return [EMPTY if pd.isna(v) else format(v * self.factor, self.form) for v in values]


_COLUMNS = (
    Column(
        "scores/loss",
        "loss",
        "z.3f",
        larger=False,
        printed=False,
        note="loss: mean negative log-likelihood of an answer token on held-out rows, in nats",
    ),
    Column(
        "gain_kept",
        "gain kept",
        "z.1%",
        larger=True,
        note="gain kept: share of LoRA's improvement in loss over the untouched model that a "
        "method reaches (0%: untouched model, 100%: LoRA)",
    ),
    Column(
        "as_trained/loss",
        "loss as trained",
        "z.3f",
        printed=False,
        note="loss as trained: loss of the adapter on the compressed model that it was trained on",
    ),
    Column(
        "bytes",
        "through MB",
        ".0f",
        1e-6,
        note="through MB: weights of the model that was trained through",
    ),
    Column("peak_gib/train", "train GiB", ".2f", note="train GiB: peak memory of the training"),
    Column(
        "step_seconds",
        "step s",
        "z.3f",
        printed=False,
        note="step s: median seconds of a training step",
    ),
)
_STAGE_NOTE = "<stage> s: seconds of the stage when it was computed, also where it was then reused"


def table_of(summary: pd.DataFrame, *, printed: bool = False) -> Table:
    """A line for each group of runs. A column that applies to no line is left out.

    Args:
        summary: of `summary_of` or `read_summary`.
        printed: keep only the columns that a paper prints.
    """
    summary = summary.reset_index(drop=True)
    score, *others = [one for one in columns_of(summary) if one.printed or not printed]
    labels = _printed_labels(summary) if printed else _labels(summary)
    frame = summary[labels].rename(columns={SIZE: "compression"})
    has_ended = summary["state"].isin([DONE, NOT_RUN])
    frame[score.head] = pd.Series(score.words(summary)).where(has_ended, summary["state"])
    for column in others:
        words = pd.Series(column.words(summary), dtype=object)
        if words.ne(EMPTY).any():
            frame[column.head] = words
    peers = list(summary[["experiment", "model", "task", "data", "metric"]].itertuples(index=False))
    larger = {
        one.head: one.larger
        for one in (score, *others)
        if one.larger is not None and one.head in frame
    }
    return Table(frame, best(frame, peers, larger))


def columns_of(summary: pd.DataFrame) -> list[Column]:
    """The columns of numbers, the score first."""
    metrics = {*summary["metric"]} - {EMPTY}
    metric = metrics.pop() if len(metrics) == 1 else "score"
    # In percent where the paper's numbers stand beside ours.
    percent, form, factor = (" %", "z.1f", 100.0) if "paper/score" in summary else ("", "z.3f", 1.0)
    score = Column("score", f"{metric}{percent}", form, factor, larger=True)
    prefix = f"scores/{metric}/"
    kinds = sorted(n for n in summary if n.startswith(prefix) and not n.endswith(STD))
    stages = [name for name in summary if name.startswith("seconds/")]
    return [
        score,
        *(
            replace(score, name=name, head=name.removeprefix(prefix))
            for name in (kinds if len(kinds) <= KINDS else [])
        ),
        *_columns_of_paper(summary),
        *(one for one in _COLUMNS if one.name in summary),
        *(
            Column(name, f"{name.partition('/')[2]} s", ".0f", printed=False, note=_STAGE_NOTE)
            for name in stages
        ),
    ]


def _columns_of_paper(summary: pd.DataFrame) -> list[Column]:
    columns = []
    for name, quantity in QUANTITIES.items():
        if f"paper/{name}" in summary:
            form = f"z.{quantity.digits}f"
            if name == "score":  # ours has a column anyway
                sign = ""
            else:
                sign = f" {quantity.sign}"
                columns.append(Column(f"ours/{name}", quantity.head, form))
            columns.append(Column(f"paper/{name}", f"paper{sign}"))
            columns.append(Column(f"difference/{name}", f"difference{sign}", f"+{form}"))
    return columns


def _labels(summary: pd.DataFrame) -> list[str]:
    """The columns of words that tell lines apart."""
    seeds = {seed for words in summary["seeds"] for seed in words.split()}
    settings = [
        name
        for name in summary
        if not is_number(name) and name not in (*FACTS, SIZE) and not name.startswith("paper/")
    ]
    return [
        *["experiment"] * (summary["experiment"].replace(EMPTY, None).nunique() > 1),
        *["cell"] * bool(summary["cell"].ne(EMPTY).any()),
        "method",
        *(name for name in ("model", "task") if _tells_lines_apart(summary, name)),
        *settings,
        *["seeds"] * (len(seeds) > 1),
    ]


def _tells_lines_apart(summary: pd.DataFrame, name: str) -> bool:
    """Whether a cell has runs of several models (tasks), or the paper has numbers of another."""
    named = summary[summary[name].ne(EMPTY)]
    is_absent = named["state"].eq(NOT_RUN)
    ours = named[~is_absent]
    of_cell = ours.groupby("cell")[name].nunique()
    return bool(of_cell.gt(1).any() or not {*named[is_absent][name]} <= {*ours[name]})


def _printed_labels(summary: pd.DataFrame) -> list[str]:
    """The labels that a paper prints: no seeds, no method twice, and always the compression."""
    labels = [name for name in _labels(summary) if name != "seeds"]
    if "cell" in labels and summary["cell"].equals(summary["method"]):
        labels.remove("cell")
    is_compressed = summary.get(SIZE, pd.Series(dtype=str)).ne(EMPTY).any()
    if is_compressed and not any(name.startswith("compression") for name in labels):
        labels.append(SIZE)
    return labels


def without_failures(summary: pd.DataFrame) -> pd.DataFrame:
    """The lines that have results, or numbers of the paper alone."""
    return summary[summary["state"].isin([DONE, NOT_RUN])]


def notes_of(summary: pd.DataFrame, table: Table, sources: Sequence[str] = ()) -> list[str]:
    """What a reader has to know of the columns in the table, and of its numbers."""
    columns = [one for one in columns_of(summary) if one.head in table.columns and one.note]
    costs = dict.fromkeys(one.note for one in columns if one.larger is None)
    return [
        *(one.note for one in columns if one.larger is not None),
        *(["; ".join(costs)] if costs else []),
        *number_notes(table, sources),
    ]


def number_notes(table: Table, sources: Sequence[str] = ()) -> list[str]:
    """What ± stands for, and where the paper's numbers are from."""
    has_spread = table.frame.map(lambda word: " ± " in word).any(axis=None)
    return [
        *(["±: standard deviation over seeds"] if has_spread else []),
        *(f"paper: {source}; difference: ours less the paper's" for source in sources),
    ]
