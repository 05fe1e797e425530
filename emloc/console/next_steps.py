"""What to do after a run or a sweep, as commands with real paths."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from emloc.config.run_folder import Run, find_runs, is_run


def next_steps(folder: Path) -> str:
    """Lines with the commands that apply to a run or a folder of runs; empty if no run is done."""
    runs = [run for run in find_runs(folder) if run.done]
    if not runs:
        return ""
    steps = _of_run(runs[0]) if is_run(folder) else []
    several = folder.parent if is_run(folder) else folder
    steps.insert(0, ("tables, figures and a page", f"emloc report {_shown(several)}"))
    steps.insert(1, ("", f"writes {_shown(several / 'report' / 'report.html')}"))
    width = max(len(what) for what, _ in steps)
    return "\n".join(["Next steps", *(f"  {what:<{width}}  {command}" for what, command in steps)])


def _of_run(run: Run) -> list[tuple[str, str]]:
    """Ways to use the adapter of a run, as (purpose, command)."""
    adapter = run.folder / "adapter"
    if not (adapter / "adapter_config.json").exists():
        return []  # there is none, or it is of a kind that PEFT cannot load and nobody can merge
    if run.metrics.get("authors_format"):
        reason = "PEFT and vLLM cannot put the adapter on the authors' layers of this checkpoint"
        return [("a checkpoint to serve", f"emloc merge {_shown(run.folder)}"), ("", reason)]
    load = f'PeftModel.from_pretrained(model, "{_relative(adapter)}")'
    steps = [("the adapter in Python", load)]
    if run.config["model"].get("weights") != "random":
        merge = ("a checkpoint with the adapter merged", f"emloc merge {_shown(run.folder)}")
        steps.insert(0, merge)
    return steps


def _shown(path: Path) -> str:
    return shlex.quote(str(_relative(path)))


def _relative(path: Path) -> Path:
    """The path from the current folder, if it lies below it."""
    here = Path(os.getcwd())
    return path.relative_to(here) if path.is_relative_to(here) else path
