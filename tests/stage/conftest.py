"""Fixtures that run the whole pipeline, and the stage cache that tests share."""

from functools import partial

import pytest
from composed import compose_cached

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
