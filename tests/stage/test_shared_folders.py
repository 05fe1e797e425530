"""Files of a run and of the cache get the permissions that the user's umask gives to new files."""

import os
from pathlib import Path

import pytest
from permitted import permissions


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, "644", "2755"), (0o002, "664", "2775")], ids=["022", "002"]
)
def test_a_run_its_merge_and_its_cache_obey_the_umask(
    emloc, tiny, one_run, tmp_path, set_umask, mask, file, folder
):
    """A folder that hands on its group (setgid) does so to all folders in it."""
    set_umask(mask)
    for name in ("runs", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(int(folder, 8))
    ran = emloc(*tiny, "method=emloc", "train.save_every=2")
    assert ran.code == 0, ran.output
    run = one_run()
    assert emloc("merge", str(run)).code == 0
    modes = {**permissions(tmp_path / "runs"), **permissions(tmp_path / "cache")}
    assert {
        *("adapter_model.safetensors", "model.safetensors", "manifest.json", "stage.json"),
        *("journal.jsonl", ".lock", "run.log", "config.yaml", "metrics.jsonl"),
    } <= {Path(path).name for path in modes}
    expected = {path: folder if path.endswith(os.sep) else file for path in modes}
    assert modes == expected
