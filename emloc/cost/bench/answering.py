"""Benchmark of a complete run on a vision-language model: build, train, correct, answer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import nan
from pathlib import Path

import torch

from emloc.cost.bench.capped import stages_of
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, peak_gb, reset_memory, time_call
from emloc.runtime.memory import GIB
from emloc.runtime.stage_cache import Artifact, Store

STEPS = 10  # optimizer steps
ANSWER_TOKENS = 16  # tokens to generate


def answering(benchmark: str, model: str, ratio: float) -> Iterator[BenchRow]:
    """Measure peak memory and time of each stage, and of an answer by the corrected model.

    The corrected model is the original with the recovered adapter. It answers one sample of the
    same shape as in training: an image in tiles, and text.
    """
    overrides = (f"train.steps={STEPS}", f"compression.ratio={ratio}", "method=emloc")
    setup = BenchSetup(model, overrides)
    reset_memory(setup.device)
    with tempfile.TemporaryDirectory() as folder:
        stages = stages_of(setup, Store(Path(folder)))
        for stage in stages:
            gb = stage.facts["peak_gib"] * GIB / 1e9 if setup.is_full_size else nan
            yield row(benchmark, f"{stage.stage}: peak reserved", "GB", gb)
            yield row(benchmark, f"{stage.stage}: time", "s", stage.facts["seconds"])
        yield row(benchmark, "a step of training", "s", stages[1].facts["step_seconds"])
        yield from _answer(benchmark, setup, stages[-1])


def _answer(benchmark: str, setup: BenchSetup, recovered: Artifact) -> Iterator[BenchRow]:
    """Measure an answer of the original model with the recovered adapter."""
    device = setup.device
    reset_memory(device)
    adapter, model = setup.training_inputs.adapter, setup.source.load(device)
    tuned = adapter.load(model, recovered.folder / "adapter").to(device).eval()
    batch = {name: value.to(device) for name, value in setup.batch(0).items()}

    def generate(tokens: int) -> torch.Tensor:
        # With random weights the end token may come at any place, so the length is forced.
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        tokens_written: torch.Tensor = tuned.generate(**batch, **lengths)
        return tokens_written

    with torch.inference_mode():
        length = generate(ANSWER_TOKENS).shape[1] - setup.length
        assert length == ANSWER_TOKENS, f"{length} tokens were generated"
        first_token = time_call(lambda: generate(1), device)
        all_tokens = time_call(lambda: generate(ANSWER_TOKENS), device)
    yield row(benchmark, f"answer to {setup.tiles} tiles: peak allocated", "GB", peak_gb(device))
    yield row(benchmark, "answer: time to the first token", "s", first_token)
    yield row(
        benchmark,
        "answer: a token behind it",
        "s",
        (all_tokens - first_token) / (ANSWER_TOKENS - 1),
    )
