"""The cache keys of whole runs: what they contain, and what they must not contain."""

import json
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emloc.config.compose import compose
from emloc.config.run_folder import folder_name
from emloc.emulators.svd import Svd
from emloc.runtime import stage_cache
from emloc.runtime.digest import digest
from emloc.runtime.keys import key_of, neutral
from emloc.stages.run_config import build


@pytest.fixture
def hashed(monkeypatch):
    """The texts of all values that are hashed to keys."""
    texts = []

    def spy(value):
        texts.append(json.dumps(value))
        return digest(value)

    monkeypatch.setattr(stage_cache, "digest", spy)
    return texts


@pytest.mark.parametrize(
    "overrides",
    [("method=emloc_nf4",), ("method=emloc_covariance",), ("method=upop",), ("method=dora",)],
    ids=lambda words: words[0],
)
def test_keys_of_a_run_contain_no_module_paths(run_uncached, hashed, overrides):
    run_uncached(*overrides)
    assert len(hashed) >= 4
    for text in hashed:
        assert "emloc." not in text
        assert "<function" not in text


def test_the_key_of_a_task_contains_the_scorer_without_its_module():
    for scorer in ("exact", "emloc.tasks.metrics.exact.score", "emloc.metrics.exact.score"):
        task = build(compose(["task=easy_vqa", f"task.scorer={scorer}"])).task
        assert task.key["scorer"] == "exact"


@dataclass(frozen=True, kw_only=True)
class Grown(Svd):
    """The emulator `Svd` with a setting that was added later."""

    key_name = "svd.Svd"

    polished: bool = neutral(False)


def test_an_added_setting_with_its_neutral_value_keeps_keys_and_folders(monkeypatch):
    monkeypatch.setenv("EMLOC_PLUGINS", str(Path(__file__).parent))
    config = compose()
    before = folder_name(config)
    OmegaConf.set_struct(config, False)
    config.emulator._target_ = f"{__name__}.Grown"
    config.emulator.polished = False
    assert folder_name(config) == before
    config.emulator.polished = True
    assert folder_name(config) != before
    values = {"algorithm": "subspace", "aware": True, "multiple": 1}
    assert key_of(Grown(**values)) == key_of(Svd(**values))
    assert key_of(Grown(**values, polished=True)) != key_of(Svd(**values))


def test_moving_a_part_to_another_module_changes_neither_keys_nor_folders(monkeypatch):
    moved = make_dataclass(
        "Svd",
        [],
        bases=(Svd,),
        frozen=True,
        kw_only=True,
        namespace={"key_name": "svd.Svd", "__module__": __name__},
    )
    monkeypatch.setenv("EMLOC_PLUGINS", str(Path(__file__).parent))
    monkeypatch.setattr(f"{__name__}.Moved", moved, raising=False)
    config = compose()
    before = folder_name(config)
    config.emulator._target_ = f"{__name__}.Moved"
    assert folder_name(config) == before
