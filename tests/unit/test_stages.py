"""Stages: their order, their keys, and their columns in reports."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emloc.config.compose import compose
from emloc.config.run_folder import folder_name
from emloc.config.stage_order import merged, order_stages, stages_of, standard_stages
from emloc.errors import ConfigError
from emloc.runtime.keys import neutral
from emloc.stages import Stage
from emloc.stages.run_config import build

STANDARD = [
    *("calibrate", "emulate", "features", "refit", "anchor", "train", "recover", "polish"),
    *("evaluate", "evaluate_as_trained"),
]


@dataclass(frozen=True, kw_only=True)
class Heal(Stage):
    """A stage with settings."""

    gives = "emulator"
    steps: int
    late: bool = neutral(False)

    def needed(self, context):
        return True

    def inputs(self, context):
        return []

    def work(self, folder, context):
        return {}


def test_every_run_has_the_standard_stages_in_order():
    run_config = build(compose())
    assert list(run_config.stage) == list(standard_stages()) == STANDARD
    assert [name for name, one in run_config.stage.items() if one.counted] == STANDARD[:8]
    assert [name for name, one in run_config.stage.items() if one.column] == STANDARD[:9]


@pytest.mark.parametrize("first", [True, False], ids=["named first", "named last"])
def test_a_stage_runs_directly_after_the_stage_it_names(first):
    standard = {name: stage["after"] for name, stage in standard_stages().items()}
    heal, wax = {"heal": "emulate"}, {"wax": "polish", "shine": "wax"}
    after = heal | wax | standard if first else standard | heal | wax
    order = order_stages(after)
    assert order == [
        *("calibrate", "emulate", "heal", "features", "refit", "anchor", "train", "recover"),
        *("polish", "wax", "shine"),
        *("evaluate", "evaluate_as_trained"),
    ]


@pytest.mark.parametrize("after", ["emulation", "heal"], ids=["a typo", "itself"])
def test_a_stage_after_a_missing_stage_is_refused(after):
    with pytest.raises(ConfigError, match=rf"^stage\.heal\.after={after}: there is no such stage"):
        order_stages({"emulate": None, "heal": after})


def test_the_key_of_a_stage_contains_its_settings_but_not_its_position():
    stage = Heal(after="emulate", steps=3)
    assert stage.key == {"part": "test_stages.Heal", "steps": 3}
    assert Heal(after="train", steps=3, counted=False, column=False).key == stage.key
    assert Heal(after="emulate", steps=4).key != stage.key
    assert Heal(after="emulate", steps=3, late=True).key == stage.key | {"late": True}


def test_a_stage_without_its_methods_is_refused():
    class Idle(Stage):
        gives = "nothing"

    with pytest.raises(
        ConfigError, match=r"Idle does not define inputs, needed, work, which every"
    ):
        Idle(after=None)


def test_standard_stages_do_not_change_the_name_of_a_run_folder(monkeypatch):
    """Runs from before a further stage existed keep their folders."""
    monkeypatch.setenv("EMLOC_PLUGINS", str(Path(__file__).parent))
    config = compose()
    OmegaConf.set_struct(config, False)
    name = folder_name(config)
    config.stage.evaluate.column = False
    assert folder_name(config) == name
    config.stage.heal = {"_target_": "test_stages.Heal", "after": "emulate", "steps": 3}
    healed = folder_name(config)
    assert healed != name
    config.stage.heal.late = False
    assert folder_name(config) == healed
    config.stage.heal.late = True
    assert folder_name(config) != healed


def test_a_run_without_the_setting_stage_had_the_standard_stages():
    assert list(stages_of({"method": "emloc"})) == STANDARD
    heal = {"after": "emulate", "counted": True, "column": True}
    assert list(stages_of({"stage": standard_stages() | {"heal": heal}}))[1:4] == [
        *("emulate", "heal", "features"),
    ]


def test_stage_columns_of_several_runs_are_merged_in_order():
    healed = ["calibrate", "emulate", "heal", "train"]
    assert merged(["calibrate", "emulate", "train"], healed) == healed
    assert merged(healed, ["emulate", "train", "polish"]) == [*healed, "polish"]
    assert merged([], healed) == healed
