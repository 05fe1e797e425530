"""Where a run's numbers also go. The run folder is the record; this is a mirror of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from emloc.errors import ConfigError

MODES = ("offline", "online", "disabled")


class Session(Protocol):
    """One run being followed."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Add one line of numbers."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End with the final numbers; None if the run failed."""


class Tracker(Protocol):
    """A place that follows runs."""

    def start(self, folder: Path, group: str, name: str, config: dict[str, Any]) -> Session:
        """Begin to follow a run."""


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No tracking."""

    def start(self, folder: Path, group: str, name: str, config: dict[str, Any]) -> Nothing:
        """Nothing is started."""
        return self

    def log(self, values: Mapping[str, Any]) -> None:
        """Nothing is logged."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Nothing is ended."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases: group = experiment, name = run folder, config = the resolved settings."""

    project: str
    mode: str  # offline: files in the run folder, no account; online; disabled

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"tracker.mode={self.mode}: one of {', '.join(MODES)}; set tracker.mode=offline"
            )

    def start(self, folder: Path, group: str, name: str, config: dict[str, Any]) -> WandbSession:
        """Open the run; the same run folder always continues the same W&B run."""
        import wandb

        run = wandb.init(
            project=self.project,
            mode=self.mode,  # type: ignore[arg-type]  # checked above
            dir=str(folder),
            group=group,
            name=name,
            id=name,
            resume="allow" if self.mode == "online" else None,
            config=config,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True),
        )
        return WandbSession(run)


class WandbSession:
    """A W&B run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, Any]) -> None:
        """Send one line of numbers."""
        self._run.log(dict(values))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Send the final numbers; a failed run ends with exit code 1."""
        self._run.summary.update(dict(summary or {}))
        self._run.finish(exit_code=1 if summary is None else 0)
