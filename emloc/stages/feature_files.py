"""The files of stored features, as the features stage writes them."""

from __future__ import annotations

import json
from pathlib import Path

from emloc.anchors.shards import OffsetReader
from emloc.data.stored_features import FeatureFiles, FeatureLayout
from emloc.runtime.atomic import write_json
from emloc.runtime.stage_cache import Artifact
from emloc.stages.shared_passes import listed_passes

_LAYOUT_FILE = "layout.json"


def write_layout(folder: Path, layout: FeatureLayout) -> None:
    """Write how the features of a pass are laid out."""
    write_json(folder / _LAYOUT_FILE, layout.values)


def open_features(artifact: Artifact) -> FeatureFiles:
    """Open the features that an artifact of the stage lists.

    Raises:
        DamagedError: some are missing or damaged, so the stage has to be computed again.
    """
    folders = listed_passes(artifact, "features")
    layouts = [json.loads((folder / _LAYOUT_FILE).read_text()) for folder in folders]
    layout = FeatureLayout(**layouts[0]) if layouts else FeatureLayout()
    return FeatureFiles(layout, OffsetReader(folders))
