"""The features stage: what the vision tower hands to the language model, stored for each image.

Features belong to images and to the original alone. They are kept in a folder that all runs with
the same original share, and a pass computes only those that no earlier pass has left there. Only
rows that the training draws have features.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from emloc.anchors.shards import read_rows, shard_file, write_rows, write_shard
from emloc.calibration.batch_size import batch_tokens, group_by_tokens
from emloc.calibration.image_features import compute_features, split_features
from emloc.data import stored_features
from emloc.data.prompts import EncodedExample
from emloc.data.reader import encode_all
from emloc.data.stored_features import LANGUAGE_INPUTS, FeatureLayout, images_key
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.tower import TOWER_TOKENS, packed_features
from emloc.runtime.digest import digest
from emloc.runtime.folders import existing_folder
from emloc.runtime.keys import key_of
from emloc.runtime.manifest import seal
from emloc.runtime.memory import GIB
from emloc.runtime.stage_cache import Facts
from emloc.stages import FEATURES, Context, Stage
from emloc.stages.feature_files import write_layout
from emloc.stages.shared_passes import intact_passes, write_list
from emloc.stages.training.order import order_of
from emloc.stages.training.work import rows_of_step

log = logging.getLogger(__name__)

# Rows of which the size of all features is estimated before any stage begins.
_FEW = 16
# Inputs of a model that are no sign of images.
_OF_TOKENS = ("input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep")
_COMPUTED = "set train.features=computed"


@dataclass(frozen=True, kw_only=True)
class StoreFeatures(Stage):
    """Stage that makes sure that the images of the rows of a training have stored features."""

    gives = FEATURES

    def needed(self, context: Context) -> bool:
        """Return whether the training reads stored features."""
        return (
            context.training_inputs is not None and context.training_inputs.recipe.stores_features
        )

    def check(self, context: Context) -> None:
        """Check that the training can read stored features, and that the disk holds them.

        Raises:
            ConfigError: names the reason and an override that mends the settings.
        """
        if not self.needed(context):
            return
        inputs, source = context.training_inputs, context.source
        assert inputs is not None
        name = context.run_config.model.name
        if not source.tower or not isinstance(getattr(source.config, "image_token_id", None), int):
            raise ConfigError(
                f"train.features=stored: model={name} has no vision tower whose features stand in "
                f"the place of image tokens; {_COMPUTED}"
            )
        if not context.run_config.emulator.leaves_out_tower:
            emulator = type(context.run_config.emulator).__name__.lower()
            raise ConfigError(
                f"train.features=stored: emulator={emulator} is trained with its own vision tower; "
                f"{_COMPUTED}, or set emulator=svd"
            )
        inside = tuple(f"{module}." for module in source.tower)
        adapted = [layer for layer in inputs.layers if layer.startswith(inside)]
        if adapted:
            raise ConfigError(
                f"train.features=stored: {adapted[0]} lies in the vision tower or its projector, "
                "and an adapter there changes the features; set model.lora_targets to layers of "
                f"the language model, or {_COMPUTED.removeprefix('set ')}"
            )
        _require_room(context)

    def inputs(self, context: Context) -> list[Any]:
        """Return the original, the rows with the images, and what decides which are drawn."""
        inputs, anchor = context.training_inputs, context.run_config.anchor
        assert inputs is not None
        return [
            context.source,
            inputs.examples,
            inputs.max_length,
            _samples(context),
            [inputs.recipe.steps, rows_of_step(inputs.recipe, len(inputs.examples)), inputs.seed],
            [anchor.guard, anchor.rounds] if anchor.anchors else None,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """Compute the features that are missing; write the list of passes that hold all."""
        shared = context.cache / "features" / digest([self.version, key_of(context.source)])
        shared.mkdir(parents=True, exist_ok=True)
        rows = _rows_with_images(context)
        with FileLock(shared.with_suffix(".lock")):
            passes = intact_passes(shared, "features: the features")
            present = {key for one in passes for shard in read_rows(one) for key in shard}
            missing = [row for key, row in rows.items() if key not in present]
            log.info("features: %d of %d rows have no features yet", len(missing), len(rows))
            if missing:
                passes.append(_new_pass(shared, missing, context))
        write_list(folder, passes)
        return {"rows": len(rows), "computed_rows": len(missing)}


def _samples(context: Context) -> Any:
    """Return the calibration samples that a training reads again; None if it reads none."""
    anchor = context.run_config.anchor
    return context.samples if anchor.anchors and anchor.refit else None


def _rows_with_images(context: Context) -> dict[str, EncodedExample]:
    """Return one of the rows that the training reads for each key of images."""
    inputs, reader = context.training_inputs, context.source.reader()
    assert inputs is not None
    steps = inputs.recipe.steps + 1  # behind the last step, the Trainer collates one batch more
    if context.run_config.anchor.anchors:
        plan = context.anchored_rows
        rows = [one.row for one in (*plan.of_steps(0, steps), *plan.guard)]
    else:
        encoded = encode_all(reader, inputs.examples, inputs.max_length)
        order = order_of(encoded, inputs.recipe, inputs.seed)
        rows = [encoded[index] for index in order.of_steps(0, steps)]
    if (samples := _samples(context)) is not None:
        rows = [*rows, *encode_all(reader, samples.examples, samples.max_length)]
    return {images_key(row): row for row in rows if row.images}


def _new_pass(shared: Path, rows: Sequence[EncodedExample], context: Context) -> Path:
    """Run a pass over rows without features, and return its folder."""
    target = shared / digest([images_key(row) for row in rows])
    draft = target.with_suffix(".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    vision = getattr(context.source.config, "vision_config", None)
    width = getattr(vision, "hidden_size", context.source.config.get_text_config().hidden_size)
    tokens = batch_tokens(TOWER_TOKENS * width, context.device)
    groups = group_by_tokens([row.length for row in rows], tokens)
    writer = _Writer(draft, context.source, [[rows[index] for index in one] for one in groups])
    compute_features(
        context.source,
        writer.collate,
        len(groups),
        writer.keep,
        device=context.device,
        limits=context.limits,
    )
    write_layout(draft, writer.layout)
    write_rows(draft, [[images_key(row) for row in batch] for batch in writer.batches])
    seal(draft)
    draft.replace(target)
    return target


@dataclass
class _Writer:
    """Collates batches of rows with images, and writes one shard of features for each."""

    folder: Path
    source: Source
    batches: Sequence[Sequence[EncodedExample]]
    layout: FeatureLayout = field(default_factory=FeatureLayout)
    _inputs: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    _types: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = self.source.reader()
        self._token = self.source.config.image_token_id

    def collate(self, index: int) -> Mapping[str, Any]:
        """Return a batch with pixels."""
        batch = self._reader.collate(self.batches[index], answers_only=False)
        self._inputs[index] = {name: batch[name] for name in LANGUAGE_INPUTS if name in batch}
        self._types |= _token_types(batch, self._token)
        return batch

    def keep(self, index: int, output: Any) -> None:
        """Write the features of a batch.

        Raises:
            ConfigError: the features are not those of the rows' image tokens.
        """
        rows = self.batches[index]
        features, is_list, levels = packed_features(output)
        self.layout = FeatureLayout(is_list, levels, self._types)
        counts = [row.input_ids.count(self._token) for row in rows]
        parts = split_features(features, counts)
        if parts is None:
            raise ConfigError(
                f"train.features=stored: the vision tower returns features "
                f"{tuple(features.shape)} for {sum(counts)} image tokens; {_COMPUTED}"
            )
        parts_by_row = {
            images_key(row): {stored_features.FEATURES: part.detach().cpu().contiguous()}
            for row, part in zip(rows, parts, strict=True)
        }
        for name, values in self._inputs.pop(index).items():
            some = torch.split(values, [len(row.images) for row in rows])
            for row, value in zip(rows, some, strict=True):
                parts_by_row[images_key(row)][name] = value.contiguous()
        write_shard(shard_file(self.folder, 0, index), parts_by_row)


def _token_types(batch: Mapping[str, Tensor], token: int) -> dict[str, bool]:
    """Return which further inputs there are for each token, and whether they mark image tokens.

    Raises:
        ConfigError: such an input has other values.
    """
    ids = batch["input_ids"]
    is_image = (ids == token).long()
    types = {}
    for name, values in batch.items():
        if name in _OF_TOKENS or values.shape != ids.shape:
            continue
        types[name] = torch.equal(values.long(), is_image)
        if not types[name] and values.any():
            raise ConfigError(
                f"train.features=stored: the model reads {name} of each token, which is not known "
                f"without the image; {_COMPUTED}"
            )
    return types


def _require_room(context: Context) -> None:
    """Estimate the bytes of all features from some rows, before anything is computed.

    Raises:
        ConfigError: the disk is too small.
    """
    inputs, source = context.training_inputs, context.source
    assert inputs is not None
    reader, examples = source.reader(), inputs.examples
    some: list[Any] = [reader.encode(example) for example in examples.spread(_FEW)]
    tokens = mean(row.input_ids.count(source.config.image_token_id) for row in some)
    width = source.config.get_text_config().hidden_size
    step_rows = rows_of_step(inputs.recipe, len(examples))
    rows = min(len(examples), inputs.recipe.steps * step_rows)
    size = rows * tokens * width * source.dtype.itemsize
    limit = context.run_config.budget.disk_gib
    existing = existing_folder(context.cache)
    free = shutil.disk_usage(existing).free
    what = f"train.features=stored: the features of {rows} rows take {size / GIB:.3g} GiB"
    if size > limit * GIB:
        raise ConfigError(f"{what}, and budget.disk_gib={limit:g}; set it higher, or {_COMPUTED}")
    if size > free:
        raise ConfigError(
            f"{what}, and {existing} has {free / GIB:.3g} GiB free; set EMLOC_CACHE to a folder on "
            f"a larger disk, or {_COMPUTED}"
        )
