"""Sweeps with each launcher and with the search: parallel runs, killed runs, failed trials."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from forked import ForkedProcess

# Scripts that replace the commands of Slurm: they save the submitted job and report that every job
# ran out of memory.
SLURM = {
    "sbatch": 'cp "$1" "$SUBMITTED"\necho Submitted batch job 12',
    "sacct": 'echo "JobID|State|NodeList"\necho "12|OUT_OF_MEMORY|node1"',
    "srun": "true",
}
WITHOUT_PLUGINS = """
import sys
for name in ("joblib_launcher", "submitit_launcher", "optuna_sweeper"):
    sys.modules[f"hydra_plugins.hydra_{name}"] = None
sys.argv[0] = "emloc"
from emloc.cli import main; main()
"""


@pytest.fixture
def states(tmp_path):
    """Function that returns value of a setting -> state of its run, for the runs below a name."""

    def read(name: str, section: str, key: str) -> dict[str, str]:
        states = {}
        for path in (tmp_path / "runs" / name).glob("*/status.json"):
            config = (path.parent / "config.yaml").read_text()
            below = config.split(f"\n{section}:\n")[1]
            value = below.split(f"  {key}: ")[1].split("\n")[0]
            states[value] = json.loads(path.read_text())["state"]
        return states

    return read


def writers(file: Path, launched: ForkedProcess) -> list[psutil.Process]:
    """Return the processes of a launch that have this file open."""
    processes: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
        processes = psutil.Process(launched.pid).children(recursive=True)
    return [process for process in processes if has_open(process, file)]


def has_open(process: psutil.Process, file: Path) -> bool:
    try:
        return str(file) in {one.path for one in process.open_files()}
    except psutil.NoSuchProcess:
        return False


def kill_training_process(launched: ForkedProcess, runs: Path, steps: int, times: int) -> None:
    """Kill the process of the run with `steps` steps when it trains, `times` times in all."""
    killed: set[int] = set()
    while not launched.ended:
        time.sleep(0.2)
        for config in runs.glob("*/config.yaml"):
            log = config.with_name("run.log")
            trains = log.exists() and "train: computing" in log.read_text()
            if trains and f"steps: {steps}\n" in config.read_text():
                for process in writers(log, launched):
                    if process.pid not in killed and len(killed) < times:
                        process.kill()
                        killed.add(process.pid)
    assert len(killed) == times


def test_a_sweep_reports_progress_and_draws_no_bars_without_a_terminal(
    emloc, tiny, tmp_path, fork_server
):
    words = ["-m", "method=zero_shot,lora", "name=plain", *tiny]
    command = [fork_server.python, "-m", "emloc", *words]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert first.returncode == 0, first.stderr.decode()
    assert b"] 1 of 2 jobs done, roughly " in first.stdout
    assert b" left, 1 method not yet timed\n" in first.stdout
    assert b"] 2 of 2 jobs done\n" in first.stdout
    assert not {b"\r", b"\x1b"} & {bytes([c]) for c in first.stdout + first.stderr}
    assert "] 1 of 2 jobs done\n" in emloc.fork(*words).out
    assert {path.name for path in (tmp_path / "runs/plain").glob("[!lz]*")} == {"multirun.yaml"}


def test_the_local_launcher_starts_one_process_per_run_and_skips_finished_runs(
    emloc, tiny, tmp_path, states
):
    sweep = ["-m", "name=each", "hydra/launcher=local", "method=lora", "eval.harness=false", *tiny]
    ran = emloc.fork(*sweep, "train.learning_rate=1e-4,1e30")
    assert ran.code == 1, ran.output
    assert "| failed(train)" in ran.out
    assert "] 1 of 2 jobs done, 1 failed" in ran.out
    assert states("each", "train", "learning_rate") == {"0.0001": "done", "1.0e+30": "failed"}
    assert len(list(tmp_path.rglob("*.pkl"))) == len(
        list((tmp_path / "runs/each/.submitit").rglob("*.pkl"))
    )
    done = next(path for path in (tmp_path / "runs/each").glob("*/metrics.json"))
    written = done.stat().st_mtime_ns
    again = emloc.fork(*sweep, "train.learning_rate=1e-4")
    assert again.code == 0, again.output
    assert "] 1 of 1 jobs done" in again.out
    assert done.stat().st_mtime_ns == written
    logs = (tmp_path / "runs/each/.submitit").rglob("*.out")
    assert sum(": done before" in path.read_text() for path in logs) == 1


def test_a_killed_worker_fails_only_its_own_run(emloc, tiny, tmp_path, states):
    sweep = ["-m", "method=lora", "train.steps=5,100000,6", "name=killed", "hydra/launcher=joblib"]
    sweep += ["budget.jobs_per_gpu=auto"]
    settings = [one for one in tiny if not one.startswith("train.steps")]
    launched = emloc.start(*sweep, "hydra.launcher.n_jobs=2", *settings)
    kill_training_process(launched, tmp_path / "runs/killed", steps=100000, times=2)
    said = launched.read("out") + launched.read("err")
    assert launched.poll() == 1, said
    assert states("killed", "train", "steps") == {"5": "done", "6": "done", "100000": "failed"}
    assert said.count("these jobs run again, one at a time: lora-") == 1
    assert "its process was killed (SIGKILL(-9))" in said
    assert "| failed(killed)" in said
    assert "] 2 of 3 jobs done, 1 failed\n" in said


def test_slurm_gets_a_job_with_one_gpu_per_run_and_its_out_of_memory_is_recorded(
    emloc, tiny, tmp_path
):
    for name, script in SLURM.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    ran = emloc.fork(
        *("-m", "method=lora", "name=far", "hydra/launcher=slurm", *tiny),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SUBMITTED=str(tmp_path / "submitted"),
        EMLOC_SLURM_PARTITION="short",
    )
    job_script = (tmp_path / "submitted").read_text()
    for line in ("--partition=short", "--gpus-per-node=1", "--time=720", "--job-name=emloc-far"):
        assert f"#SBATCH {line}\n" in job_script
    assert ran.code == 1, ran.output
    assert "| lora   | OOM" in ran.out
    assert "its process ended without a result (OUT_OF_MEMORY; more in " in ran.err


def test_a_search_ignores_failed_trials_and_the_same_command_repeats_them(emloc, tiny, tmp_path):
    settings = [one for one in tiny if not one.startswith("lora")]
    search = ["-m", "hydra/sweeper=search", "lora=choice(r4,r64)", "method=lora", "name=best"]
    search += ["eval.harness=false", *settings]
    ran = emloc.fork(*search, "hydra.sweeper.n_trials=3")
    assert ran.code == 2, ran.output  # rank 64 is refused for such a small model
    assert "] 1 of 3 jobs done, 2 failed" in ran.out
    assert "\x1b" not in ran.output
    best = (tmp_path / "runs/best/optimization_results.yaml").read_text()
    assert "  lora: r4\n" in best
    assert "Best value: " in ran.out
    again = emloc.fork(*search, "hydra.sweeper.n_trials=1")
    assert again.code == 0, again.output
    assert again.out.count("done before") == 1
    assert len(list((tmp_path / "runs/best").glob("lora-*"))) == 3


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ("hydra/launcher=joblib", "hydra/launcher=joblib is not installed; pip install 'emloc[par"),
        ("hydra/launcher=slurm", "submitit_slurm is not installed; pip install 'emloc[slurm]'"),
        ("hydra/sweeper=search", "hydra/sweeper=optuna is not installed; pip install 'emloc[sea"),
    ],
)
def test_a_missing_hydra_plugin_is_reported_with_the_extra_to_install(emloc, choice, line):
    ran = emloc.process(
        "-m", "method=lora", choice, program=(sys.executable, "-c", WITHOUT_PLUGINS)
    )
    assert ran.code == 2
    assert line in ran.err
    assert len(ran.output.splitlines()) == 1
