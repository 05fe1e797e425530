"""One run as a line of results: all that tables and figures are made of. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emloc.config.run_folder import DONE, Run, find_runs
from emloc.config.settings import DECISIVE
from emloc.config.stage_order import merged, stages_of, standard_stages
from emloc.errors import ConfigError
from emloc.report.rows.gain import Scored, gain_kept
from emloc.runtime.digest import digest

# What is known of every run, and a column of every file.
FIELDS = ("experiment", "run", "state", "cell", "method", "model", "task", "seed", "metric", "data")
# Settings that are a column even where all runs have the same.
ALWAYS = (
    "task.metric",
    "compression.ratio",
    "compression.bits",
    "lora.rank",
    "calibration.samples",
)
_SECONDS = "seconds/"
_ADDED = {"counted": True, "column": True}  # a stage that is none of the standard ones
_NUMBER = "="  # before the name of a number in the head of a file, which tells it from a setting


@dataclass(frozen=True)
class Row:
    """One run. `settings`: group -> choice and dotted key -> value, in the command line's words.

    `numbers`: `score`, `scores/<name>`, `as_trained/<name>`, `gain_kept` (a share), `bytes` (of the
    model trained through), `trainable` (parameters), `step_seconds`, `seconds/<stage>`,
    `peak_gib/<stage>`; what was not measured is not there.
    """

    experiment: str
    run: str  # the folder's name
    state: str  # done, running, interrupted, OOM or failed(<stage>)
    cell: str  # the experiment's name for it; empty where the experiment is a product
    method: str
    model: str
    task: str
    seed: int
    metric: str  # what `score` is called; empty unless done
    data: str  # digest of what the scores are about; empty unless done
    settings: Mapping[str, str]
    numbers: Mapping[str, float]
    # Stage -> whether its seconds are `counted` and a `column`, in the order they ran in.
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=standard_stages, compare=False)

    @property
    def done(self) -> bool:
        """Whether there are results."""
        return self.state == DONE

    @property
    def headline(self) -> bool:
        """Whether the score is the task's own, and not what is at hand without lm-eval."""
        return self.metric == self.settings.get("task.metric", self.metric)

    @property
    def decisive(self) -> dict[str, str]:
        """The settings that decide the results: not who follows a run, or how it was called."""
        return {
            name: word
            for name, word in self.settings.items()
            if name not in FIELDS and name.partition(".")[0] in DECISIVE
        }

    @property
    def columns(self) -> list[str]:
        """The stages whose seconds are a column of tables."""
        return [name for name, stage in self.stages.items() if stage["column"]]

    @property
    def cost_seconds(self) -> float:
        """Seconds of the stages that fine-tuning costs; what was reused counts as when computed."""
        counted = [name for name, stage in self.stages.items() if stage["counted"]]
        return sum(self.numbers.get(f"{_SECONDS}{name}", 0.0) for name in counted)

    def number(self, name: str) -> float | None:
        """One of `numbers`, or None."""
        return self.numbers.get(name)


def metric_of(rows: Iterable[Row]) -> str:
    """What the score of these runs is called; `score` where they have several."""
    metrics = {row.metric for row in rows if row.done}
    return metrics.pop() if len(metrics) == 1 else "score"


def rows_of(place: Path) -> list[Row]:
    """The runs below a folder in the order they ended, or those of a file of `write_rows`."""
    if place.is_file():
        return _read(place)
    read = [(run, run.status, run.config, run.metrics) for run in find_runs(place)]
    read.sort(key=lambda each: each[1]["time"])
    scored = [Scored(config, _loss(metrics)) for _, _, config, metrics in read]
    gains = [gain_kept(each, scored) for each in scored]
    return [_row(*each, gain) for each, gain in zip(read, gains, strict=True)]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """A tidy CSV: a line for each run, with the settings in which runs differ and all numbers."""
    every = dict.fromkeys(name for row in rows for name in row.settings)
    settings = [name for name in every if name in ALWAYS or _differs(name, rows)]
    numbers = dict.fromkeys(name for row in rows for name in row.numbers)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*FIELDS, *settings, *(_NUMBER + name for name in numbers)])
        for row in rows:
            known = [getattr(row, name) for name in FIELDS]
            chosen = [row.settings.get(name, "") for name in settings]
            writer.writerow([*known, *chosen, *(row.numbers.get(name, "") for name in numbers)])


def _differs(name: str, rows: Iterable[Row]) -> bool:
    return name not in FIELDS and len({row.settings.get(name) for row in rows}) > 1


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        missing = [name for name in FIELDS if name not in (table.fieldnames or ())]
        if missing:
            raise ConfigError(
                f"{path}: no table of runs, it has no column {', '.join(missing)}; "
                "give one that emloc report --csv wrote"
            )
        rows = []
        for line in table:
            try:
                rows.append(_parsed(line))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path}:{table.line_num}: cannot be read: {error}") from error
        return rows


def _parsed(line: Mapping[Any, Any]) -> Row:
    if None in line or None in line.values():
        raise ValueError("it has more or fewer values than the head has columns")
    fields: dict[str, Any] = {name: line[name] for name in FIELDS}
    fields["seed"] = int(fields["seed"])
    rest = {name: value for name, value in line.items() if name not in FIELDS and value}
    numbers = {name[1:]: float(v) for name, v in rest.items() if name.startswith(_NUMBER)}
    settings = {name: value for name, value in rest.items() if not name.startswith(_NUMBER)}
    named = {name: line[name] for name in ("cell", "method", "model", "task") if line[name]}
    timed = [name[len(_SECONDS) :] for name in numbers if name.startswith(_SECONDS)]
    standard = standard_stages()
    stages = {name: standard.get(name, _ADDED) for name in merged([*standard], timed)}
    return Row(**fields, settings=named | settings, numbers=numbers, stages=stages)


def _loss(metrics: Mapping[str, Any]) -> float | None:
    loss = metrics["scores"].get("loss") if metrics else None  # not every family has one
    return None if loss is None else float(loss)


def _row(
    run: Run,
    status: Mapping[str, Any],
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    gain: float | None,
) -> Row:
    choices = run.choices
    return Row(
        experiment=choices.get("experiments", run.folder.resolve().parent.name),
        run=run.folder.name,
        state=_word(status),
        cell=choices.get("cell", "").rpartition("/")[2],
        method=str(config["method"]),
        model=_called(config, "model"),
        task=_called(config, "task"),
        seed=int(config["seed"]),
        metric=metrics.get("metric", ""),
        data=digest(metrics["data"]) if metrics else "",
        settings=choices | _leaves(config),
        numbers=_numbers(metrics, gain) if metrics else {},
        stages=stages_of(config),
    )


def _called(config: Mapping[str, Any], section: str) -> str:
    return str(config[section].get("name", ""))


def _leaves(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name of every setting that decides results -> its value, in one line."""
    return {
        f"{section}.{key}": "null" if value is None else " ".join(str(value).split())
        for section in DECISIVE
        if isinstance(values := config.get(section), Mapping)
        for key, value in values.items()
        if key != "_target_" and not isinstance(value, Mapping)
    }


def _numbers(metrics: Mapping[str, Any], gain: float | None) -> dict[str, float]:
    found = {
        "score": metrics["score"],
        **{f"scores/{name}": value for name, value in metrics["scores"].items()},
        **{f"as_trained/{k}": v for k, v in metrics.get("scores_as_trained", {}).items()},
        "gain_kept": gain,
        "bytes": metrics.get("emulator", {}).get("bytes"),
        "trainable": metrics.get("trainable"),
        "step_seconds": metrics.get("step_seconds"),
        **{f"{_SECONDS}{stage}": value for stage, value in metrics["seconds"].items()},
        **{f"peak_gib/{stage}": value for stage, value in metrics["peak_gib"].items()},
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _word(status: Mapping[str, Any]) -> str:
    state = str(status["state"])
    return "OOM" if state == "oom" else f"failed({status['stage']})" if state == "failed" else state
