"""The name of the method that has the parts of a run."""

import pytest

from emloc.config.paths import CONF
from emloc.config.presets import named_method, optional_parts, part_of

BLOCKS = {"anchor": "blocks"}
FOUR_BITS = {"compression.bits": "4"}


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("emloc_uncorrected", BLOCKS, "emloc_anchored"),
        ("emloc", BLOCKS | {"recovery": "none"}, "emloc_anchored"),
        ("emloc_uncorrected", BLOCKS | FOUR_BITS, "emloc_nf4_anchored"),
        ("qlora", BLOCKS | FOUR_BITS, "qlora_anchored"),
        ("lora", BLOCKS | FOUR_BITS, "qlora_anchored"),
        ("emloc_anchored", {"anchor": "none"}, "emloc_uncorrected"),
        ("qlora_anchored", {"anchor": "none"} | FOUR_BITS, "qlora"),
    ],
)
def test_a_run_with_the_parts_of_another_method_has_its_name(method, settings, name):
    assert named_method(method, settings) == name


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("upop", BLOCKS, "upop anchor=blocks"),
        ("lora", {"polish": "exact_steps"}, "lora polish=exact_steps"),
        ("emloc_uncorrected", BLOCKS | {"polish": "mine"}, "emloc_anchored polish=mine"),
        ("emloc_uncorrected", {"anchor": "logits"}, "emloc_uncorrected anchor=logits"),
        ("emloc_anchored", {"anchor": "logits"}, "emloc_uncorrected anchor=logits"),
        ("emloc_uncorrected", {"anchor": "mine"}, "emloc_uncorrected anchor=mine"),
        # Calibration on text is what makes it svd_llm.
        ("svd_llm", BLOCKS | {"calibration": "generic_256"}, "svd_llm anchor=blocks"),
        ("of_a_plug_in", BLOCKS, "of_a_plug_in anchor=blocks"),
        ("emloc_anchored", {"anchor": "none", "emulator": "sketch"}, "emloc_anchored anchor=none"),
    ],
)
def test_anchors_that_no_method_has_stand_behind_the_name(method, settings, name):
    assert named_method(method, settings) == name


@pytest.mark.parametrize("method", [path.stem for path in CONF.glob("method/*.yaml")])
def test_a_run_that_leaves_the_anchors_of_its_method_alone_keeps_the_name(method):
    assert named_method(method, {}) == method
    own = {"anchor": part_of(method, {}, "anchor")}
    # The column of the other part shows such a difference, as before there were anchors.
    assert named_method(method, own | {"recovery": "scatter"} | FOUR_BITS) == method


def test_a_method_may_leave_anchor_and_polish_alone():
    assert optional_parts() == {"anchor": "none", "polish": "none"}
    assert part_of("emloc", {}, "anchor") == part_of("unknown", {}, "anchor") == "none"
    assert part_of("emloc_anchored", {}, "anchor") == "blocks"


def test_methods_of_a_plug_in_are_found_by_their_parts(tmp_path, monkeypatch):
    methods = tmp_path / "conf" / "method"
    methods.mkdir(parents=True)
    parts = {"emulator": "prune", "adapter": "lora", "recovery": "scatter", "anchor": "blocks"}
    lines = [f"  - override /{group}: {choice}\n" for group, choice in parts.items()]
    text = f"# @package _global_\ndefaults:\n{''.join(lines)}method: pruned_anchored\n"
    (methods / "pruned_anchored.yaml").write_text(text)
    monkeypatch.setenv("EMLOC_PLUGINS", str(tmp_path))
    assert named_method("upop", BLOCKS) == "pruned_anchored"
