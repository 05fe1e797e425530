"""The verbs of the command, such as `emloc report`. Torch is imported by those that need it."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emloc.config.check import check_settings
from emloc.config.compose import compose
from emloc.config.experiments import sweep_runs
from emloc.config.run_folder import is_run
from emloc.errors import ConfigError
from emloc.runtime.imports import exempt_imports
from emloc.runtime.progress import BesideBarFilter
from emloc.runtime.quiet_libraries import quiet


@dataclass(frozen=True)
class Verb:
    """One verb of the command."""

    name: str
    about: str  # a clause for `emloc --help`
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]

    @property
    def parser(self) -> argparse.ArgumentParser:
        """Parser of the arguments behind the verb."""
        parser = argparse.ArgumentParser(
            f"emloc {self.name}",
            description=f"{self.about[0].upper()}{self.about[1:]}.",
            epilog=f"Example: {self.example}",
        )
        self.add_arguments(parser)
        return parser


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", type=Path, help="runs/<name>, one run in it, or a file of --csv")
    parser.add_argument("--to", type=Path, help="folder to write (default: runs/<name>/report)")
    parser.add_argument("--csv", type=Path, help="file to write the numbers of all runs into")


def _report(options: argparse.Namespace) -> None:
    from emloc.report.markdown import table, table_with_notes
    from emloc.report.rows import rows_of, write_rows
    from emloc.report.summary_file import is_summary, read_summary, write_summary

    place: Path = options.place
    if not place.exists():
        raise ConfigError(f"no folder or file {place}; give one such as runs/demo")
    if is_summary(place):
        if options.to:
            raise ConfigError(f"{place} holds means, and no runs to draw; leave out --to")
        print(table(place))
        if options.csv:
            write_summary(read_summary(place), options.csv)
        return
    rows = rows_of(place)
    if not rows:
        raise ConfigError(f"no runs in {place}; give one such as runs/demo")
    several = place.is_dir() and not is_run(place)
    print(table_with_notes(place, rows, unrun=not is_run(place)))
    to = options.to or (place / "report" if several else None)
    written = []
    try:
        if to:
            from emloc.report.write import write_report

            written += write_report(place, rows, to)
        if options.csv:
            write_rows(rows, options.csv)
            written.append(options.csv)
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename}: {error.strerror}; give another folder, --to FOLDER"
        ) from error
    print("", *_written(written, to), sep="\n")


def _written(paths: Sequence[Path], folder: Path | None) -> Iterator[str]:
    """Yield a line for each file, but one in all for the files in a folder below `folder`."""
    counts: Counter[str] = Counter()
    for path in paths:
        if folder is not None and folder in path.parent.parents:
            counts[path.relative_to(folder).parts[0]] += 1
        else:
            yield f"wrote {path}"
    yield from (f"wrote {count} files in {folder}/{name}" for name, count in counts.items())


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _tables(options: argparse.Namespace) -> None:
    from emloc.config.paths import EXPERIMENTS
    from emloc.report.all_experiments import tables
    from emloc.runtime.folders import runs_folder

    print(tables(EXPERIMENTS, runs_folder()))


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a finished run: runs/<name>/<run>")
    parser.add_argument("--to", type=Path, help="folder to write (default: <run>/merged)")
    parser.add_argument(
        "--dtype",
        choices=["float32"],
        help="write all weights in 32 bits, so that nothing of the adapter is rounded away "
        "(default: as the original stores them)",
    )


def _merge(options: argparse.Namespace) -> None:
    with exempt_imports():
        quiet()
        import torch

        from emloc.stages.merge_run import merge_run
    _log_to_stderr()

    dtype = torch.float32 if options.dtype else None
    print(merge_run(options.run, options.to or options.run / "merged", dtype))


def _log_to_stderr() -> None:
    """Log the progress of a verb that takes minutes; its result alone is on stdout."""
    handler = logging.StreamHandler()
    handler.addFilter(BesideBarFilter())
    logging.basicConfig(
        level=logging.INFO,
        format="[%(asctime)s] %(message)s",
        datefmt="%H:%M:%S",
        handlers=[handler],
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="as for a run: model=internvl2_5_38b lora=r16")
    parser.add_argument("--length", type=int, default=2048, help="tokens of one sample (2048)")
    parser.add_argument("--answer", type=int, default=256, help="answer tokens among them (256)")
    parser.add_argument(
        "--gpu", default="rtx4090", help="a GPU such as rtx4090 (default), or a size such as 12GiB"
    )
    parser.add_argument("--host", help="host memory, such as 32GiB (that of this machine)")
    parser.add_argument("--disk", help="free disk, such as 500GiB (that of this machine's cache)")


def _plan(options: argparse.Namespace) -> None:
    runs = sweep_runs(options.overrides)
    configs = [compose(run) for run in runs]
    for cfg in configs:
        check_settings(cfg)

    with exempt_imports():
        quiet()
        from emloc.cost.plan.gpus import find_gpu
        from emloc.cost.plan.here import disk_gib, host_gib
        from emloc.cost.plan.layout import StepShape
        from emloc.cost.plan.sweep import plan_sweep
        from emloc.cost.plan.table import plan
        from emloc.stages.run_config import build

    if not 1 <= options.answer <= options.length:
        raise ConfigError(f"--answer {options.answer} of --length {options.length}: give 1 to all")
    machine = find_gpu(options.gpu), host_gib(options.host), disk_gib(options.disk)
    run_configs = [build(cfg) for cfg in configs]
    if len(runs) > 1:
        common = set(runs[0]).intersection(*runs)
        labels = [" ".join(word for word in run if word not in common) for run in runs]
        several = list(zip(labels, run_configs, strict=True))
        print(plan_sweep(several, options.length, options.answer, *machine))
        return
    (run_config,) = run_configs
    step = StepShape.of(run_config.train, options.length, options.answer)
    print(plan(run_config, step, *machine))


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("works", nargs="*", help="names such as factorise_8b train_38b (all)")
    parser.add_argument("--to", type=Path, help="file of the table to write")


def _bench(options: argparse.Namespace) -> None:
    with exempt_imports():
        quiet()
        from emloc.cost.bench.run import bench, table_path

    print(bench(options.works, options.to or table_path()))


_ALL = (
    Verb(
        "report",
        "print the table of a folder of runs, and write it with figures and a page",
        "emloc report runs/demo",
        _report_arguments,
        _report,
    ),
    Verb(
        "tables",
        "print one page over all experiments: runs, missing runs and the paper's numbers",
        "emloc tables",
        _no_arguments,
        _tables,
    ),
    Verb(
        "merge",
        "merge the adapter of a run into the original weights, and write a checkpoint",
        "emloc merge runs/demo/RUN --to merged",
        _merge_arguments,
        _merge,
    ),
    Verb(
        "plan",
        "print memory and time that each method would need for a model; reads no weights",
        "emloc plan model=internvl2_5_38b lora=r16 --gpu rtx4090",
        _plan_arguments,
        _plan,
    ),
    Verb(
        "bench",
        "measure speed and memory on this machine's GPU, beside other libraries",
        "emloc bench factorise_8b",
        _bench_arguments,
        _bench,
    ),
)
VERBS = {verb.name: verb for verb in _ALL}
