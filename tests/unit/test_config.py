"""Every YAML file composes and builds, and each wrong value is refused in one line."""

import copy
import dataclasses
import re
import sys
import typing
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from transformers import SchedulerType

from emloc.config.compose import compose
from emloc.config.explain import explain
from emloc.config.paths import CONF
from emloc.config.run_folder import folder_name
from emloc.config.settings import DECISIVE, SCHEDULES, Config
from emloc.errors import ConfigError
from emloc.stages.run_config import RunConfig, build

CHOICES = {
    folder.name: sorted(path.stem for path in folder.glob("[!_]*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and any(folder.glob("*.yaml"))
}
FILES = [
    f"{group}/{stem}"
    for group, stems in CHOICES.items()
    for stem in stems
    if f"{group}/{stem}" != "stage/standard"  # stage/standard only lists other stages
]
PRESET = ("emulator", "adapter", "recovery")
# Groups whose parts each have a module with the name of their YAML file.
PARTS = (*PRESET, "precision")
PACKAGES = {
    "emulator": "emloc.emulators",
    "adapter": "emloc.adapters",
    "recovery": "emloc.recovery",
    "precision": "emloc.precision",
}
SECTIONS = typing.get_type_hints(Config)
# Groups whose choices all go together. A format requires its own number of bits, and a stage
# requires the stages around it.
FREE = [group for group in CHOICES if group not in ("precision", "stage")]

# Groups whose values a method can change.
CHANGED = ("compression", "train")


def yaml_of(name: str) -> DictConfig:
    return OmegaConf.load(CONF / f"{name}.yaml")


def spelled(name: str) -> dict[str, object]:
    """The settings in a YAML file, merged with the files of its defaults list.

    The key `_target_` is removed.
    """
    settings = OmegaConf.to_container(yaml_of(name))
    settings.pop("_target_", None)
    for line in settings.pop("defaults", []):
        if line != "_self_":
            choice, _, place = line.partition("@")
            other = spelled(f"{name.split('/')[0]}/{choice}")
            if place:
                key, _, below = place.partition(".")
                settings[key] = settings.get(key, {}) | {below: other}
            else:
                settings = other | settings
    return settings


def preset(method: str) -> dict[str, str]:
    """Group -> choice, for the groups that a method selects."""
    lines = (line for one in yaml_of(f"method/{method}").defaults for line in one.items())
    return {key.removeprefix("override /"): choice for key, choice in lines}


def class_of(name: str) -> type:
    """The class that a YAML file builds: its `_target_`, or the class of its section."""
    node = yaml_of(name)
    group = name.split("/")[0]
    if "_target_" in node:
        return get_class(node._target_)
    bases = [line for line in node.get("defaults", []) if line[0] == "_" and line != "_self_"]
    return class_of(f"{group}/{bases[0]}") if bases else SECTIONS[group]


@cache
def _default() -> DictConfig:
    return compose()


def changed(*overrides: str) -> DictConfig:
    """The configuration with these overrides; a hundred times faster than composing."""
    cfg = copy.deepcopy(_default())
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(cfg, key, yaml.safe_load(value), merge=False)
    return cfg


def refusal(cfg: DictConfig) -> str:
    """The one-line message with which `build` refuses a configuration."""
    with pytest.raises(ConfigError) as caught:
        build(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_groups_are_the_sections_and_the_parts_of_a_method():
    sections = {name for name, kind in SECTIONS.items() if kind not in (str, int)}
    assert set(CHOICES) == (sections - {"budget"}) | {"method"}
    assert [field.name for field in dataclasses.fields(RunConfig)] == list(SECTIONS)
    assert set(SECTIONS) - set(DECISIVE) == {"name", "method", "tracker", "budget"}


@pytest.mark.parametrize("choice", [f"{g}={one}" for g in CHANGED for one in CHOICES[g]])
def test_each_choice_builds_the_values_of_its_yaml(choice):
    """Of the groups whose values a method can change; the next test has those of all others."""
    group, stem = choice.split("=")
    _check(getattr(build(compose([choice])), group), f"{group}/{stem}")


@pytest.mark.parametrize(
    "chosen",
    [
        {group: CHOICES[group][turn % len(CHOICES[group])] for group in FREE}
        for turn in range(max(len(CHOICES[group]) for group in FREE))
    ],
    ids=lambda chosen: chosen["method"],
)
def test_a_method_with_one_choice_of_each_group_builds_the_values_of_the_yamls(chosen):
    """Each choice appears at least once, in as many cases as the largest group has choices."""
    run_config = build(compose([f"{group}={stem}" for group, stem in chosen.items()]))
    assert run_config.method == chosen["method"]
    method_settings = OmegaConf.to_container(yaml_of(f"method/{run_config.method}"))
    for group in chosen.keys() - {"method"}:
        _check(
            getattr(run_config, group), f"{group}/{chosen[group]}", method_settings.get(group, {})
        )


@pytest.mark.parametrize("stage", [one for one in CHOICES["stage"] if one != "standard"])
def test_each_stage_builds_the_values_of_its_yaml(stage):
    _check(build(_default()).stage[stage], f"stage/{stage}")


@pytest.mark.parametrize("method", CHOICES["method"])
def test_a_method_selects_its_parts(method):
    run_config = build(compose([f"method={method}"]))
    for group, stem in preset(method).items():
        _check(getattr(run_config, group), f"{group}/{stem}")


@pytest.mark.parametrize("part", [f"{g}={stem}" for g in PRESET for stem in CHOICES[g]])
def test_a_part_on_the_command_line_replaces_only_that_part_of_the_method(part):
    group, stem = part.split("=")
    run_config = build(compose([part, "method=lora"]))
    assert run_config.method == "lora"
    for name, choice in (preset("lora") | {group: stem}).items():
        _check(getattr(run_config, name), f"{name}/{choice}")


def _check(built: object, name: str, preset: Mapping[str, object] = MappingProxyType({})) -> None:
    """Assert that `built` has the class and the values of the YAML file and of the method."""
    written = spelled(name) | preset
    assert type(built) is class_of(name)
    assert dataclasses.asdict(built) == written


def test_a_cell_equals_its_overrides_on_the_command_line(tmp_path, monkeypatch):
    """The overrides apply after the settings of the experiment."""
    words = "method=emloc_covariance compression=r25 emulator.multiple=8 compression.bits=4"
    text = f"# @package _global_\nname: mine\ntrain: {{steps: 7}}\ncells: {{one: {words}}}\n"
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(text)
    monkeypatch.setattr(sys.modules[compose.__module__], "EXPERIMENTS", tmp_path / "experiments")
    chosen = compose(["experiments=mine", "cell=mine/one"])
    expected = compose([*words.split(), "name=mine", "train.steps=7"])
    assert chosen == expected
    other = compose(["experiments=mine", "cell=mine/one", "compression=r50"])
    assert other.compression.ratio == 0.5


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("method/")])
def test_a_yaml_sets_every_field_of_its_class(name):
    written = set(spelled(name))
    assert written == {field.name for field in dataclasses.fields(class_of(name))}


@pytest.mark.parametrize("name", [name for name in FILES if name.split("/")[0] in PARTS])
def test_a_part_is_defined_in_the_module_named_like_its_yaml(name):
    group, stem = name.split("/")
    package, _, module = class_of(name).__module__.rpartition(".")
    assert package == PACKAGES[group]
    family = {"precision/int2": "uniform", "precision/int3": "uniform"}  # one format, two widths
    assert module == family.get(name, module)
    assert name in family or stem == module or stem.startswith(f"{module}_")


@pytest.mark.parametrize(
    "name", [n for n in FILES if n.startswith(("model/", "task/", "precision/"))]
)
def test_the_setting_name_equals_the_name_of_the_yaml(name):
    assert yaml_of(name).name == name.split("/")[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((f"lora/{s}", lambda n: f"r{n.rank}") for s in CHOICES["lora"]),
        *(
            (
                f"compression/{s}",
                lambda n: (
                    f"r{n.ratio * 100:.0f}"
                    + "_nf4" * (n.bits == 4)
                    + "_of_model" * (n.of == "model")
                ),
            )
            for s in CHOICES["compression"]
            if s != "auto"
        ),
        *(
            (f"calibration/{s}", lambda n: f"{n.source}_{n.samples}")
            for s in CHOICES["calibration"]
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_name_of_a_choice_states_its_value(name, words):
    assert name.split("/")[1] == words(yaml_of(name))


def test_alpha_equals_the_rank_in_every_lora_yaml():
    assert all(yaml_of(f"lora/{s}").alpha == yaml_of(f"lora/{s}").rank for s in CHOICES["lora"])


@pytest.mark.parametrize("stem", CHOICES["method"])
def test_a_method_yaml_sets_only_its_parts_and_its_name(stem):
    node = yaml_of(f"method/{stem}")
    assert (CONF / f"method/{stem}.yaml").read_text().startswith("# @package _global_\n")
    assert set(node) - {*CHANGED} == {"defaults", "method"}
    assert node.get("compression", {"bits": 4}) == {"bits": 4}
    assert node.get("train", {"checkpointing": True}) == {"checkpointing": True}
    assert node.method == stem
    assert {*PRESET} <= set(preset(stem)) <= {*PRESET, "calibration", "anchor"}


def test_built_parts_are_frozen():
    cell = build(_default())
    for section, key in (("lora", "rank"), ("recovery", "clamp"), ("model", "dtype")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(getattr(cell, section), key, 1)


# Keys that no class has ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+recovery.typo=1"], "recovery.typo: Key 'typo' not in 'Correction'"),
        (["+model.typo=1"], "model.typo: Key 'typo' not in 'TextModel'"),
        (["+lora.typo=1"], "lora.typo: Key 'typo' not in 'LoraSettings'"),
        (["+typo=1"], "typo: there is no such setting"),
        (["++train.typo=1"], "train.typo: Key 'typo' not in 'TrainSettings'"),
        (["recovery=none", "+recovery.clamp=1"], "recovery.clamp: Key 'clamp' not in 'NoRecovery'"),
        (["emulator=full", "+emulator.multiple=8"], "emulator.multiple: Key 'multiple' not in"),
        (
            ["emulator=full", "emulator._target_=emloc.emulators.svd.Svd"],
            "emulator.algorithm: Structured config of type `Svd` has missing mandatory value: "
            "algorithm",
        ),
        (["model.id=???"], "model.id: Missing mandatory value: model.id"),
        (["recovery.clamp=soft"], "recovery.clamp: Value 'soft' of type 'str' could not be"),
        (["model.dtype=[1]"], "model.dtype: Cannot convert 'ListConfig' to string: '[1]'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_build_refuses_unknown_keys_and_wrong_types(overrides, message):
    assert refusal(compose(overrides)).startswith(message)


def test_a_target_that_is_no_class_is_refused():
    message = refusal(changed("emulator._target_=emloc.emulators.sdv.Svd"))
    assert message == (
        "emulator._target_=emloc.emulators.sdv.Svd: No module named 'emloc.emulators.sdv'"
    )
    message = refusal(changed("emulator._target_=emloc.emulators.svd.Sdv"))
    assert message.startswith("emulator._target_=emloc.emulators.svd.Sdv: No module named ")


@pytest.mark.parametrize(("removed", "named"), [("~lora", "lora.rank"), ("~tracker", "tracker")])
def test_a_removed_section_is_refused_by_name(removed, named):
    assert refusal(compose([removed])).startswith(f"{named}: ")


def test_an_experiment_cannot_set_a_setting_that_the_chosen_part_lacks():
    node = OmegaConf.create({"recovery": {"clamp": 1.0}})
    ConfigStore.instance().store(group="experiments", name="clamped", node=node, package="_global_")
    assert build(compose(["experiments=clamped"])).recovery.clamp == 1.0
    message = refusal(compose(["experiments=clamped", "method=lora"]))
    assert message == "recovery.clamp: Key 'clamp' not in 'NoRecovery'"


# Values that cannot be right ----------------------------------------------------------------------

WRONG = [
    "calibration.source=foo",
    "calibration.samples=0",
    "compression.ratio=0",
    "compression.ratio=1",
    "compression.ratio=-1",
    "compression.ratio=2",
    "compression.of=foo",
    "lora.rank=0",
    "lora.alpha=0",
    "lora.alpha=-8",
    "lora.dropout=1",
    "lora.dropout=-0.1",
    "emulator.algorithm=foo",
    "emulator.multiple=0",
    "recovery.metric=foo",
    "recovery.clamp=-1",
    "recovery.strength=2",
    "recovery.strength=-0.5",
    "train.steps=0",
    "train.batch=0",
    "train.accumulate=0",
    "train.log_every=0",
    "train.save_every=0",
    "train.learning_rate=0",
    "train.warmup=1",
    "train.warmup=-0.1",
    "train.schedule=foo",
    "eval.limit=0",
    "eval.batch=0",
    "model.dtype=foo",
    "model.weights=foo",
    "model.max_length=1",
    "task.eval_rows=0",
    "task.limit=0",
    "tracker.mode=foo",
]


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_refused_with_a_valid_override(override):
    key, value = override.split("=")
    message = refusal(changed(override))
    assert key in message
    assert value in message
    # The override that the message suggests must work.
    cure = re.search(rf"set ({re.escape(key)}=[^\s,;]+)", message)
    assert cure is not None, message
    build(changed(override, cure[1]))


@pytest.mark.parametrize(
    "override",
    [
        "model.lora_targets='('",
        "model.emulator_targets='['",
        "model.excluded={'*': tied}",
        "task.prompt='{{text'",
        "task.target='{% if %}'",
    ],
)
def test_an_invalid_pattern_or_template_is_refused(override):
    assert refusal(changed(override)).startswith(override.partition("=")[0] + ": ")


def test_whitening_without_activations_is_refused():
    message = refusal(changed("emulator.algorithm=whiten", "emulator.aware=false"))
    assert "emulator.aware=false" in message
    assert "set emulator.algorithm=eigen" in message
    assert build(changed("emulator.algorithm=whiten")).emulator.statistics == "input"
    assert build(changed("emulator.aware=false")).emulator.statistics is None
    assert build(changed()).emulator.statistics == "smaller"


def test_every_schedule_exists_in_transformers():
    assert set(SCHEDULES) < {one.value for one in SchedulerType}


@pytest.mark.parametrize(
    "override",
    [
        "recovery.clamp=0",
        "recovery.clamp=null",
        "recovery.strength=0",
        "recovery.strength=1",
        "eval.limit=null",
        "eval.limit=1",
        "lora.dropout=0",
        "train.warmup=0",
        "compression.ratio=0.999",
        "calibration.samples=1",
        "emulator.multiple=64",
    ],
)
def test_limits_of_ranges_are_accepted(override):
    name, value = override.split("=")
    section, key = name.split(".")
    actual = getattr(getattr(build(changed(override)), section), key)
    assert actual == (None if value == "null" else float(value))


# What cannot be composed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "recovery=corection",
            "recovery=corection: there is no such choice; did you mean correction?",
        ),
        ("method=emlok", "method=emlok: there is no such choice; did you mean emloc?"),
        ("experiments=demmo", "experiments=demmo: there is no such choice; did you mean demo?"),
        ("modle=x", "modle: there is no such setting; did you mean model?"),
        ("compresion=r50", "compresion: there is no such setting; did you mean compression?"),
        ("foo=1", "foo: there is no such setting"),
        (
            "recovery.clmp=2",
            "recovery.clmp: there is no such setting; did you mean recovery.clamp?",
        ),
        ("clamp=2", "clamp: there is no such setting; did you mean recovery.clamp?"),
        ("train.step=9", "train.step: there is no such setting; did you mean train.steps?"),
        ("lora.rank=abc", "lora.rank: Value 'abc' of type 'str' could not be converted to Integer"),
        ("seed=abc", "seed: Value 'abc' of type 'str' could not be converted to Integer"),
        ("lora.rank=null", "lora.rank: field 'lora.rank' is not Optional"),
        (
            "train.steps=1.5",
            "train.steps: Value '1.5' of type 'float' could not be converted to Integer",
        ),
        ("eval.harness=perhaps", "eval.harness: Value 'perhaps' is not a valid bool (type str)"),
        ("~train.steps", "train.steps: TrainSettings (DictConfig) does not support deletion"),
        (
            "lora.rank",
            "lora.rank is no override, which is written setting=value without spaces around =",
        ),
    ],
)
def test_explain_describes_a_composition_error_in_one_line(override, message):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's are of several kinds
        compose([override])
    assert explain(caught.value) == message


@pytest.mark.parametrize("group", ["adapter", "emulator", "recovery"])
def test_an_unknown_choice_is_refused_with_the_list_of_choices(group):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's are of several kinds
        compose([f"{group}=xyz"])
    assert explain(caught.value) == (
        f"{group}=xyz: there is no such choice; there is {', '.join(CHOICES[group])}"
    )


def test_a_setting_of_another_choice_is_refused():
    with pytest.raises(Exception, match=r"recovery\.clamp") as caught:
        compose(["recovery=none", "recovery.clamp=1"])
    assert explain(caught.value).startswith("recovery.clamp: there is no such setting")


# The name of a run's folder -----------------------------------------------------------------------

ELSE = {
    "model": "model.max_length=1024",
    "task": "task.seed=1",
    "calibration": "calibration.seed=1",
    "compression": "compression=r25",
    "precision": "precision=nf4",
    "lora": "lora=r4",
    "emulator": "emulator.multiple=2",
    "adapter": "adapter=none",
    "recovery": "recovery.clamp=1",
    "anchor": "anchor=logits",
    "polish": "polish=exact_steps",
    "stage": "stage.recover.after=emulate",
    "train": "train.steps=61",
    "eval": "eval.limit=8",
    "seed": "seed=1",
}


def test_equal_settings_give_the_same_folder():
    name = folder_name(compose())
    assert re.fullmatch(r"emloc-smollm2_135m-stdlib_module-s0-[0-9a-f]{8}", name)
    assert folder_name(compose(["name=other", "tracker=none"])) == name
    ways = (["lora=r4", "seed=2"], ["seed=2", "lora.alpha=4", "lora.rank=4"])
    assert len({folder_name(compose(way)) for way in ways}) == 1


def test_what_a_run_may_use_of_the_machine_does_not_change_the_folder():
    budget = (
        "gpu_gib=3",
        "gpu_states_gib=3",
        "host_gib=3",
        "statistics_gib=3",
        "disk_gib=3",
        "jobs_per_gpu=3",
    )
    assert {one.partition("=")[0] for one in budget} == {*compose().budget}
    anchored = ["method=emloc_anchored"]
    names = {folder_name(compose([*anchored, f"budget.{one}"])) for one in budget}
    assert names == {folder_name(compose(anchored))}


def test_every_decisive_section_changes_the_folder():
    assert set(ELSE) == set(DECISIVE)
    names = [folder_name(compose())] + [folder_name(compose([one])) for one in ELSE.values()]
    ids = [name.rpartition("-")[2] for name in names]
    assert len(set(ids)) == len(ids)
    assert "-s1-" in names[-1]
