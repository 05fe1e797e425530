"""Combinations of emulator, adapter and recovery are accepted or refused with a remedy."""

import re
from dataclasses import dataclass, replace
from itertools import product

import pytest

from emloc.adapters.lora import Lora
from emloc.config.compatibility import check_compatible, refuse_training_in_float16
from emloc.config.compose import compose
from emloc.config.paths import CONF
from emloc.config.settings import TrainSettings
from emloc.errors import ConfigError
from emloc.stages.run_config import build, instantiate

CHOICES = {
    group: sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
    for group in ("emulator", "adapter", "recovery", "anchor", "polish")
}


@pytest.fixture(scope="module")
def parts():
    """(group, choice) -> the part; one composition has a choice of each group."""
    parts = {}
    for turn in range(max(map(len, CHOICES.values()))):
        chosen = {group: some[turn % len(some)] for group, some in CHOICES.items()}
        config = compose([f"{group}={choice}" for group, choice in chosen.items()])
        parts |= {(group, one): instantiate(config[group]) for group, one in chosen.items()}
    return parts


@pytest.fixture(scope="module")
def recipe() -> TrainSettings:
    """Training settings that work with all parts."""
    return build(compose(["method=lora", "train.checkpointing=true"])).train


def refusal(parts, recipe, *names: str) -> str | None:
    """Return the message that refuses these parts; None if they are accepted.

    Without the name of an anchor, or of a polish, there is none.
    """
    names = (*names, *["none"] * (len(CHOICES) - len(names)))
    chosen = [parts[key] for key in zip(CHOICES, names, strict=True)]
    try:
        check_compatible(*chosen, recipe)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("emulator", CHOICES["emulator"])
@pytest.mark.parametrize("adapter", CHOICES["adapter"])
def test_a_combination_is_accepted_or_refused_with_a_remedy(parts, recipe, emulator, adapter):
    """With each recovery, anchor and polish."""
    for others in product(*(CHOICES[group] for group in ("recovery", "anchor", "polish"))):
        assert_mended(parts, recipe, emulator, adapter, *others)


def assert_mended(parts, recipe, *combination: str) -> None:
    """Following the suggested overrides one by one leads to an accepted combination."""
    chosen = dict(zip(CHOICES, combination, strict=True))
    for _ in CHOICES:
        message = refusal(parts, recipe, *chosen.values())
        if message is None:
            return
        assert "\n" not in message
        assert "{" not in message
        remedy = re.search(rf"; set ({'|'.join(CHOICES)})=(\w+)", message)
        assert remedy is not None, message
        group, choice = remedy.groups()
        named = re.search(rf"\b{group}=(\w+)", message)[1]
        assert chosen[group].startswith(named), combination
        assert choice in CHOICES[group], combination
        chosen[group] = choice
    assert refusal(parts, recipe, *chosen.values()) is None, combination


GO = [
    *(("full", adapter, "none") for adapter in ("lora", "rslora", "dora")),
    *(("sibling", adapter, "none") for adapter in ("lora", "rslora", "dora")),
    *(("layer_drop", adapter, "none") for adapter in ("lora", "rslora", "dora")),
    *(("svd", "lora", recovery) for recovery in ("none", "correction", "correction_covariance")),
    *(("svd", "rslora", recovery) for recovery in ("none", "correction", "correction_covariance")),
    ("full", "rslora", "correction"),
]
NOT = {
    ("svd", "dora", "none"): "adapter=dora computes the row norms of each layer's weight, and "
    "emulator=svd does not hold that weight; set adapter=lora, or emulator=full recovery=none",
    ("prune", "dora", "scatter"): "emulator=prune trains layers smaller than the original's, and "
    "only an update s B A can be enlarged, while adapter=dora sets the norm of each row of the "
    "weight it is added to; set adapter=lora, or emulator=full recovery=none",
    ("full", "dora", "correction"): "recovery=correction changes the matrices of an update s B A, "
    "while adapter=dora sets the norm of each row of the weight it is added to; set recovery=none, "
    "or adapter=lora",
    ("layer_drop", "dora", "correction_covariance"): "recovery=correction changes the matrices of "
    "an update s B A, while adapter=dora sets the norm of each row of the weight it is added to; "
    "set recovery=none, or adapter=lora",
}


@pytest.mark.parametrize("triple", GO, ids="-".join)
def test_accepted_combinations(parts, recipe, triple):
    assert refusal(parts, recipe, *triple) is None


@pytest.mark.parametrize("triple", NOT, ids="-".join)
def test_refused_combinations(parts, recipe, triple):
    assert refusal(parts, recipe, *triple) == NOT[triple]


@pytest.mark.parametrize("anchor", ["blocks", "logits"])
def test_refused_anchors(parts, recipe, anchor):
    assert refusal(parts, recipe, "svd", "lora", "none", anchor) is None
    assert refusal(parts, recipe, "prune", "lora", "scatter", anchor) is None
    assert refusal(parts, recipe, "svd", "lora", "correction", anchor) == (
        "recovery=correction subtracts the emulator's error, which an adapter trained with "
        f"anchor={anchor} has not learnt; set recovery=none, or anchor=none"
    )
    assert refusal(parts, recipe, "offload", "lora", "none", anchor) == (
        f"anchor={anchor}: emulator=offload computes the original itself, so there is nothing to "
        "put back; set anchor=none"
    )
    assert refusal(parts, recipe, "sibling", "lora", "none", anchor) == (
        f"anchor={anchor}: emulator=sibling replaces the original, so there are no hidden states "
        "to put back; set anchor=none"
    )


def test_more_rounds_than_steps_are_refused(parts, recipe):
    message = refusal(parts, replace(recipe, steps=3), "svd", "lora", "none", "blocks")
    assert message == "anchor.rounds=4 is above train.steps=3; set anchor.rounds=3 or less"


@pytest.mark.parametrize("adapter", ["lora", "rslora"])
def test_scatter_is_required_for_pruned_layers_and_refused_for_others(parts, recipe, adapter):
    assert refusal(parts, recipe, "prune", adapter, "scatter") is None
    for recovery in ("none", "correction"):
        message = refusal(parts, recipe, "prune", adapter, recovery)
        assert message.endswith("does not enlarge them; set recovery=scatter")
    for emulator in ("full", "svd", "layer_drop", "sibling"):
        message = refusal(parts, recipe, emulator, adapter, "scatter")
        assert message.endswith("have the original's shapes; set recovery=none")


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_host_activations_work_with_each_adapter(parts, adapter):
    recipe = build(compose(["method=lora", "train=steps500"])).train
    assert recipe.host_activations
    assert refusal(parts, recipe, "full", adapter, "none") is None


@pytest.mark.parametrize("emulator", CHOICES["emulator"])
def test_all_combinations_without_training_are_accepted(parts, recipe, emulator):
    assert {refusal(parts, recipe, emulator, "none", one) for one in CHOICES["recovery"]} == {None}


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_no_adapter_is_trained_in_float16(parts, adapter):
    with pytest.raises(ConfigError, match=r"float16 is for .*; set model\.dtype=bfloat16"):
        refuse_training_in_float16("float16", parts["adapter", adapter])
    refuse_training_in_float16("bfloat16", parts["adapter", adapter])
    refuse_training_in_float16("float16", parts["adapter", "none"])


@dataclass(frozen=True)
class Scaled(Lora):
    """A plug-in adapter with its own reasons for a refusal."""

    nonlinear = "multiplies outputs by a learnt number"
    needs_weight = "starts from the singular values of the weight"


def test_a_refusal_names_the_refused_part(parts, recipe):
    """The message must not name the part that the sentence was first written for."""
    own = __name__.rpartition(".")[2]
    full, svd = (parts["emulator", one] for one in ("full", "svd"))
    none, correction = (parts["recovery", one] for one in ("none", "correction"))
    without = parts["anchor", "none"], parts["polish", "none"]
    with pytest.raises(ConfigError) as caught:
        check_compatible(svd, Scaled(), none, *without, recipe)
    assert str(caught.value) == (
        f"adapter={own} starts from the singular values of the weight, and emulator=svd does not "
        "hold that weight; set adapter=lora, or emulator=full recovery=none"
    )
    with pytest.raises(ConfigError) as caught:
        check_compatible(full, Scaled(), correction, *without, recipe)
    assert str(caught.value) == (
        "recovery=correction changes the matrices of an update s B A, while "
        f"adapter={own} multiplies outputs by a learnt number; set recovery=none, or adapter=lora"
    )
