"""What anchored training refuses: in one line, before any stage begins."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import anchored
import families
import pytest
import torch
from pictured import VqaTask

from emloc.anchors.batches import AnchoredCollator, take_offsets
from emloc.anchors.blocks import Blocks
from emloc.anchors.logits import Logits
from emloc.anchors.places import Place
from emloc.anchors.shards import OffsetReader, write_rows
from emloc.config.compose import compose
from emloc.data.reader import TextReader
from emloc.errors import ConfigError
from emloc.pipeline import checked
from emloc.runtime.memory import GIB
from emloc.stages.run_config import build


@pytest.fixture
def refusal(tiny, store):
    """Function that returns the line that refuses a run; no stage has begun by then."""

    def message(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            checked(build(compose([*tiny, *overrides])), store, lambda *_: None)
        assert not [path for path in store.root.glob("*") if path.name != "check"]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ("3", "anchor.places=3: the model has only 2 blocks; set anchor.places=2 or less"),
        ("[0,2]", "block 2 is behind the last block of the model, which is 1; set anchor.places"),
        ("0", "anchor.places=0 is neither a number of blocks, at least 1, nor a list"),
        ("all", "anchor.places=all is no number; set anchor.places="),
    ],
)
def test_places_that_the_model_does_not_have(refusal, places, words):
    assert words in refusal("method=emloc_anchored", "anchor.rounds=1", f"anchor.places={places}")


@pytest.mark.parametrize("places", [-1, [-1], ["a"], 1.5, True, [True], {}])
def test_places_that_are_no_blocks(places):
    with pytest.raises(ConfigError, match=r"set anchor.places=[^\n]+$"):
        Blocks(places=places, rounds=1, dtype="float32", guard=0)


def test_the_usual_places_are_eight_or_all_blocks():
    """Offsets of the default are those of eight places, also by their key."""
    usual = Blocks(places=None, rounds=1, dtype="float32", guard=0)
    for depth, places in ((2, 2), (8, 8), (30, 8)):
        model = families.tiny_model("llama")
        blocks = [f"model.layers.{index}" for index in range(depth)]
        assert usual.find(model, blocks) == replace(usual, places=places).find(model, blocks)
    assert usual.key == replace(usual, places=8).key


def test_the_default_suits_a_model_with_few_blocks(tiny, store):
    """The tiny model has two."""
    config = build(compose([*tiny, "method=emloc_anchored", "anchor.rounds=1"]))
    _, context = checked(config, store, lambda *_: None)
    assert [place.module for place in context.anchored_rows.places] == [
        "model.layers.0",
        "model.layers.1",
    ]


ONE_ROUND = ("anchor.rounds=1", "anchor.places=2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("method=qlora_anchored", "compression.bits=16"), "the emulator is the original model"),
        (("method=emloc_anchored", "emulator.sequential=true"), "set emulator.sequential=false"),
        (("method=emloc_anchored", "budget.disk_gib=1e-6"), "and budget.disk_gib=1e-06; set"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_settings_that_do_not_fit(refusal, overrides, words):
    method, *others = overrides
    assert words in refusal(method, *ONE_ROUND, *others)


def test_a_fit_of_weights_that_are_split_over_processes(refusal, tiny, store, monkeypatch):
    """An emulator without factors is not fitted, so it is not refused."""
    for name, value in (("WORLD_SIZE", "2"), ("ACCELERATE_USE_FSDP", "true")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert "set anchor.refit=false" in refusal("method=emloc_anchored", *ONE_ROUND)
    for overrides in (
        ("method=emloc_anchored", "anchor.refit=false"),
        ("method=upop", "anchor=blocks", "anchor.refit=true"),
    ):
        config = build(compose([*tiny, *ONE_ROUND, *overrides]))
        checked(config, store, lambda *_: None)


def test_few_rows_show_that_a_round_fits(tiny, store, monkeypatch):
    """More are encoded if a round that is a few times larger would not fit."""
    rows, real = [], TextReader.encode

    def encode(self, example):
        rows.append(example.id)
        return real(self, example)

    def check(disk_gib: float) -> int:
        rows.clear()
        limit = f"budget.disk_gib={disk_gib}"
        checked(
            build(compose([*tiny, "method=emloc_anchored", *ONE_ROUND, limit])),
            store,
            lambda *_: None,
        )
        return len({*rows})

    monkeypatch.setattr(TextReader, "encode", encode)
    assert check(100) == 8
    with pytest.raises(ConfigError, match=r"take ([\d.e-]+) GiB") as caught:
        check(1e-6)
    size = float(re.search(r"take ([\d.e-]+) GiB", str(caught.value))[1])
    assert check(1.01 * size) == len({*rows}) == 40


def test_a_full_disk(refusal, monkeypatch):
    """The hidden states of a pass need space beside the offsets."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**14))
    message = refusal("method=emloc_anchored", *ONE_ROUND)
    assert "GiB free; set anchor.rounds higher, anchor.dtype=int8, or EMLOC_CACHE" in message


def test_a_disk_without_room_for_a_new_fit_of_the_emulator(refusal, monkeypatch):
    """Gradients of 4,096 tokens, in float32, at the outputs of all layers of two blocks."""
    gradients = 4096 * 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=gradients))
    message = refusal("method=emloc_anchored", "anchor.places=1", "anchor.rounds=2")
    assert "with a new fit of the emulator takes" in message
    assert "set anchor.refit=false, or EMLOC_CACHE to a folder on another disk" in message
    need = float(re.search(r"takes ([\d.e-]+) GiB", message)[1]) * GIB
    assert gradients < need < 1.2 * gradients


def test_an_adapter_in_front_of_the_decoder(store, internvl):
    """The hidden states there are put back onto the original's own."""
    config = build(
        compose(
            [
                *("model=internvl2_5_2b", f"model.source={internvl}", "model.dtype=float32"),
                *("method=emloc_anchored", *ONE_ROUND, "tracker=none", "calibration.samples=6"),
                r"model.lora_targets='.*(vision_tower|language_model).*\.[qv]_proj'",
            ]
        )
    )
    with pytest.raises(ConfigError) as caught:
        checked(replace(config, task=VqaTask()), store, lambda *_: None)
    message = str(caught.value)
    assert "vision_tower" in message.split()[1]
    assert "in front of the language decoder" in message
    assert "set model.lora_targets to layers of the decoder, or anchor=none" in message


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_head_behind_which_an_offset_is_none(family):
    """A cap of the logits bends the offset; a scale does not."""
    logits = Logits(rounds=1, dtype="float32", guard=0)
    model = families.tiny_model(family)
    if family == "cohere":
        assert [place.module for place in logits.find(model, [])] == ["lm_head"]
        return
    with pytest.raises(ConfigError, match=r"final_logit_softcapping=30.*; set anchor=blocks$"):
        logits.find(model, [])


def test_an_adapter_on_the_head(refusal):
    """An offset in front of the head would pass through the adapter; behind blocks it would not."""
    targets = r"model.lora_targets='.*(q_proj|lm_head)'"
    message = refusal("method=emloc_anchored", "anchor=logits", "anchor.rounds=1", targets)
    assert "lm_head" in message
    assert "set anchor=blocks" in message


def test_offsets_of_other_rows(tmp_path):
    """A row without offsets ends the training; it is not trained without them."""
    rows = anchored.rows(2)
    write_rows(tmp_path, [[rows[0].key]])
    places = [Place("model.layers.0")]
    collator = AnchoredCollator(
        anchored.collate_rows, OffsetReader([tmp_path]), places, pinned=False
    )
    with pytest.raises(ConfigError) as caught:
        take_offsets(collator(rows[1:]), torch.device("cpu"))
    collator.close()
    assert "a training row has no offsets" in str(caught.value)
    assert "\n" not in str(caught.value)
