"""All that is done with a vision-language model of true size: build, train, correct, answer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import nan
from pathlib import Path

import torch

from emloc.cost.bench.capped import stages_of
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, fresh, peak_gb, seconds
from emloc.runtime.memory import GIB
from emloc.runtime.stage_cache import Artifact, Store

STEPS = 10
WRITTEN = 16  # tokens of an answer


def answering(work: str, model: str, ratio: float) -> Iterator[BenchRow]:
    """Peak memory and time of each stage, and of the original's answer with what was carried to it.

    The answer is to one sample as those of training: an image in tiles, and text.
    """
    overrides = (f"train.steps={STEPS}", f"compression.ratio={ratio}", "method=emloc")
    setting = BenchSetup(model, overrides)
    fresh(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        stages = stages_of(setting, Store(Path(folder)))
        for stage in stages:
            gb = stage.facts["peak_gib"] * GIB / 1e9 if setting.full else nan
            yield row(work, f"{stage.stage}: peak reserved", "GB", gb)
            yield row(work, f"{stage.stage}: time", "s", stage.facts["seconds"])
        yield row(work, "a step of training", "s", stages[1].facts["step_seconds"])
        yield from _answer(work, setting, stages[-1])


def _answer(work: str, setting: BenchSetup, recovered: Artifact) -> Iterator[BenchRow]:
    device = setting.device
    fresh(device)
    adapter, model = setting.training_inputs.adapter, setting.source.load(device)
    tuned = adapter.load(model, recovered.folder / "adapter").to(device).eval()
    batch = {name: value.to(device) for name, value in setting.batch(0).items()}

    def write(tokens: int) -> torch.Tensor:
        # To the last one, whatever it is: with random weights an end may come at any place.
        wanted = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        found: torch.Tensor = tuned.generate(**batch, **wanted)
        return found

    with torch.inference_mode():
        length = write(WRITTEN).shape[1] - setting.length
        assert length == WRITTEN, f"{length} tokens were written"
        first = seconds(lambda: write(1), device)
        whole = seconds(lambda: write(WRITTEN), device)
    yield row(work, f"answer to {setting.tiles} tiles: peak allocated", "GB", peak_gb(device))
    yield row(work, "answer: time to the first token", "s", first)
    yield row(work, "answer: a token behind it", "s", (whole - first) / (WRITTEN - 1))
