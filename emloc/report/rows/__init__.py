"""One run as a row of results: what tables and figures are made of. Imports no torch.

`rows_of` reads rows from run folders or from a CSV file, and `frame_of` makes one pandas table of
them. pandas is imported when a table is made, so that the command line starts without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc.config.folder_words import safe_word
from emloc.config.presets import NONE, named_method, optional_parts, part_of
from emloc.config.run_folder import DONE, find_runs
from emloc.config.settings import DECISIVE
from emloc.config.stage_order import merged, stages_of, standard_stages
from emloc.errors import ConfigError, one_line
from emloc.report.rows.csv_files import is_number, read_words, to_number
from emloc.report.rows.gain import StoredRun, gain_kept
from emloc.report.rows.work import FORWARDS, WEIGHTS, work_numbers
from emloc.runtime.digest import digest

if TYPE_CHECKING:
    import pandas as pd

# Facts of every run; each is a column of every file.
FIELDS = ("experiment", "run", "state", "cell", "method", "model", "task", "seed", "metric", "data")
# Settings that are a column even where all runs share one value.
ALWAYS = (
    "task.metric",
    "compression.ratio",
    "compression.bits",
    "lora.rank",
    "calibration.samples",
)
_SECONDS = "seconds/"
_ADDED = {"counted": True, "column": True}  # settings of a stage that is not a standard one


@dataclass(frozen=True)
class Row:
    """One run. `settings`: group -> choice and dotted key -> value, in the command line's words.

    `numbers`: `score`, `scores/<name>`, `as_trained/<name>`, `gain_kept` (a share), `bytes` (of the
    model that was trained through), `trainable` (parameters), `step_seconds`, `passes` (of the
    original in an anchored training) and `rejected_rounds`, `seconds/<stage>`, `peak_gib/<stage>`,
    `row_forwards/<stage>`, `weights_read/<stage>` (bytes), `trained_rows`. A number that was not
    measured is missing.
    """

    experiment: str
    run: str  # name of its folder
    state: str  # done, running, interrupted, OOM or failed(<stage>)
    cell: str  # its name in the experiment; empty where the experiment is a product
    method: str
    model: str
    task: str
    seed: int
    metric: str  # name of `score`; empty unless done
    data: str  # digest of the held-out data; empty unless done
    settings: Mapping[str, str]
    numbers: Mapping[str, float]
    # Stage -> whether its seconds are `counted` and a `column`, in the order of the stages.
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=standard_stages, compare=False)

    @property
    def done(self) -> bool:
        """Whether the run has results."""
        return self.state == DONE

    @cached_property
    def named_method(self) -> str:
        """The method that has the run's parts: `emloc_anchored` for an anchored emloc_uncorrected.

        It is the label of the run. `method` is the choice that the run was started with.
        """
        return named_method(self.method, self.settings)

    @property
    def is_anchored(self) -> bool:
        """Whether the emulator was put back onto the original's hidden states in training."""
        return part_of(self.method, self.settings, "anchor") != NONE

    @property
    def headline(self) -> bool:
        """Whether the score, if there is one, is of the task's metric, and no substitute."""
        return not self.done or self.metric == self.settings.get("task.metric", self.metric)

    @property
    def decisive(self) -> dict[str, str]:
        """The settings that decide the results; trackers and names of sweeps do not."""
        names = [name for name in self.settings if name.partition(".")[0] in DECISIVE]
        return {name: self.settings[name] for name in names if name not in FIELDS}

    @property
    def columns(self) -> list[str]:
        """The stages whose seconds are a column of tables."""
        return [name for name, stage in self.stages.items() if stage["column"]]

    @property
    def cost_seconds(self) -> float:
        """Seconds of the stages that count as cost; a cached stage counts its first computation."""
        return sum(self.numbers[f"{_SECONDS}{name}"] for name in self._cost_stages)

    @property
    def forwards(self) -> float | None:
        """Arithmetic of the stages that count as cost, in forwards of the original a trained row.

        None if the run trains nothing, or if a stage was run by a version that did not count.
        """
        rows = self.numbers.get("trained_rows")
        if not rows or self.weights_read is None or f"{FORWARDS}train" not in self.numbers:
            return None
        return sum(self.numbers.get(f"{FORWARDS}{name}", 0.0) for name in self._cost_stages) / rows

    @property
    def weights_read(self) -> float | None:
        """Bytes of weights that these stages read; None under the conditions of `forwards`."""
        read = [self.numbers.get(f"{WEIGHTS}{name}") for name in self._cost_stages]
        if "trained_rows" not in self.numbers or None in read:
            return None
        return sum(filter(None, read))

    @property
    def _cost_stages(self) -> list[str]:
        """The stages of this run that count as cost."""
        counted = [name for name, stage in self.stages.items() if stage["counted"]]
        return [name for name in counted if f"{_SECONDS}{name}" in self.numbers]

    def number(self, name: str) -> float | None:
        """One of `numbers`, or None."""
        return self.numbers.get(name)

    def word(self, name: str) -> str:
        """The run's word for a label: one of FIELDS, else a setting, else ''."""
        return str(getattr(self, name)) if name in FIELDS else self.settings.get(name, "")


def metric_of(rows: Iterable[Row]) -> str:
    """The name of the score of these runs; `score` where they have several metrics."""
    metrics = {row.metric for row in rows if row.done}
    return metrics.pop() if len(metrics) == 1 else "score"


def rows_of(place: Path) -> list[Row]:
    """The runs in a folder in the order in which they ended, or the runs of a CSV file.

    Raises:
        ConfigError: the file is no table of runs.
    """
    if place.is_file():
        return _rows_of_file(place)
    by_time = sorted(find_runs(place), key=lambda run: run.status["time"])
    runs = [StoredRun(run, run.config, run.metrics) for run in by_time]
    return [_checked_row(run, runs) for run in runs]


def frame_of(rows: Sequence[Row]) -> pd.DataFrame:
    """One line for each run: FIELDS, then all settings, then all numbers; empty where missing."""
    import pandas as pd

    facts = pd.DataFrame([{name: getattr(row, name) for name in FIELDS} for row in rows])
    rest = pd.DataFrame([{**row.settings, **row.numbers} for row in rows])
    frame = facts.join(rest[rest.columns.difference(FIELDS, sort=False)])
    return frame[sorted(frame, key=is_number)]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a tidy CSV: one line for each run, the settings in which runs differ, all numbers."""
    frame = frame_of(rows)
    words = [n for n in frame if not is_number(n) and n not in (*FIELDS, *ALWAYS)]
    optional = optional_parts()
    # Methods are named by optional parts, so a choice of one stays even if all runs share it.
    shared = [
        name
        for name in words
        if frame[name].nunique(dropna=False) == 1
        and frame[name].iloc[0] == optional.get(name, frame[name].iloc[0])
    ]
    frame.drop(columns=shared).to_csv(path, index=False, lineterminator="\n")


def _rows_of_file(path: Path) -> list[Row]:
    head, lines = read_words(path)
    missing = [name for name in FIELDS if name not in head]
    if missing:
        raise ConfigError(
            f"{path}: no table of runs, it has no column {', '.join(missing)}; "
            "give one that emloc report --csv wrote"
        )
    rows = []
    for index, line in enumerate(lines):
        try:
            rows.append(_row_of_line(line))
        except ValueError as error:
            raise ConfigError(f"{path}:{index + 2}: cannot be read: {error}") from error
    return rows


def _row_of_line(line: Mapping[str, str]) -> Row:
    words = {name: word for name, word in line.items() if word}
    numbers = {name: to_number(word) for name, word in words.items() if is_number(name)}
    named = {name: words[name] for name in ("cell", "method", "model", "task") if name in words}
    others = {name: words[name] for name in words if name not in (*FIELDS, *numbers)}
    timed = [name.removeprefix(_SECONDS) for name in numbers if name.startswith(_SECONDS)]
    standard = standard_stages()
    stages = {name: standard.get(name, _ADDED) for name in merged([*standard], timed)}
    fields: dict[str, Any] = {name: line[name] for name in FIELDS} | {"seed": int(line["seed"])}
    return Row(**fields, settings=named | others, numbers=numbers, stages=stages)


def _checked_row(stored: StoredRun, runs: Sequence[StoredRun]) -> Row:
    """The row of a run.

    Raises:
        ConfigError: its files lack something that every run has.
    """
    try:
        return _row(stored, runs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{stored.run.folder}: its files are not those of a run ({type(error).__name__}: "
            f"{error}); move this folder away"
        ) from error


def _row(stored: StoredRun, runs: Sequence[StoredRun]) -> Row:
    run, config, metrics = stored.run, stored.config, stored.metrics
    choices = run.choices
    return Row(
        experiment=safe_word(str(choices.get("experiments", run.folder.resolve().parent.name))),
        run=run.folder.name,
        state=_state(run.status),
        cell=choices.get("cell", "").rpartition("/")[2],
        method=str(config["method"]),
        model=str(config["model"].get("name", "")),
        task=str(config["task"].get("name", "")),
        seed=int(config["seed"]),
        metric=metrics.get("metric", ""),
        data=digest(metrics["data"]) if metrics else "",
        settings=optional_parts() | choices | _leaves(config),  # older runs lack some parts
        numbers=_numbers(stored, runs) if metrics else {},
        stages=stages_of(config),
    )


def _leaves(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name of every setting that decides results -> its value, in one line."""
    return {
        f"{section}.{key}": "null" if value is None else one_line(value)
        for section in DECISIVE
        if isinstance(values := config.get(section), Mapping)
        for key, value in values.items()
        if key != "_target_" and not isinstance(value, Mapping)
    }


def _numbers(stored: StoredRun, runs: Sequence[StoredRun]) -> dict[str, float]:
    metrics = stored.metrics
    training = metrics.get("facts", {}).get("train", {})
    values = {
        "score": metrics["score"],
        **{f"scores/{name}": value for name, value in metrics["scores"].items()},
        **{f"as_trained/{k}": v for k, v in metrics.get("scores_as_trained", {}).items()},
        "gain_kept": gain_kept(stored, runs),
        "bytes": metrics.get("emulator", {}).get("bytes"),
        "trainable": metrics.get("trainable"),
        "step_seconds": metrics.get("step_seconds"),
        **{name: training.get(name) for name in ("passes", "rejected_rounds")},
        **{f"{_SECONDS}{stage}": value for stage, value in metrics["seconds"].items()},
        **{f"peak_gib/{stage}": value for stage, value in metrics["peak_gib"].items()},
        **work_numbers(stored, runs),
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _state(status: Mapping[str, Any]) -> str:
    state = str(status["state"])
    return "OOM" if state == "oom" else f"failed({status['stage']})" if state == "failed" else state
