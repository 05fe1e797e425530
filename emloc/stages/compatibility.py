"""Which emulators, adapters and recoveries go together: each part says what it needs of the others.

Only pairs that would be wrong are refused. A new part states its traits and edits nothing here.
"""

from __future__ import annotations

from emloc.adapters import Adapter
from emloc.adapters.none import NoAdapter
from emloc.config.settings import TrainSettings
from emloc.emulators import Emulator
from emloc.errors import ConfigError
from emloc.recovery import Recovery


def check_compatible(
    emulator: Emulator, adapter: Adapter | NoAdapter, recovery: Recovery, recipe: TrainSettings
) -> None:
    """Refuse parts that cannot work together. Where nothing is trained, all of them can.

    Raises:
        ConfigError: with the reason, and an override that makes them fit.
    """
    if not adapter.trains:
        return
    names = {
        "emulator": _name(emulator),
        "adapter": _name(adapter),
        "recovery": _name(recovery),
    }
    for wrong, why in (
        (
            adapter.needs_weight and not emulator.keeps_weights,
            f"adapter={{adapter}} {adapter.needs_weight}, and emulator={{emulator}} does not have "
            "it at hand; set adapter=lora, or emulator=full recovery=none",
        ),
        (
            adapter.nonlinear and not emulator.same_shapes,
            "emulator={emulator} trains layers smaller than the original's, and only an update "
            f"s B A can be enlarged, while adapter={{adapter}} {adapter.nonlinear}; set "
            "adapter=lora, or emulator=full recovery=none",
        ),
        (
            adapter.nonlinear and recovery.reads_pairs,
            "recovery={recovery} changes the matrices of an update s B A, while "
            f"adapter={{adapter}} {adapter.nonlinear}; set recovery=none, or adapter=lora",
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
    ):
        if wrong:
            raise ConfigError(why.format(**names))


def _name(part: object) -> str:
    """The choice in its group: a part is called as its file."""
    return type(part).__module__.rpartition(".")[2]
