"""Fixtures that run the whole pipeline, and the stage cache that tests share."""

from dataclasses import replace
from functools import partial

import pytest
from composed import compose_cached
from pictured import VqaTask, save_gemma, save_internvl

from emloc.pipeline import run
from emloc.runtime.stage_cache import Store
from emloc.stages.run_config import build


@pytest.fixture(scope="session")
def _one_store(shared):
    return Store(shared / "store")


@pytest.fixture
def stages(request, store, _one_store):
    """The stage cache that all tests share: a stage computed by one test is reused by all others.

    With `--own-stores` each test gets an empty cache instead.
    """
    return store if request.config.getoption("own_stores") else _one_store


def ignore_report(step, values):
    """Ignore the reported training metrics."""


def run_with(store, settings, *overrides, report=ignore_report):
    """Run the pipeline with the stage cache `store` and these overrides."""
    return run(build(compose_cached([*settings, *overrides])), store, report)


@pytest.fixture
def run_cached(tiny, stages):
    """Function that runs the pipeline on the tiny model and reuses stages of other tests."""
    return partial(run_with, stages, tiny)


@pytest.fixture
def run_uncached(tiny, store):
    """Function that runs the pipeline on the tiny model with an empty stage cache.

    For tests of the cache, of messages during a stage, and of runs with patched code.
    """
    return partial(run_with, store, tiny)


@pytest.fixture(scope="session")
def internvl(made_once):
    return made_once("internvl", partial(save_internvl, num_hidden_layers=6))


@pytest.fixture(scope="session")
def gemma(made_once):
    return made_once("gemma", save_gemma)


@pytest.fixture
def pictured_run(internvl, gemma):
    """Function that returns the settings of a run in float32 on questions about images."""

    def settings(*overrides, model="internvl2_5_2b", task=None):
        cfg = compose_cached(
            [
                f"model={model}",
                f"model.source={gemma if model == 'gemma3_4b' else internvl}",
                *("model.dtype=float32", "calibration.samples=6", "compression=r75", "lora=r4"),
                *("train.steps=3", "train.batch=4", "train.log_every=1", "eval.batch=4"),
                *("tracker=none", *overrides),
            ]
        )
        return replace(build(cfg), task=task or VqaTask())

    return settings
