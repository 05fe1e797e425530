"""The `emloc` command. Imports neither torch nor transformers: `--help` has to answer at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from emloc.config.compose import compose, explain, register
from emloc.config.paths import CONF
from emloc.errors import ConfigError
from emloc.runtime.quiet_libraries import quiet
from emloc.sweeps.job import run_job

USER_ERROR, INTERRUPTED = 2, 130


def main() -> None:
    """Run `emloc <overrides>` (Hydra's command line), or one of the verbs below."""
    # Without it pieces of many sizes leave gaps between them that nothing else fits into.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    verb = VERBS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        if verb is not None:
            verb(sys.argv[2:])
        else:
            _hydra()
    except ConfigError as error:
        _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error))
    except ValueError as error:
        if not _of_hydra(error):
            raise
        _refuse(f"{str(error).strip()}; a group takes one of its choices, as in tracker=none")
    except BrokenPipeError:  # whoever was reading has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("emloc: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _hydra() -> None:
    # With it Hydra raises its errors instead of printing them, and ours is the one line shown.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    register(sys.argv[1:])
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(run_job)()


def _of_hydra(error: Exception) -> bool:
    """Whether Hydra raised it, which has no type of its own for some misuse."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals["__name__"].startswith("hydra.")


def _refuse(message: str) -> None:
    print(f"emloc: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _report(arguments: list[str]) -> None:
    """Print the table of a folder of runs, and write it with figures and a page to look at."""
    from emloc.report.markdown import is_run, table_with_notes
    from emloc.report.rows import rows_of, write_rows

    parser = argparse.ArgumentParser("emloc report", description=_report.__doc__)
    parser.add_argument("place", type=Path, help="runs/<name>, one run in it, or a file of --csv")
    parser.add_argument("--to", type=Path, help="folder to write (of runs/<name>: its report/)")
    parser.add_argument("--csv", type=Path, help="a file to write the numbers of all runs into")
    chosen = parser.parse_args(arguments)
    place: Path = chosen.place
    if not place.exists():
        raise ConfigError(f"no folder or file {place}; give one such as runs/demo")
    rows = rows_of(place)
    if not rows:
        raise ConfigError(f"no runs in {place}; give one such as runs/demo")
    several = place.is_dir() and not is_run(place)
    print(table_with_notes(place, rows, unrun=not is_run(place)))
    to = chosen.to or (place / "report" if several else None)
    written = []
    try:
        if to:
            from emloc.report.write import write_report

            written += write_report(place, rows, to)
        if chosen.csv:
            write_rows(rows, chosen.csv)
            written.append(chosen.csv)
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename}: {error.strerror}; give another folder, --to FOLDER"
        ) from error
    print("", *(f"wrote {path}" for path in written), sep="\n")


def _tables(arguments: list[str]) -> None:
    """Print one page over all experiments: what was run, what is missing, the paper's numbers."""
    argparse.ArgumentParser("emloc tables", description=_tables.__doc__).parse_args(arguments)
    from emloc.config.paths import EXPERIMENTS
    from emloc.report.all_experiments import tables

    print(tables(EXPERIMENTS, Path(os.environ.get("EMLOC_RUNS", "runs"))))


def _merge(arguments: list[str]) -> None:
    """Fold a run's adapter into the original weights and write a checkpoint."""
    parser = argparse.ArgumentParser("emloc merge", description=_merge.__doc__)
    parser.add_argument("run", type=Path, help="runs/<name>/<run>")
    parser.add_argument("--to", type=Path, help="folder to write (default: <run>/merged)")
    chosen = parser.parse_args(arguments)

    quiet()
    from emloc.stages.merge_run import merge_run

    print(merge_run(chosen.run, chosen.to or chosen.run / "merged"))


def _plan(arguments: list[str]) -> None:
    """Say what each method would need of a model, before any weight is read."""
    parser = argparse.ArgumentParser("emloc plan", description=_plan.__doc__)
    parser.add_argument("overrides", nargs="*", help="as for a run: model=internvl2_5_38b lora=r16")
    parser.add_argument("--length", type=int, default=2048, help="tokens of one sample (2048)")
    parser.add_argument("--answer", type=int, default=256, help="of these learnt (256)")
    parser.add_argument("--gpu", default="rtx4090", help="whose memory and speed to plan for")
    chosen = parser.parse_args(arguments)
    cfg = compose(chosen.overrides)

    quiet()
    from emloc.cost.plan.gpus import gpu_called
    from emloc.cost.plan.layout import StepShape
    from emloc.cost.plan.table import plan
    from emloc.stages.run_config import build

    if not 1 <= chosen.answer <= chosen.length:
        raise ConfigError(f"--answer {chosen.answer} of --length {chosen.length}: give 1 to all")
    cell = build(cfg)
    work = StepShape.of(cell.train, chosen.length, chosen.answer)
    print(plan(cell, work, gpu_called(chosen.gpu)))


def _bench(arguments: list[str]) -> None:
    """Measure speed and memory beside the peers, on whatever GPU is there."""
    parser = argparse.ArgumentParser("emloc bench", description=_bench.__doc__)
    parser.add_argument("works", nargs="*", help="factorise_8b, train_38b ... (all)")
    parser.add_argument("--to", type=Path, help="table to write")
    chosen = parser.parse_args(arguments)

    quiet()
    from emloc.cost.bench.run import bench, home

    print(bench(chosen.works, chosen.to or home()))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "report": _report,
    "tables": _tables,
    "merge": _merge,
    "plan": _plan,
    "bench": _bench,
}

if __name__ == "__main__":
    main()
