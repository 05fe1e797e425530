"""What `emloc --help` says, and where its words come from."""

import dataclasses
import re
import sys

import pytest
import yaml

from emloc.config.descriptions import field_comments
from emloc.config.paths import choices
from emloc.config.settings import SECTIONS, Config
from emloc.console.help import help_text
from emloc.console.verbs import VERBS

PARTS = ("model", "task", "precision", "emulator", "adapter", "recovery", "stage", "tracker")
FILES = [file for group in PARTS for file in choices(group).values()]


@pytest.fixture(scope="module")
def text():
    return help_text()


def named(file) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_setting_of_every_choice_is_explained(file):
    values = named(file)
    if "_target_" not in values:  # the file builds on another one
        assert "defaults" in values
        return
    comments = field_comments(values.pop("_target_"))
    assert {key for key in values if not comments.get(key)} <= {"defaults"}


@pytest.mark.parametrize("cls", [*SECTIONS.values(), Config])
def test_every_field_of_a_fixed_section_is_explained(cls):
    comments = field_comments(f"{cls.__module__}.{cls.__name__}")
    assert [*comments] == [field.name for field in dataclasses.fields(cls)]
    assert all(comments.values())


def test_it_names_verbs_groups_choices_and_values(text):
    for verb in VERBS:
        assert re.search(rf"^  {verb} +print|^  {verb} +m", text, re.M)
    assert re.search(r"^  tracker +where .*: none, wandb$", text, re.M)
    assert re.search(r"^  lora\.rank=8 +columns of A", text, re.M)
    assert " _internvl" not in text
    assert "hydra/launcher=joblib" in text
    assert text.count("...)") == 0
    assert max(map(len, text.splitlines())) <= 100


def test_overrides_change_what_is_shown():
    text = help_text(["emulator=layer_drop", "lora=r16"])
    assert "lora.rank=16 " in text
    assert "emulator.first=2 " in text
    assert "emulator.algorithm" not in text


def test_comments_are_read_from_bases_other_modules_and_lines_above(tmp_path, monkeypatch):
    (tmp_path / "plugin_base.py").write_text(
        "class Base:\n"
        "    # how often,\n"
        "    # in total\n"
        "    count: int = 1\n"
        "    kind: ClassVar[str] = 'x'  # of the class\n"
    )
    (tmp_path / "plugin_part.py").write_text(
        "from plugin_base import Base\n"
        "class Part(Base):\n"
        "    text: str = '# no comment'  # a word\n"
        "    silent: bool\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    expected = {"count": "how often, in total", "text": "a word", "silent": ""}
    assert field_comments("plugin_part.Part") == expected
    assert field_comments("plugin_part.Missing") == field_comments("nowhere.Part") == {}
    assert not {"plugin_part", "plugin_base"} & {*sys.modules}
