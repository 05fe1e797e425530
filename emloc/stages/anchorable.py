"""Refuse anchors that a run cannot have, before any stage begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from emloc.adapters.lora import Lora
from emloc.anchors import Anchor
from emloc.anchors.places import Place
from emloc.emulators.layer_drop import block_stack
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.decoder import Decoder

if TYPE_CHECKING:
    from emloc.stages.run_config import RunConfig


def require_anchorable(
    run_config: RunConfig, source: Source, layers: Iterable[str], *, is_original: bool
) -> list[Place]:
    """Check that the emulator of a run can be put back onto the original; return the places.

    Args:
        run_config: the settings, with anchors.
        source: the original.
        layers: names of the layers with an adapter.
        is_original: whether the emulator has the original's layers, packed or not.

    Raises:
        ConfigError: it cannot; names an override that mends the settings.
    """
    anchor = run_config.anchor
    assert anchor.anchors
    _require_gap(run_config, is_original)
    _require_measured(run_config, source)
    _require_lora(run_config, anchor)
    places = anchor.find(source.meta_model, block_stack(source))
    _require_adapted_between(source, layers, places)
    return places


def _require_gap(run_config: RunConfig, is_original: bool) -> None:
    """Refuse an emulator that is the original, or that is fitted to its own drift."""
    if is_original and run_config.precision is None:
        raise ConfigError(
            "anchor: the emulator is the original model itself, so there is nothing to put back; "
            "set anchor=none, or compression.bits=4"
        )
    if getattr(run_config.emulator, "sequential", False):
        raise ConfigError(
            "anchor: emulator.sequential=true fits layers to the drift of the layers before, which "
            "anchors take away; set emulator.sequential=false"
        )


def _require_measured(run_config: RunConfig, source: Source) -> None:
    if not source.objective.measures_rows:
        raise ConfigError(
            f"anchor: the objective of model={run_config.model.name} does not measure the "
            "loss of single rows, by which rounds are compared; set anchor=none"
        )


def _require_lora(run_config: RunConfig, anchor: Anchor) -> None:
    """Refuse other adapters than LoRAs, where a pass runs the original with the adapter on it."""
    adapter = run_config.adapter
    assert adapter.trains
    is_run = anchor.rounds > 1 or anchor.guard > 0 or not adapter.starts_at_zero
    if is_run and not isinstance(adapter, Lora):
        raise ConfigError(
            f"anchor: the original is run with the adapter on it, block by block, which needs a "
            f"LoRA, and {type(adapter).__name__} is none; set adapter=lora, or anchor.rounds=1 "
            "anchor.guard=0 to run the original only once, without it"
        )


def _require_adapted_between(
    source: Source, layers: Iterable[str], places: Sequence[Place]
) -> None:
    """Refuse adapters in front of the decoder or behind the place at the logits.

    In front of the decoder the hidden states are the original's own. Behind the last place, an
    adapter would also be applied to its offset.
    """
    model, prefix = source.meta_model, Decoder(source).prefix
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    for name in layers:
        if name in heads:
            if any(place.module == name for place in places):
                raise ConfigError(
                    f"anchor=logits: {name} is adapted, so an offset in front of it is no constant "
                    "offset of the logits; set model.lora_targets to other layers, or set "
                    "anchor=blocks"
                )
        elif not name.startswith(prefix):
            raise ConfigError(
                f"anchor: {name} is in front of the language decoder, whose input is put back onto "
                "the original's without an adapter; set model.lora_targets to layers of the "
                "decoder, or anchor=none"
            )
