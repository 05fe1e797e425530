"""Whole runs through the pipeline, and the store that they share."""

from functools import partial

import pytest

from emloc.config.compose import compose
from emloc.pipeline import run
from emloc.runtime.stage_cache import Store
from emloc.stages.run_config import build


@pytest.fixture(scope="session")
def _one_store(shared):
    return Store(shared / "store")


@pytest.fixture
def stages(request, store, _one_store):
    """Where a stage that any test has been through is found by all others, by its key."""
    return store if request.config.getoption("own_stores") else _one_store


def silent(step, values):
    """A report to nobody."""


def run_with(store, settings, *overrides, report=silent):
    return run(build(compose([*settings, *overrides])), store, report)


@pytest.fixture
def go(tiny, stages):
    """Run the pipeline with overrides on top of the tiny ones, on what other tests have made."""
    return partial(run_with, stages, tiny)


@pytest.fixture
def afresh(tiny, store):
    """The same from nothing: for what is about the cache, or the work, or code that is changed."""
    return partial(run_with, store, tiny)
