"""Check that the emulator, adapter, recovery, anchor and polish of a run work together.

Each part declares its own traits, and the check compares them. A new part declares its traits and
changes nothing in this file. Only combinations with wrong results are refused.
"""

from __future__ import annotations

from typing import Any

from emloc.config.settings import TrainSettings
from emloc.errors import ConfigError


def check_compatible(
    emulator: Any, adapter: Any, recovery: Any, anchor: Any, polish: Any, recipe: TrainSettings
) -> None:
    """Refuse an emulator, adapter, recovery, anchor, polish and recipe that do not work together.

    A run that trains nothing passes every check. The parts are objects of their classes, or
    stand-ins with the same traits (`emloc.config.declared`), so that torch is not needed.

    Raises:
        ConfigError: names the reason and an override that resolves the conflict.
    """
    if not adapter.trains:
        return
    names = {
        "emulator": choice_name(emulator),
        "adapter": choice_name(adapter),
        "recovery": choice_name(recovery),
        "anchor": choice_name(anchor),
        "polish": choice_name(polish),
    }
    for is_conflict, message in (
        (
            adapter.needs_weight and not emulator.keeps_weights,
            f"adapter={{adapter}} {adapter.needs_weight}, and emulator={{emulator}} does not hold "
            "that weight; set adapter=lora, or emulator=full recovery=none",
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
            "recovery={recovery} enlarges an adapter of smaller layers, and emulator={emulator} "
            "leaves out nothing: its layers have the original's shapes; set recovery=none",
        ),
        (
            emulator.recomputes and not recipe.checkpointing,
            "emulator={emulator} frees a layer's weights after its forward pass, so the backward "
            "pass has to run the forward pass of each block again; set train.checkpointing=true",
        ),
        (
            anchor.anchors and emulator.unanchored,
            f"anchor={{anchor}}: emulator={{emulator}} {emulator.unanchored}; set anchor=none",
        ),
        (
            anchor.anchors and recovery.subtracts,
            "recovery={recovery} subtracts the emulator's error, which an adapter trained with "
            "anchor={anchor} has not learnt; set recovery=none, or anchor=none",
        ),
        (
            anchor.anchors and getattr(anchor, "rounds", 0) > recipe.steps,
            f"anchor.rounds={getattr(anchor, 'rounds', 0)} is above train.steps={recipe.steps}; "
            f"set anchor.rounds={recipe.steps} or less",
        ),
        (
            polish.polishes and not polish.keeps_weights and adapter.needs_weight,
            f"adapter={{adapter}} {adapter.needs_weight}, and polish={{polish}} has that weight on "
            "the device only while its block runs; set adapter=lora, or polish=none",
        ),
    ):
        if is_conflict:
            raise ConfigError(message.format(**names))


def refuse_training_in_float16(dtype: str, adapter: Any) -> None:
    """Refuse to train in float16; a run that trains nothing may read its model so.

    Raises:
        ConfigError: the model is in float16, and the adapter is trained.
    """
    if dtype == "float16" and adapter.trains:
        raise ConfigError(
            "model.dtype=float16 is for runs that train nothing, since small gradients are 0 in "
            "it; set model.dtype=bfloat16, which takes the same memory, or model.dtype=float32"
        )


def required_budget(gpu_gib: float | None) -> float:
    """Return the device memory, in GiB, that `compression=auto` solves for.

    Raises:
        ConfigError: `budget.gpu_gib` is null.
    """
    if gpu_gib is None:
        raise ConfigError("compression=auto needs budget.gpu_gib; set budget.gpu_gib=24")
    return gpu_gib


def choice_name(part: object) -> str:
    """Name of a part in its configuration group: the name of the file that defines its class."""
    return type(part).__module__.rpartition(".")[2]
