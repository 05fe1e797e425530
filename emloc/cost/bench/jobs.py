"""Benchmark of small trainings on one GPU: one at a time, and side by side.

A job is a training in a process that has run a short training before. So neither the start of an
interpreter nor that of CUDA counts, as in the workers of a sweep, which live on from job to job.
They use the emulator and the graphs of the job before again, as in a sweep of learning rates; one
row measures jobs that open everything anew. As many jobs run side by side as
`budget.jobs_per_gpu=auto` admits. They do so twice, without and with NVIDIA's Multi-Process Service
(MPS), if this machine has its control program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isnan, nan
from pathlib import Path

import torch
from torch import Tensor

from emloc.adapters.training_inputs import TrainingInputs
from emloc.cost.bench.busy import shared_core
from emloc.cost.bench.rows import BenchRow, Figure, row
from emloc.cost.bench.setting import BenchSetup, RandomRow, reset_memory, synchronized_time
from emloc.cost.bench.training import (
    BUSY_LOOPS,
    CAPTURE_OFF,
    PreparedModel,
    median_step,
    open_factorized,
)
from emloc.cost.bench.workers import JobFigures, Train, Workers
from emloc.cost.expected_memory import need_of_peak
from emloc.data.examples import Examples
from emloc.runtime.gpu_ledger import gpu_memory, most_jobs
from emloc.runtime.gpu_queue import jobs_that_fit
from emloc.stages.training.kept_trainee import KeptTrainee
from emloc.stages.training.train import fit_rows

STEPS, WARM_UP_STEPS = 100, 4  # steps of a job, and of the training that precedes it
BATCH, LENGTH, ANSWER = 8, 320, 128  # rows of a step, their tokens, and answer tokens among them
BATCHES = 8  # different batches of a training
LOG_EVERY = 5  # steps, as in the recipes for small models
MOST_STEP = 0.015  # target: seconds of a step
# A small model needs no savings of memory.
RECIPE = ("train.checkpointing=false", "train.host_activations=false")
MPS_CONTROL = "nvidia-cuda-mps-control"


def jobs(benchmark: str, model: str, ratio: float) -> Iterator[BenchRow]:
    """Measure how many trainings an hour one GPU completes, one at a time and side by side."""
    setup = BenchSetup(model, RECIPE, LOG_EVERY)
    is_full_size = setup.is_full_size
    assert setup.run_config.adapter.trains  # composed here, once for all workers
    train_anew = partial(train_random, setup, ratio)
    train = partial(train_anew, keeper=KeptTrainee())  # of each worker
    warm_up, steps = (WARM_UP_STEPS, STEPS) if is_full_size else (0, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Workers(train_anew, folder, {}) as workers:
            workers.start(1)
            workers.run(warm_up, None)
            seconds_anew, _ = workers.run(steps, None)
        with Workers(train, folder, {}) as workers:
            workers.start(1)
            workers.run(warm_up, None)
            seconds, job = workers.run(steps, None)
            need = need_of_peak(job.peak)
            count = count_side_by_side(need) if is_full_size else 2
            workers.start(count - 1)
            workers.run(warm_up, need)
            seconds_beside, _ = workers.run(steps, need)
        seconds_with_mps = nan
        with mps(folder / "mps") as environment:
            if environment is not None:
                with Workers(train, folder, environment) as workers:
                    workers.start(count)
                    workers.run(warm_up, need)
                    seconds_with_mps, _ = workers.run(steps, need)
    alone = 3600 / seconds
    beside = 3600 * count / seconds_beside
    with_mps = 3600 * count / seconds_with_mps
    yield row(benchmark, "one at a time", "jobs an hour", alone)
    what = "one at a time, each opens everything anew"
    yield row(benchmark, what, "jobs an hour", 3600 / seconds_anew)
    yield row(benchmark, "side by side", "jobs an hour", beside)
    yield row(benchmark, "side by side, over one at a time", "", beside / alone)
    yield row(benchmark, "side by side with MPS", "jobs an hour", _or_word(with_mps))
    gain = _or_word(with_mps / alone)
    yield row(benchmark, "side by side with MPS, over one at a time", "", gain)
    yield row(benchmark, "jobs that run side by side", "", count)
    yield row(benchmark, "a job: peak reserved", "GB", job.peak / 1e9 if is_full_size else nan)


def small_step(benchmark: str, model: str, ratio: float) -> Iterator[BenchRow]:
    """Measure a step of a small training that has the GPU alone."""
    setup = BenchSetup(model, RECIPE, LOG_EVERY)
    plain_setup = BenchSetup(model, (*RECIPE, CAPTURE_OFF), LOG_EVERY)
    warm_up, steps = (WARM_UP_STEPS, STEPS) if setup.is_full_size else (0, 1)
    ours, on_shared_core, plain = (
        train_alone(partial(train, one_setup, ratio), warm_up, steps)
        for train, one_setup in (
            (train_random, setup),
            (train_on_shared_core, setup),
            (train_random, plain_setup),
        )
    )
    most = MOST_STEP if setup.is_full_size else None
    yield row(benchmark, "a step; without CUDA graphs", "s", ours.step, peer=plain.step, most=most)
    what = f"a step; on a core that {BUSY_LOOPS} busy loops share"
    yield row(benchmark, what, "s", ours.step, peer=on_shared_core.step)


def train_alone(train: Train, warm_up: int, steps: int) -> JobFigures:
    """Return the figures of a job that has the GPU alone, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, Workers(train, Path(folder), {}) as workers:
        workers.start(1)
        workers.run(warm_up, None)
        return workers.run(steps, None)[1]


def _or_word(figure: float) -> Figure:
    """The figure, or a word for why there is none."""
    return "no MPS" if isnan(figure) else figure


def count_side_by_side(need: int) -> int:
    """Return how many jobs `budget.jobs_per_gpu=auto` admits to the first GPU."""
    return max(1, jobs_that_fit(gpu_memory("first", 0), need, most_jobs(1)))


@contextmanager
def mps(folder: Path) -> Iterator[dict[str, str] | None]:
    """Start MPS with a folder of its own, and yield the variables that its programs need.

    None if this machine has no GPU or no control program of MPS.
    """
    program = shutil.which(MPS_CONTROL)
    if program is None or not torch.cuda.is_available():
        yield None
        return
    variables = {
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
    }
    for path in variables.values():
        Path(path).mkdir(parents=True)
    environment: Mapping[str, str] = {**os.environ, **variables}
    subprocess.run([program, "-d"], env=environment, check=True)
    try:
        yield variables
    finally:
        subprocess.run([program], env=environment, input="quit\n", text=True, check=False)


def train_on_shared_core(setup: BenchSetup, ratio: float, steps: int) -> JobFigures:
    """Train as `train_random` does, on a core that other programs use, too."""
    with shared_core(BUSY_LOOPS):
        return train_random(setup, ratio, steps)


def train_random(
    setup: BenchSetup, ratio: float, steps: int, keeper: KeptTrainee | None = None
) -> JobFigures:
    """Train an emulator with random factors, or the one that an earlier job has opened."""
    is_full_size, run_config = setup.is_full_size, setup.run_config
    batch, length, answer = (BATCH, LENGTH, ANSWER) if is_full_size else (2, 16, 8)
    reset_memory(setup.device)
    inputs = TrainingInputs(
        run_config.adapter,  # type: ignore[arg-type]
        run_config.lora,
        tuple(run_config.model.adapted_layers(setup.source)),
        Examples("random", ()),
        length,
        replace(run_config.train, steps=steps, batch=batch),
        run_config.seed,
    )
    vocabulary = setup.source.config.vocab_size
    batches = [random_batch(vocabulary, (batch, length), answer, seed) for seed in range(BATCHES)]
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        fit_rows(
            Path(folder),
            PreparedModel(  # type: ignore[arg-type]
                setup.source, partial(open_factorized, setup, ratio=ratio), ("factors", ratio)
            ),
            inputs,
            [RandomRow(length, seed, length - answer, ()) for seed in range(steps * batch)],
            lambda rows: dict(batches[rows[0].seed % BATCHES]),
            device=setup.device,
            report=lambda step, values: ends.append(synchronized_time(setup.device)),
            keeper=keeper,
        )
    peak = torch.cuda.max_memory_reserved() if is_full_size else 0
    # The median leaves out the first steps, which record graphs.
    return JobFigures(peak, median_step(ends, setup.log_every) if len(ends) > 1 else nan)


def random_batch(
    vocabulary: int, shape: tuple[int, int], answer: int, seed: int
) -> dict[str, Tensor]:
    """Return rows of random tokens with labels on their answers, and logits for these only."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    positions = torch.arange(shape[1])[-answer - 1 :]
    labels = ids[:, positions].clone()
    labels[:, 0] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "logits_to_keep": positions,
    }
