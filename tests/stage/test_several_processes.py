"""Two processes of one launch train like one process and write one run folder.

The first test starts them with `torchrun`. The others set the variables that `torchrun` sets.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from staged import curve_of

TWO = ("--standalone", "--nproc-per-node", "2", "-m", "emloc")
SPLIT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
# Steps of 2 x 3 samples: the 40 rows are no multiple of 6, and are used twice.
RECIPE = ("train.batch=3", "train.steps=9", "train.save_every=2", "train.learning_rate=0.05")


@pytest.fixture
def train_alone(run_cached):
    """Function that trains in this process with as many samples per step."""
    return lambda *overrides: run_cached(*overrides, "train.accumulate=2").trained


def assert_same_training(run: Path, single: Path) -> None:
    assert_same_steps(run, single, 9)
    curve = curve_of(single)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.2


def assert_same_steps(run: Path, single: Path, steps: int) -> None:
    ours, theirs = curve_of(run), curve_of(single)
    assert [line["step"] for line in ours] == list(range(1, steps + 1))
    for name in ("loss", "grad_norm", "learning_rate"):
        values = [line[name] for line in theirs]
        assert [line[name] for line in ours] == pytest.approx(values, rel=1e-4)
    adapters = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (run / "adapter_trained", single / "adapter")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], tensor, atol=1e-5, rtol=1e-4)


def test_two_processes_train_like_one_and_write_one_run(
    emloc, tiny, one_run, train_alone, fork_server
):
    torchrun = (str(fork_server.python), "-m", "torch.distributed.run", *TWO)
    first = emloc.process(*tiny, *RECIPE, program=torchrun, PYTHON_EXEC=str(fork_server.python))
    assert first.code == 0, first.output
    run = one_run()
    assert_same_training(run, train_alone(*RECIPE).folder)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["processes"] == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [one["train/step"] for one in lines if "train/step" in one] == list(range(1, 10))
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert first.out.count("| emloc ") == 1
    assert (run / "run.log").read_text().count(": started") == 1
    again = emloc.two(*tiny, *RECIPE)
    assert again.code == 0, again.output
    assert again.output.count("done before") == 1


def test_fsdp_trains_like_one_process_also_after_an_interruption(
    emloc, tiny, one_run, train_alone, tmp_path
):
    begun = emloc.start_two(*tiny, *RECIPE, **SPLIT)
    lines = tmp_path / "runs" / "adhoc"
    while not any('"train/step": 7' in path.read_text() for path in lines.glob("*/metrics.jsonl")):
        assert not any(process.ended for process in begun)
        time.sleep(0.02)
    for process in begun:
        process.terminate()
    assert all(process.wait() != 0 for process in begun)
    checkpoints = list((tmp_path / "cache" / "train").glob("*.partial/checkpoints/checkpoint-*"))
    assert any((path / "pytorch_model_fsdp_0").is_dir() for path in checkpoints)
    ended = emloc.two(*tiny, *RECIPE, **SPLIT)
    assert ended.code == 0, ended.output
    assert_same_training(one_run(), train_alone(*RECIPE).folder)


ANCHORED = (
    *("method=emloc_anchored", "compression.ratio=0.5", "train.learning_rate=0.02"),
    *("train.batch=3", "train.steps=4"),
    *("anchor.places=2", "anchor.rounds=2", "anchor.guard=4", "anchor.dtype=float32"),
)


def test_anchored_processes_train_like_one(emloc, tiny, one_run, train_alone):
    """One process computes the offsets of each round, and all of them read these."""
    ended = emloc.two(*tiny, *ANCHORED)
    assert ended.code == 0, ended.output
    run, single = one_run(), train_alone(*ANCHORED).folder
    assert_same_steps(run, single, 4)
    rounds = [
        [json.loads(line) for line in (folder / "anchors.jsonl").open()] for folder in (run, single)
    ]
    assert [line["step"] for line in rounds[0]] == [0, 2, 4]
    for name in ("original_loss", "change"):
        assert [line.get(name, 0) for line in rounds[0]] == pytest.approx(
            [line.get(name, 0) for line in rounds[1]], rel=1e-3
        )


def test_a_loss_that_is_not_finite_ends_all_processes(emloc, tiny, one_run):
    settings = ("train.learning_rate=1e38", "train.warmup=0", "method=lora")
    failed = emloc.two(*tiny, *settings)
    assert failed.code == 1
    status = json.loads((one_run() / "status.json").read_text())
    assert (status["state"], status["stage"]) == ("failed", "train")
    assert "the loss is nan at step 2; set train.learning_rate lower" in status["error"]
    assert failed.output.count("the loss is nan") == 1
