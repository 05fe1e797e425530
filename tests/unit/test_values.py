"""Every setting declares its values: nan, infinities, signs and empty texts are refused by name."""

import dataclasses
import math
import typing
from functools import cache
from types import NoneType

import pytest
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf

from emloc.config.check import check_settings, check_values, errors_of, fill
from emloc.config.compose import compose
from emloc.config.declared import declared_class
from emloc.config.paths import CONF
from emloc.config.settings import MODEL_BITS, SECTIONS, Config, TrainSettings
from emloc.config.values import (
    LARGEST_COUNT,
    SEED,
    OneOf,
    Pattern,
    Range,
    Text,
    field_rules,
    refuse_wrong_value,
)
from emloc.emulators.prune import SPREADS
from emloc.errors import ConfigError
from emloc.models.family import DTYPES

# Class of a part -> (its group, values of all of its fields, from the first YAML file that names
# it).
PARTS: dict[str, tuple[str, dict[str, object]]] = {}
for _file in sorted(CONF.glob("[!h]*/[!_]*.yaml")) + sorted(CONF.glob("model/_*.yaml")):
    _values = yaml.safe_load(_file.read_text(encoding="utf-8")) or {}
    if "_target_" in _values:
        _values |= {key: "x" for key, value in _values.items() if value == "???"}
        _target = _values.pop("_target_")
        PARTS.setdefault(_target, (_file.parent.name, _values))
TARGETS = list(PARTS)
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 0.5, 2**32, 2**63, -0.5)


@cache
def section(name: str) -> dict[str, object]:
    """Values of all fields of a fixed section."""
    return OmegaConf.to_container(OmegaConf.masked_copy(compose(), [name]))[name]


def settings_classes() -> dict[str, tuple[type, str, dict[str, object]]]:
    """Name -> class of settings, its section and right values of all of its fields."""
    fixed = {name: (cls, name, section(name)) for name, cls in SECTIONS.items()}
    parts = {
        target: (get_class(target), group, values) for target, (group, values) in PARTS.items()
    }
    return fixed | parts


CLASSES = [*SECTIONS, *TARGETS]


def plain_types(cls: type) -> dict[str, set[type]]:
    """Field -> the types of its values, without None; of other fields than plain ones: none."""
    types = {}
    for name, hint in typing.get_type_hints(cls).items():
        alternatives = (
            {hint, *typing.get_args(hint)} if NoneType in typing.get_args(hint) else {hint}
        )
        types[name] = alternatives & {int, float, str}
    return {field.name: types[field.name] for field in dataclasses.fields(cls)}


def refusal(cls: type, group: str, values: dict[str, object]) -> str | None:
    """The line that refuses the values; None if they are accepted."""
    try:
        with errors_of(group):
            fill(cls, values, group)
    except ConfigError as error:
        return str(error)
    return None


def test_all_groups_are_covered():
    groups = {group for group, _ in PARTS.values()} | set(SECTIONS)
    assert groups == {field.name for field in dataclasses.fields(Config)} - {
        *("name", "method", "seed")
    }
    assert len(CLASSES) > 25


@pytest.mark.parametrize("name", CLASSES)
def test_every_number_declares_its_range(name):
    cls, *_ = settings_classes()[name]
    numeric = [field for field, types in plain_types(cls).items() if types & {int, float}]
    rules = field_rules(cls)
    assert [field for field in numeric if not isinstance(rules[field][0], Range | OneOf)] == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_number_is_refused_by_name_or_within_its_declared_range(name):
    cls, group, values = settings_classes()[name]
    stand_in = declared_class(name) if "." in name else cls
    for field, types in plain_types(cls).items():
        if not types & {int, float}:
            continue
        rule = field_rules(cls)[field][0]
        for number in NUMBERS:
            line = refusal(stand_in, group, values | {field: number})
            if line is None:
                assert math.isfinite(number), (field, number)
                assert float in types or number == int(number), (field, number)
                low = max(x for x in (rule.least, rule.above, -math.inf) if x is not None)
                high = min(x for x in (rule.most, rule.below, math.inf) if x is not None)
                assert low <= number <= high, (field, number)
                assert low > -math.inf, field
                assert number not in (rule.above, rule.below)
                assert int not in types or number < 2**32, (field, number)
            else:
                assert line.startswith(f"{group}.{field}"), (field, number, line)
                assert "\n" not in line
                assert "set " in line or "could not be converted" in line


@pytest.mark.parametrize("name", CLASSES)
def test_an_empty_text_is_refused_by_name(name):
    cls, group, values = settings_classes()[name]
    texts = [field for field, types in plain_types(cls).items() if str in types]
    accepted = {
        field
        for field in texts
        for empty in ("", "  ")
        if refusal(cls, group, values | {field: empty}) is None
    }
    # An empty system message is another prompt than none, and plain text has no prompt.
    tasks = {cls: {"prompt"} for cls in ("TextTask", "MathQA", "VqaTask")}
    may_be_empty = {"InternVL": {"system"}, **tasks}
    assert accepted == may_be_empty.get(cls.__name__, set())


@pytest.mark.parametrize("name", CLASSES)
def test_a_refusal_suggests_a_value_that_is_accepted(name):
    cls, *_ = settings_classes()[name]
    for field, (rule, _) in field_rules(cls).items():
        if isinstance(rule, Range):
            refuse_wrong_value(cls, field, rule.usual, field)
            usual = "null" if rule.usual is None else f"{rule.usual:g}"
            with pytest.raises(ConfigError, match=f"set {field}={usual}"):
                refuse_wrong_value(cls, field, math.nan, field)
        if isinstance(rule, OneOf):
            with pytest.raises(ConfigError, match=f"set {field}={rule.options[0]}"):
                refuse_wrong_value(cls, field, "?", field)


@pytest.mark.parametrize("target", TARGETS)
def test_a_stand_in_has_the_fields_rules_and_traits_of_its_class(target):
    cls, stand_in = get_class(target), declared_class(target)
    assert stand_in is not None
    assert stand_in.__module__ == cls.__module__
    assert field_rules(stand_in) == field_rules(cls)
    assert plain_types(stand_in) == plain_types(cls)
    for ours, theirs in zip(dataclasses.fields(stand_in), dataclasses.fields(cls), strict=True):
        assert (ours.name, ours.default) == (theirs.name, theirs.default)
    for trait in ("keeps_weights", "same_shapes", "recomputes", "trains", "nonlinear"):
        assert getattr(stand_in, trait, None) == getattr(cls, trait, None)
    for trait in ("needs_weight", "reads_pairs", "scatters", "conflicts"):
        assert getattr(stand_in, trait, None) == getattr(cls, trait, None)


def test_a_trait_that_is_computed_is_not_guessed(tmp_path, monkeypatch):
    text = (
        "from dataclasses import dataclass\nfrom emloc.adapters.lora import Lora\nimport nowhere\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(Lora):\n"
        "    size: nowhere.Size\n    other: int = nowhere.SIZE\n    third: 'Size' | None = None\n"
        "    @property\n    def nonlinear(self): return None\n"
    )
    (tmp_path / "own_adapter.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own = declared_class("own_adapter.Own")
    assert not hasattr(own, "nonlinear")
    assert own.needs_weight is None
    assert own(size="anything").size == "anything"
    cfg = compose(["method=lora", "adapter._target_=own_adapter.Own", "+adapter.size=1"])
    check_settings(cfg)
    assert declared_class("own_adapter.Missing") is None


def test_names_of_options_are_those_of_the_code():
    def options(target: str, field: str) -> set[str]:
        return set(field_rules(get_class(target))[field][0].options)

    assert options("emloc.models.text.TextModel", "dtype") == set(DTYPES)
    assert options("emloc.emulators.prune.Prune", "spread") == set(SPREADS)
    bits = field_rules(SECTIONS["compression"])["bits"][0]
    assert bits.most == MODEL_BITS


@pytest.mark.parametrize(
    ("rule", "value", "line"),
    [
        (Range(least=1, usual=8), 0, "k must be at least 1, got 0; set k=8"),
        (Range(above=0, usual=2), math.inf, "k must be above 0 and finite, got inf; set k=2"),
        (Range(above=0, below=1, usual=0.5), 1.5, "k must lie between 0 and 1, got 1.5; set k=0.5"),
        (Range(least=0, below=1, usual=0), 1.0, "k must be in [0, 1), got 1; set k=0"),
        (Range(least=0, most=1, usual=1), -0.5, "k must be in [0, 1], got -0.5; set k=1"),
        (SEED, 2**32, "k must be in [0, 4294967296), got 4294967296; set k=0"),
        (
            Range(least=1, usual=8),
            2**31,
            "k must be at least 1 and at most 2147483647, got 2147483648; set k=8",
        ),
        (Range(), math.nan, "k must be finite, got nan; set k=1"),
        (Range(), 2**63, f"k must be at most 2147483647, got {2**63}; set k=1"),
        (Range(least=1, usual=None), 0, "k must be at least 1, got 0; set k=null"),
        (Range(least=1, word="auto"), 0, "k must be at least 1 or auto, got 0; set k=1"),
        (Range(least=1, word="auto"), "many", "k=many is no number and not auto; set k=1"),
        (OneOf("cosine", "linear"), "Linear", "k=Linear is none of cosine, linear; set k=linear"),
        (OneOf("cosine", "linear"), "x", "k=x is none of cosine, linear; set k=cosine"),
        (Text(), " ", "k is empty; give it a text, as in k=..."),
        (Pattern(), "(", "k: ( is no valid regular expression: missing ), unterminated "),
    ],
)
def test_the_line_of_a_refusal(rule, value, line):
    assert rule.fault("k", value, or_null=False).startswith(line)


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (Range(least=1), 1),
        (Range(least=1), LARGEST_COUNT),
        (Range(above=0), 1e-30),
        (Range(least=1, word="auto"), "auto"),
        (SEED, 2**32 - 1),
        (SEED, 0),
        (Text(may_be_empty=True), ""),
        (Pattern(), r"model\.layers\..*"),
    ],
)
def test_a_right_value_has_no_fault(rule, value):
    assert rule.fault("k", value, or_null=False) is None


def test_an_empty_list_and_a_wrong_item_are_refused():
    @dataclasses.dataclass
    class Listed:
        classes: list[str]

    refuse_wrong_value(Listed, "classes", ["a", "b"], "model.classes")
    with pytest.raises(ConfigError, match=r"model\.classes is an empty list; set model\.classes="):
        refuse_wrong_value(Listed, "classes", [], "model.classes")
    with pytest.raises(ConfigError, match=r"model\.classes is empty"):
        refuse_wrong_value(Listed, "classes", ["a", ""], "model.classes")


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_the_seed_of_a_run_is_checked(seed):
    with pytest.raises(ConfigError, match=rf"^seed must be in \[0, 4294967296\), got {seed}; set "):
        check_values(compose([f"seed={seed}"]))


def test_settings_check_themselves_when_they_are_made():
    """Also those that no configuration describes, such as the arguments of the library."""
    right = section("train")
    assert TrainSettings(**right).clip == 1.0
    with pytest.raises(ConfigError, match=r"train\.clip must be at least 0 and finite, got inf"):
        TrainSettings(**right | {"clip": math.inf})
    with pytest.raises(ConfigError, match=r"recovery\.clamp must be at least 0 and finite or null"):
        get_class("emloc.recovery.correction.Correction")(
            metric="identity", clamp=math.inf, strength=1.0
        )
