"""The arithmetic of a stage and the weights that it reads, for the tables.

`row_forwards`: arithmetic in forward passes of the original over one row. `weights_read`: bytes of
weights that reach the computing devices, from disk or from host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emloc.emulators.operations import block_operations
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.runtime.distributed import is_sharded, world_size
from emloc.runtime.work_meter import WorkMeter

if TYPE_CHECKING:
    from emloc.runtime.stage_cache import Artifact
    from emloc.stages.run_config import RunConfig


def measured_work(meter: WorkMeter, source: Source, *, together: bool) -> dict[str, float]:
    """Facts of a stage from what this process has run block by block, and from what it has read.

    `row_forwards` is missing where no block ran. Sums of moments and decompositions do not count.

    Args:
        meter: ran during the stage.
        source: the original model.
        together: all processes have worked, each like this one. Under FSDP they share one copy of
            the weights.
    """
    processes = world_size() if together and not is_sharded() else 1
    work: dict[str, float] = {"weights_read": meter.weight_bytes * processes}
    if meter.operations and (one_row := block_operations(source)):
        work["row_forwards"] = meter.operations / one_row
    return work


def work_of_stages(run_config: RunConfig, stages: Mapping[str, Artifact]) -> dict[str, Any]:
    """The work of all counted stages, as the results of a run store it: fact -> stage -> number.

    `trained_rows` is one number, and missing where nothing was trained. An artifact of an earlier
    version has no such facts.

    Args:
        run_config: settings of the run, with the original model.
        stages: stage -> artifact.
    """
    facts = {
        name: artifact.facts for name, artifact in stages.items() if run_config.stage[name].counted
    }
    unit = _forwards_of_original(run_config)
    forwards = {name: own["row_forwards"] for name, own in facts.items() if "row_forwards" in own}
    rows = [own["trained_rows"] for own in facts.values() if "trained_rows" in own]
    return {
        "row_forwards": {name: unit * number for name, number in forwards.items() if unit},
        "weights_read": {
            name: own["weights_read"] for name, own in facts.items() if "weights_read" in own
        },
        **({"trained_rows": sum(rows)} if rows else {}),
    }


def _forwards_of_original(run_config: RunConfig) -> float | None:
    """Forwards of the original that one forward of the trained model takes; None if unknown.

    It is 1 unless the emulator is a smaller checkpoint, which the stages know as the original.
    """
    original = run_config.model
    trained = run_config.emulator.model(original, run_config.compression)
    if trained is original:
        return 1.0
    try:
        one_row = block_operations(original.shape_source())
    except ConfigError:  # its settings have no shape
        return None
    return block_operations(trained.open()) / one_row if one_row else None
