"""Every `emloc` command in a README, CONTRIBUTING or CHANGELOG is one that the command accepts."""

import argparse
import sys

import pytest
from composed import compose_cached
from documents import (
    DOCUMENTS,
    ROOT,
    choices_in,
    commands,
    name_of,
    overrides,
    table_below,
    write_plugin,
)
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from emloc import cli
from emloc.config.experiments import split_sweep
from emloc.cost.bench.run import BENCHMARKS
from emloc.cost.plan.gpus import find_gpu
from emloc.stages.run_config import build

EVERY = sorted({tuple(words) for document in DOCUMENTS for words in commands(document)})
VERBS = [words for words in EVERY if words[0] in cli.VERBS]
ANSWERED = {*cli.HELP, *cli.VERSION}  # words that need no configuration
RUNS = [words for words in EVERY if words[0] not in cli.VERBS and not ANSWERED & {*words}]


class ParsedError(BaseException):
    """Ends a command behind the parsing of its arguments."""


@pytest.fixture
def plugin(made_once, monkeypatch):
    monkeypatch.setenv("EMLOC_PLUGINS", str(made_once("my_plugin", write_plugin)))


@pytest.fixture
def parse(monkeypatch):
    """What a verb makes of its arguments."""

    def arguments_of(words):
        seen = []

        def stop(parser, arguments):
            seen.append(original(parser, arguments))
            raise ParsedError

        original = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.setattr(sys, "argv", ["emloc", *words])
        with pytest.raises(ParsedError):
            cli.main()
        return seen[0]

    return arguments_of


def composes(words):
    try:
        compose_cached(words)
    except (HydraException, OmegaConfBaseException):
        return False
    return True


def test_commands_of_each_kind_are_seen():
    assert {words[0] for words in VERBS} == set(cli.VERBS)
    assert ("task=gsm8k", "compression=r25", "lora=r16") in RUNS
    assert any("-m" in words for words in RUNS)
    assert any("seed=0,1,2" in words and "eval.harness=false" in words for words in RUNS)  # $T


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_a_verb_takes_its_arguments(words, parse, plugin):
    chosen = parse(words)
    if words[0] == "plan":
        find_gpu(chosen.gpu)
        for point in split_sweep(chosen.overrides):
            build(compose_cached(point))
    if words[0] == "bench":
        assert set(chosen.works) <= set(BENCHMARKS)


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_run_or_a_sweep_composes(words, plugin):
    """Of a sweep the first and the last job: each swept value of two is in one of them."""
    parsed = get_args_parser().parse_args(list(words))
    if parsed.shell_completion:
        assert parsed.overrides == ["install=bash"]
        return
    points = split_sweep(parsed.overrides)
    for point in points[:1] + points[1:][-1:]:
        build(compose_cached(point))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_settings_in_the_text_exist(document, plugin):
    for words in overrides(document):
        for point in split_sweep(words):
            assert composes(point) or composes(["task=docvqa", *point]), words


def test_the_small_twin_of_every_experiment_composes():
    document = ROOT / "experiments" / "README.md"
    rows = table_below(document, "## The paper's tables and ablations")
    twins = [(name, row[-1]) for row in rows for name in sorted(choices_in(row[0]))]
    assert len(twins) > 10
    for name, cell in twins:
        words = [word for words in choices_in(cell) if "=" in words for word in words.split()]
        build(compose_cached([f"experiments={name}", *words]))
