"""Words of a command line that cannot be right are answered with the words that are."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.config.check import check_settings
from emloc.config.compose import compose
from emloc.config.explain import explain
from emloc.config.foreign_names import DIFFERENCES, FOREIGN_NAMES, own_name
from emloc.config.paths import choices
from emloc.config.quoting import quoted_override
from emloc.console.wrong_words import no_verb, unknown_flag
from emloc.errors import ConfigError


def explanation(*words: str) -> str:
    """The line about overrides that cannot be composed."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's are of several kinds
        compose(words)
    line = explain(caught.value, words)
    assert "\n" not in line
    return line


def value_of(shell_word: str) -> tuple[str, object]:
    """Key and value of an override as the shell and then Hydra read it."""
    (word,) = shlex.split(shell_word)
    override = OverridesParser.create().parse_override(word)
    return override.key_or_group, override.value()


# Overrides that Hydra cannot parse ----------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "task.prompt=What is {{text}}?",
        "task.prompt=(a)",
        "name=a=b",
        "name=it's",
        "model.id=[x",
        'name=say "x"',
        "task.path=$x (1), b",
    ],
)
def test_a_value_that_cannot_be_read_is_shown_in_quotes_that_work(override):
    line = explanation(override)
    start, _, quoted = line.partition("; quote a value with special characters twice, as in ")
    assert start == f"{override} cannot be read"
    key, _, value = override.partition("=")
    assert value_of(quoted) == (key, value)
    section, _, name = key.partition(".")
    composed = compose(["task=gsm8k", *shlex.split(quoted)])
    assert (composed[section][name] if name else composed[section]) == value


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=30))
@settings(max_examples=60, database=None)
def test_a_quoted_value_is_read_as_it_is(value):
    """`${` begins a reference to another setting, in quotes too, and is left to Hydra."""
    quoted = quoted_override(f"task.prompt={value}")
    if quoted is None:
        assert "${" in value
        return
    if "${" not in value:
        assert value_of(quoted) == ("task.prompt", value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["task=gsm8k", "task.path=/my", "data/x"],
            "data/x is no override, which is written setting=value without spaces around =; a "
            "value with spaces is quoted, as in 'task.path=\"/my data/x\"'",
        ),
        (
            ["method=lora", "report"],
            "report is no override, which is written setting=value without spaces around =",
        ),
        (
            ["lora.rank=8,"],
            "lora.rank=8, cannot be read, since it ends with a comma; leave the comma out",
        ),
        (
            ["train steps=8"],
            "train steps=8 cannot be read; write setting=value without spaces around =",
        ),
    ],
)
def test_a_word_that_is_no_override(words, line):
    assert explanation(*words) == line


def test_several_values_without_a_sweep_name_its_flag():
    assert explanation("method=lora,emloc", "seed=1") == (
        "method=lora,emloc names several values; add -m to run each of them: "
        "emloc -m method=lora,emloc seed=1"
    )
    assert explanation("lora.rank=range(1,4)").startswith("lora.rank=range(1,4) names several ")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's are of several kinds
        compose(["method=lora,emloc"])
    line = explain(caught.value, ["plan", "method=lora,emloc"])
    assert line == "method=lora,emloc names several values; plan takes one"
    line = explanation("task=gsm8k", "task.metric=exact_match,flexible-extract")
    assert "emloc -m task.metric=exact_match,flexible-extract task=gsm8k" in line
    quoted = line.rpartition("quote one value with commas: ")[2]
    assert value_of(quoted) == ("task.metric", "exact_match,flexible-extract")


# Choices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "mended"),
    [
        (
            "model=Qwen/Qwen2.5-7B",
            ["model=qwen2_5_7b", "model.id=Qwen/Qwen2.5-7B", "model.source=hub"],
        ),
        ("model=org/name", ["model=llama3_8b", "model.id=org/name", "model.source=hub"]),
        ("model=/my/model", ["model=llama3_8b", "model.source=/my/model"]),
        ("model=./gemma-3-4b", ["model=gemma3_4b", "model.source=./gemma-3-4b"]),
        ("task=openai/gsm8k", ["task=gsm8k", "task.id=openai/gsm8k"]),
        ("task=/my/rows", ["task=gsm8k", "task.path=/my/rows"]),
    ],
)
def test_a_hub_name_or_folder_in_place_of_a_choice(word, mended):
    line = explanation(word)
    assert line.startswith(f"{word}: there is no such choice; take a choice ")
    assert line.endswith(f", as in {' '.join(mended)}")
    composed = compose(mended)
    check_settings(composed)
    for override in mended[1:]:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        assert composed[section][name] == value


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("lora=8", "lora=8: lora takes one of r16, r4, r64, r8; did you mean lora=r8?"),
        ("tracker=null", "tracker=null: tracker takes one of none, wandb"),
        ("task=GSM8K", "task=GSM8K: there is no such choice; did you mean gsm8k?"),
        (
            "experiments=qqq",
            "experiments=qqq: there is no such choice; emloc --help lists all choices",
        ),
        ("~foo", "~foo: there is no such setting"),
        (
            "+train.steps=3",
            "+train.steps: there is such a setting; leave out the +, as in train.steps=...",
        ),
    ],
)
def test_a_choice_or_a_change_that_does_not_exist(word, line):
    assert explanation(word) == line


# Settings -----------------------------------------------------------------------------------------


def test_each_common_name_stands_for_a_setting_that_exists():
    composed = compose(["tracker=wandb"])
    for own in FOREIGN_NAMES.values():
        node = composed
        for word in own.split("."):
            assert word in node, own
            node = node[word]
    assert {*DIFFERENCES} <= {*FOREIGN_NAMES}


@pytest.mark.parametrize("word", [*FOREIGN_NAMES])
@pytest.mark.parametrize("section", ["", "train.", "lora.", "training_args."])
def test_a_common_name_leads_to_the_setting_and_never_to_itself(word, section):
    key = f"{section}{word}"
    assert own_name(key) == (None if FOREIGN_NAMES[word] == key else FOREIGN_NAMES[word])


@pytest.mark.parametrize(
    ("override", "own"),
    [
        ("train.lr=1", "train.learning_rate"),
        ("lr=1", "train.learning_rate"),
        ("train.batch_size=4", "train.batch"),
        ("lora.r=8", "lora.rank"),
        ("lora_alpha=8", "lora.alpha"),
        ("max_seq_length=512", "model.max_length"),
        ("output_dir=x", "name"),
        ("train.seed=1", "seed"),
    ],
)
def test_a_common_name_is_answered_with_our_name(override, own):
    key = override.partition("=")[0]
    line = explanation(override)
    assert line.startswith(f"{key}: there is no such setting; did you mean {own}?")


def test_epochs_are_explained_in_steps():
    assert explanation("train.epochs=3") == (
        "train.epochs: there is no such setting; did you mean train.steps? (train.steps counts "
        "optimizer steps; rows / (train.batch x train.accumulate) of them are one epoch)"
    )


@pytest.mark.parametrize(
    ("words", "owners"),
    [
        (["emulator=full", "emulator.multiple=8"], "emulator=svd"),
        (["recovery=none", "recovery.clamp=1"], "recovery=correction"),
        (["task.path=/x"], "task="),
        (["tracker=none", "tracker.project=x"], "tracker=wandb"),
    ],
)
def test_a_setting_of_another_choice_names_that_choice_and_not_itself(words, owners):
    key = words[-1].partition("=")[0]
    line = explanation(*words)
    assert line.startswith(f"{key}: there is no such setting; {owners}")
    assert line.endswith(" has it" if "," not in line else " have it")
    group, _, names = line.partition("; ")[2].partition("=")
    names = names.removesuffix(" has it").removesuffix(" have it")
    name = names.removesuffix(" and others").split(", ")[0]
    assert name in choices(group)
    compose([f"{group}={name}", words[-1]])


# First words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["train", "run", "fit", "eval"])
def test_a_run_needs_no_verb(word):
    line = no_verb([word, "method=lora"])
    assert line.startswith(
        f"there is no verb {word}; a run, which trains and scores, needs none, as in emloc "
        "method=lora; the verbs are help, "
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["train.learning_rate", "=", "1"],
            "write settings without spaces around =, as in train.learning_rate=1",
        ),
        (["train.lr"], "train.lr lacks a value; write train.lr=VALUE"),
        (["halp"], "there is no verb halp; did you mean help?"),
    ],
)
def test_a_first_word_that_is_no_verb(words, line):
    assert no_verb(words) == line


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--lr=1", "there is no flag --lr; settings have no dashes, as in train.learning_rate=1; "),
        ("-lora.rank=8", "there is no flag -lora.rank; settings have no dashes, as in lora.rank=8"),
        ("--per-device-train-batch-size", "there is no flag --per-device-train-batch-size; "),
    ],
)
def test_an_unknown_flag_is_answered_with_the_setting(word, line):
    assert unknown_flag(["method=lora", word]).startswith(line)


@pytest.mark.parametrize(
    "word", ["-m", "--multirun", "--cfg", "-cn", "--resolve", "--help", "x=-1"]
)
def test_flags_of_hydra_are_known(word):
    assert unknown_flag([word]) is None


def test_a_wrong_value_is_no_error_of_composition():
    with pytest.raises(ConfigError, match=r"^lora\.rank must be at least 1, got 0"):
        check_settings(compose(["lora.rank=0"]))
