"""Which emulators, adapters and recoveries go together: each part says what it needs of the others.

Only pairs that would be wrong are refused. A new part states its traits and edits nothing here.
"""

from __future__ import annotations

from emloc.adapters import Adapter
from emloc.emulators import Emulator
from emloc.errors import ConfigError
from emloc.recovery import Recovery
from emloc.settings import TrainSettings


def fit_together(
    emulator: Emulator, adapter: Adapter, recovery: Recovery, recipe: TrainSettings
) -> None:
    """Refuse parts that cannot work together.

    Raises:
        ConfigError: with the reason, and an override that makes them fit.
    """
    names = {
        "emulator": _name(emulator),
        "adapter": _name(adapter),
        "recovery": _name(recovery),
    }
    for wrong, why in (
        (
            adapter.needs_weight and not emulator.keeps_weights,
            "adapter={adapter} is made of the norms of a layer's weight, and emulator={emulator} "
            "does not have it at hand; set adapter=lora, or emulator=full recovery=none",
        ),
        (
            not adapter.linear and not emulator.same_shapes,
            "emulator={emulator} trains layers smaller than the original's, and only an update "
            "s B A can be enlarged, which adapter={adapter}'s is not; set adapter=lora, or "
            "emulator=full recovery=none",
        ),
        (
            not adapter.linear and recovery.reads_pairs,
            "recovery={recovery} changes the matrices of an update s B A, and adapter={adapter}'s "
            "update is none; set recovery=none, or adapter=lora",
        ),
        (
            not emulator.same_shapes and not recovery.scatters,
            "emulator={emulator} trains layers smaller than the original's, and "
            "recovery={recovery} does not enlarge them; set recovery=scatter",
        ),
        (
            emulator.same_shapes and recovery.scatters,
            "recovery={recovery} puts back what an emulator left out of a layer, and "
            "emulator={emulator} leaves out nothing; set recovery=none",
        ),
        (
            emulator.recomputes and not recipe.checkpointing,
            "emulator={emulator} has a layer's weights only while they are multiplied, so that the "
            "backward pass has to compute them again; set train.checkpointing=true",
        ),
        (
            recipe.host_activations and not adapter.linear,
            "train.host_activations=true is of the lean training, and adapter={adapter} computes "
            "more than its two products; set train.host_activations=false, or adapter=lora",
        ),
    ):
        if wrong:
            raise ConfigError(why.format(**names))


def _name(part: object) -> str:
    """The choice in its group: a part is called as its file."""
    return type(part).__module__.rpartition(".")[2]
