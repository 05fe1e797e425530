"""Two GPUs train like one: DDP on the memory-saving path, and FSDP2."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

TWO = (
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc-per-node", "2", "-m", "emloc"),
)
SPLIT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
RECIPE = ("train.steps=12", "train.checkpointing=true")

ANCHORED = ("method=emloc_anchored", "anchor.places=3", "anchor.rounds=3", "anchor.guard=4")


def curve(runs: Path) -> list[float]:
    (status,) = runs.glob("*/status.json")
    assert json.loads(status.read_text())["state"] == "done"
    lines = (status.parent / "curve.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("method", [(), ANCHORED], ids=["emloc", "anchored"])
def test_two_gpus_give_the_losses_of_one_with_as_many_samples_per_step(
    emloc, tiny, tmp_path, dtype, split, method, capsys
):
    wide = save_checkpoint(tmp_path / "wide", **WIDE)
    settings = [f"model.source={wide}", f"model.dtype={dtype}", *RECIPE, *method]
    path = [f"train.lean={str(not split).lower()}"]
    if split and method:
        path.append("anchor.refit=false")  # one process cannot fit weights that are split
    one = emloc.process(
        *tiny, *settings, *path, "train.accumulate=2", "name=one", CUDA_VISIBLE_DEVICES="0"
    )
    assert one.code == 0, one.output
    two = emloc.process(
        *tiny, *settings, *path, "name=two", program=TWO, **(SPLIT if split else {})
    )
    assert two.code == 0, two.output
    ours, theirs = curve(tmp_path / "runs/two"), curve(tmp_path / "runs/one")
    with capsys.disabled():
        apart = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        print(f"{dtype} {'fsdp2' if split else 'ddp'}: largest relative difference {apart:.1e}")
        print("  one:", *(f"{loss:.4f}" for loss in theirs))
        print("  two:", *(f"{loss:.4f}" for loss in ours))
    assert len(ours) == 12
    assert theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-4 if dtype == "float32" else 1e-2)
