"""Which benchmarks there are, and how they are run: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from emloc.cost.bench.answering import answering
from emloc.cost.bench.capped import capped
from emloc.cost.bench.factorise import factorise
from emloc.cost.bench.host import host_memory
from emloc.cost.bench.offload import offload
from emloc.cost.bench.rows import BenchRow, merge, note, read, table
from emloc.cost.bench.training import Target, training
from emloc.errors import ConfigError
from emloc.runtime.distributed import own_device
from emloc.runtime.provenance import provenance

M8, M38, M78 = "internvl2_5_8b", "internvl2_5_38b", "internvl2_5_78b"

WORKS: dict[str, Callable[[], Iterator[BenchRow]]] = {
    "factorise_8b": partial(factorise, "factorise_8b", M8, 0.25, None),
    "factorise_38b": partial(factorise, "factorise_38b", M38, 0.2, 40),
    "train_8b": partial(
        training,
        M8,
        0.25,
        ("train_8b", "train_8b_nf4", "plan_8b"),
        (Target(6.6, 0.25), Target(6.6, None)),
    ),
    "train_38b": partial(
        training,
        M38,
        0.2,
        ("train_38b", "train_38b_nf4", "plan_38b"),
        (Target(20, 0.55), Target(12, None)),
    ),
    "cap24_38b": partial(capped, "cap24_38b", M38, 0.2, "emloc", 24),
    "cap12_38b_nf4": partial(capped, "cap12_38b_nf4", M38, 0.2, "emloc_nf4", 12),
    "cap24_78b_nf4": partial(capped, "cap24_78b_nf4", M78, 0.2, "emloc_nf4", 24),
    "offload_8b": partial(offload, "offload_8b", M8),
    "answer_8b": partial(answering, "answer_8b", M8, 0.25),
    "answer_38b": partial(answering, "answer_38b", M38, 0.2),
    "host_memory": partial(host_memory, "host_memory", "llama3_8b"),
}


def bench(works: Sequence[str], path: Path) -> str:
    """Run the works one after the other and return the whole table.

    Raises:
        ConfigError: there is no such work, or one of them failed.
    """
    unknown = [work for work in works if work not in WORKS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such benchmark; one of {', '.join(WORKS)}")
    failed = []
    for work in works or WORKS:
        # A process of its own: what one leaves on the device, or caps, is not the next one's.
        done = subprocess.run([sys.executable, "-m", "emloc.cost.bench.run", work, str(path)])
        if done.returncode:
            failed.append(work)
    if failed:
        raise ConfigError(f"failed: {', '.join(failed)}; what it said stands above")
    return table(read(path))


def one(work: str, path: Path) -> None:
    """Run one work in this process and put its rows into the table."""
    start = time.perf_counter()
    rows = list(WORKS[work]())
    merge(path, rows)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, reduced shapes"
    took = round(time.perf_counter() - start, 1)
    facts = {"command": f"emloc bench {work}", "device": name, "seconds": took}
    note(path, work, facts | {"provenance": provenance()})
    print(table(rows), flush=True)


def home() -> Path:
    """Where the table is kept: only figures of full size belong to the repository."""
    full = own_device().type == "cuda"
    return Path("experiments/results/bench.csv" if full else "runs/bench.csv")


if __name__ == "__main__":
    one(sys.argv[1], Path(sys.argv[2]))
