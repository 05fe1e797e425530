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
    zeros: bool = True  # whether a column of zeros alone is of interest

    def applies(self, summary: pd.DataFrame) -> bool:
        """Whether the column says something about any of the lines."""
        return self.zeros or bool(summary[self.name].gt(0).any())

    def words(self, summary: pd.DataFrame) -> pd.Series:
        """The numbers of all lines, each with ± and its standard deviation where there is one."""
        if not self.form:
            return summary[self.name]
        pairs = summary.reindex(columns=[self.name, f"{self.name}{STD}"])
        pairs = pairs.map(lambda v: EMPTY if pd.isna(v) else format(v * self.factor, self.form))
        words = [" ± ".join(filter(None, pair)) for pair in pairs.to_numpy()]
        return pd.Series(words, index=summary.index, dtype=object)


COLUMNS = (
    Column("scores/loss", "loss", "z.3f", larger=False, printed=False),
    Column("gain_kept", "gain kept", "z.1%", larger=True),
    Column("as_trained/loss", "loss as trained", "z.3f", printed=False),
    Column("bytes", "through MB", ".0f", 1e-6),
    Column("peak_gib/train", "train GiB", ".2f"),
    Column("forwards", "forwards", ".2f", printed=False),
    Column("weights_read", "read GB", ".2f", 1e-9, printed=False),
    Column("step_seconds", "step s", ".3f", printed=False),
    Column("rejected_rounds", "rejected rounds", ".3g", printed=False, zeros=False),
)

# Meanings of measured numbers, by the head of their column.
NOTES = {
    "loss": "mean negative log-likelihood of an answer token on held-out rows, in nats",
    "gain kept": "share of LoRA's improvement in loss over the untouched model that a method "
    "reaches (0%: untouched model, 100%: the best LoRA of this rank and seed)",
    "rejected rounds": "rounds of an anchored training that raised the original's loss, or had a "
    "loss that was not finite, and were undone",
    "loss as trained": "loss of the adapter on the compressed model that it was trained on",
}
COST_NOTES = {
    "through MB": "weights of the model that was trained through",
    "train GiB": "peak memory of the training",
    "forwards": "arithmetic in forwards of the original model per training sample, shared passes "
    "divided among their runs (LoRA with recomputation: 3)",
    "read GB": "weights that were brought to the computing device before the evaluation",
    "step s": "median seconds of a training step",
    "evaluate s": "seconds of the evaluation; a reused stage has the seconds of its computation",
}


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
    frame[score.head] = score.words(summary).where(has_ended, summary["state"])
    for column in others:
        if (words := column.words(summary)).ne(EMPTY).any() and column.applies(summary):
            frame[column.head] = words
    peers = list(summary[["experiment", "model", "task", "data", "metric"]].itertuples(index=False))
    columns = [column for column in (score, *others) if column.head in frame]
    larger = {column.head: column.larger for column in columns if column.larger is not None}
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
    columns = [score]
    if len(kinds) <= KINDS:
        columns += [replace(score, name=name, head=name.removeprefix(prefix)) for name in kinds]
    columns += [one for one in (*comparisons(), *COLUMNS) if one.name in summary]
    return columns + [Column(name, f"{name[8:]} s", ".0f", printed=False) for name in stages]


def comparisons() -> list[Column]:
    """Our numbers in the units of the paper, the paper's numbers, and the differences."""
    columns = []
    for name, quantity in QUANTITIES.items():
        unit = "" if name == "score" else f" {quantity.unit}"
        form = f"z.{quantity.digits}f"
        columns += [
            *([Column(f"ours/{name}", quantity.head, form)] if unit else []),  # a score has one
            Column(f"paper/{name}", f"paper{unit}"),
            Column(f"difference/{name}", f"difference{unit}", f"+{form}"),
        ]
    return columns


def _labels(summary: pd.DataFrame) -> list[str]:
    """The columns of words that tell lines apart."""
    seeds = {seed for words in summary["seeds"] for seed in words.split()}
    words = [name for name in summary if not is_number(name) and not name.startswith("paper/")]
    settings = [name for name in words if name not in (*FACTS, SIZE)]
    counts = summary.replace(EMPTY, None).nunique()
    least = {"cell": 0, "method": -1}  # words of other facts matter where there are several
    facts = ("experiment", "cell", "method", "model", "task")
    labels = [name for name in facts if counts[name] > least.get(name, 1)]
    return [*labels, *settings, *["seeds"] * (len(seeds) > 1)]


def _printed_labels(summary: pd.DataFrame) -> list[str]:
    """The labels that a paper prints: the compression, and the cell only if lines need its name."""
    labels = [name for name in _labels(summary) if name != "seeds"]
    is_compressed = SIZE in summary and bool(summary[SIZE].ne(EMPTY).any())
    if is_compressed and not any(name.startswith("compression") for name in labels):
        labels.append(SIZE)
    is_ambiguous = summary.duplicated([name for name in labels if name != "cell"]).any()
    hidden = "method" if "cell" in labels and is_ambiguous else "cell"
    return [name for name in labels if name != hidden]


def notes_of(table: Table, sources: Sequence[str] = ()) -> list[str]:
    """What a reader has to know of the columns in the table, and of its numbers."""
    quality, costs = (
        [f"{head}: {note}" for head, note in notes.items() if head in table.columns]
        for notes in (NOTES, COST_NOTES)
    )
    return [*quality, *(["; ".join(costs)] if costs else []), *number_notes(table, sources)]


def number_notes(table: Table, sources: Sequence[str] = ()) -> list[str]:
    """The meaning of ±, and the tables that the paper's numbers are from."""
    has_spread = table.frame.map(lambda word: " ± " in word).any(axis=None)
    return [
        *(["±: standard deviation over seeds"] if has_spread else []),
        *(f"paper: {source}; difference: ours less the paper's" for source in sources),
    ]
