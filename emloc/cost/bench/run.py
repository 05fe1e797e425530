"""Registry of the benchmarks, and their runner: one process for each benchmark."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from emloc.cost.bench.anchored import anchored
from emloc.cost.bench.answering import answering
from emloc.cost.bench.build import build
from emloc.cost.bench.capped import capped
from emloc.cost.bench.factorise import factorise
from emloc.cost.bench.host import host_memory
from emloc.cost.bench.jobs import jobs, small_step
from emloc.cost.bench.offload import offload
from emloc.cost.bench.rounds import anchored_rounds
from emloc.cost.bench.rows import BenchRow, read_rows, replace_rows, table, write_facts
from emloc.cost.bench.stored import stored
from emloc.cost.bench.training import Target, training
from emloc.errors import ConfigError, FailedWorkError
from emloc.runtime.distributed import own_device
from emloc.runtime.failures import unexpected, wants_traceback
from emloc.runtime.provenance import provenance

M8, M38, M78 = "internvl2_5_8b", "internvl2_5_38b", "internvl2_5_78b"

BENCHMARKS: dict[str, Callable[[], Iterator[BenchRow]]] = {
    "factorise_8b": partial(factorise, "factorise_8b", M8, 0.25, None),
    "factorise_38b": partial(factorise, "factorise_38b", M38, 0.2, 40),
    "train_8b": partial(
        training,
        M8,
        0.25,
        ("train_8b", "train_8b_nf4", "plan_8b"),
        (Target(6.6, 0.1), Target(6.6, 0.2)),
    ),
    "train_38b": partial(
        training,
        M38,
        0.2,
        ("train_38b", "train_38b_nf4", "plan_38b"),
        (Target(20, 0.33), Target(12, 0.45)),
    ),
    "stored_38b": partial(stored, "stored_38b", M38, 0.2, 0.28),
    "anchored_8b": partial(anchored, "anchored_8b", M8, 0.25),
    "rounds4_8b_nf4": partial(anchored_rounds, "rounds4_8b_nf4", M8, 0.45, 4, 4, stored=True),
    "rounds24_38b": partial(
        anchored_rounds, "rounds24_38b", M38, 0.2, 16, 24, stored=False, features="stored"
    ),
    "rounds16_78b_int2": partial(
        anchored_rounds, "rounds16_78b_int2", M78, 0.45, 2, 16, stored=False, features="stored"
    ),
    "rounds24_78b_nf4": partial(
        anchored_rounds, "rounds24_78b_nf4", M78, 0.45, 4, 24, stored=False, features="stored"
    ),
    "cap24_38b": partial(capped, "cap24_38b", M38, 0.2, "emloc", 24),
    "cap12_38b_nf4": partial(capped, "cap12_38b_nf4", M38, 0.2, "emloc_nf4", 12),
    "cap24_78b_nf4": partial(capped, "cap24_78b_nf4", M78, 0.2, "emloc_nf4", 24),
    "offload_8b": partial(offload, "offload_8b", M8),
    "step_smollm2": partial(small_step, "step_smollm2", "smollm2_135m", 0.25),
    "jobs_smollm2": partial(jobs, "jobs_smollm2", "smollm2_135m", 0.25),
    "answer_8b": partial(answering, "answer_8b", M8, 0.25),
    "answer_38b": partial(answering, "answer_38b", M38, 0.2),
    "build_8b": partial(build, "build_8b", "llama3_8b"),
    "host_memory": partial(host_memory, "host_memory", "llama3_8b"),
}


def bench(names: Sequence[str], path: Path) -> str:
    """Run the named benchmarks one after the other, or all, and return the table with all rows.

    Raises:
        ConfigError: there is no benchmark of such a name.
        FailedWorkError: a benchmark failed.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: there is no such benchmark; choose from {', '.join(BENCHMARKS)}"
        )
    failures = []
    for name in names or BENCHMARKS:
        # A process of its own: memory and limits of one benchmark do not affect the next one.
        process = subprocess.run([sys.executable, "-m", "emloc.cost.bench.run", name, str(path)])
        if process.returncode:
            failures.append(name)
    if failures:
        raise FailedWorkError(f"failed: {', '.join(failures)}; see the error messages above")
    return table(read_rows(path))


def run_benchmark(benchmark: str, path: Path) -> None:
    """Run one benchmark in this process and write its rows into the table."""
    start = time.perf_counter()
    rows = list(BENCHMARKS[benchmark]())
    replace_rows(path, rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, reduced shapes"
    seconds = round(time.perf_counter() - start, 1)
    facts = {"command": f"emloc bench {benchmark}", "device": device, "seconds": seconds}
    write_facts(path, benchmark, facts | {"provenance": provenance()})
    print(table(rows), flush=True)


def table_path() -> Path:
    """Return the path of the table. Only figures at full size belong to the repository."""
    is_full_size = own_device().type == "cuda"
    return Path("experiments/results/bench.csv" if is_full_size else "runs/bench.csv")


def main(benchmark: str, path: Path) -> None:
    """Run one benchmark as the work of a process, and say in one line why it failed."""
    try:
        run_benchmark(benchmark, path)
    except Exception as error:  # why: the process that started this one only sees an exit code
        if wants_traceback():
            traceback.print_exception(error)
        reason = str(error) if isinstance(error, ConfigError) else unexpected(error)
        print(f"emloc bench {benchmark}: {reason}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
