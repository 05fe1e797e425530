"""How Hydra reads the YAML files: bases cannot be chosen, and no file is parsed twice."""

import os

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from emloc.config.compose import compose, register
from emloc.config.experiments import split_sweep
from emloc.config.explain import explain
from emloc.config.paths import CONF
from emloc.errors import ConfigError

BASES = sorted(path for path in CONF.glob("*/_*.yaml"))
GROUPS = sorted({path.parent.name for path in CONF.glob("*/*.yaml")})


@pytest.fixture
def loader():
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.mark.parametrize("group", GROUPS)
def test_choices_of_a_group_are_its_files_without_bases(loader, group):
    """`--help`, completion and messages all ask Hydra for this list."""
    stems = {path.stem for path in (CONF / group).glob("*.yaml")}
    offered = set(loader.get_group_options(group, ObjectType.CONFIG))
    assert offered == {stem for stem in stems if not stem.startswith("_")}


def test_nine_choices_use_the_base():
    assert [path.stem for path in BASES] == ["_internvl"]
    lists = [OmegaConf.load(path).get("defaults", []) for path in (CONF / "model").glob("*.yaml")]
    assert sum("_internvl" in lines for lines in lists) == 9


def test_a_sweep_over_all_choices_omits_the_base(loader):
    swept = {words[0] for words in split_sweep(["model=glob(*internvl*)"], loader)}
    assert swept == {
        *(f"model=internvl2_5_{size}b" for size in (2, 4, 8, 26, 38, 78)),
        *(f"model=tiny_internvl{size}" for size in ("", "_r25", "_r50")),
    }


def test_a_message_about_a_wrong_name_suggests_no_base():
    with pytest.raises(MissingConfigException) as caught:
        compose(["model=nothing_like_it"])
    message = explain(caught.value)
    assert message.startswith("model=nothing_like_it: there is no such choice; there is gemma3_4b,")
    assert "_internvl," not in message.replace("tiny_internvl,", "")


@pytest.mark.parametrize(
    "word", ["model=_internvl", "+model=_internvl", "model=gemma3_4b,_internvl"]
)
def test_choosing_a_base_is_refused(word):
    group = word.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        compose([word])
    assert str(caught.value) == (
        f"{group}=_internvl: there is no such choice; _internvl is a base that other choices share"
    )


def test_a_value_of_a_setting_may_begin_with_an_underscore():
    assert compose(["name=_mine"]).name == "_mine"


# Files that are parsed once -----------------------------------------------------------------------


def test_a_changed_file_is_read_again(tmp_path, monkeypatch):
    file = tmp_path / "conf" / "lora" / "mine.yaml"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("EMLOC_PLUGINS", str(tmp_path))
    for turn, rank in enumerate((3, 5)):
        file.write_text(f"{{rank: {rank}, alpha: 8, dropout: 0}}\n")
        os.utime(file, ns=(turn, turn))
        assert compose(["lora=mine"]).lora.rank == rank


def test_a_changed_configuration_changes_no_later_one():
    """A change of a parsed file or of a registered node would last."""
    words = ["experiments=ablate_algorithm", "cell=ablate_algorithm/lora"]
    before = OmegaConf.to_container(compose(words))
    changed = compose(words)
    for section in (changed, *(node for node in changed.values() if OmegaConf.is_dict(node))):
        OmegaConf.set_struct(section, False)
        section.intruder = 1
    changed.lora.rank += 1
    assert OmegaConf.to_container(compose(words)) == before
