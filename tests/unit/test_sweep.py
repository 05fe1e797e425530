"""The count of runs in a sweep, and the environment of its workers."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from hydra_plugins import emloc_sweeps
from omegaconf import DictConfig, OmegaConf

from emloc.config.compose import compose, register
from emloc.config.paths import CONF
from emloc.sweeps.callbacks import ProgressLines
from emloc.sweeps.planned_jobs import PlannedJobs


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["method=zero_shot,lora", "seed=range(3)", "lora.rank=8"], 6),
        (["seed=0"], 1),
        (["experiments=demo"], 4),
        (["experiments=demo", "method=lora"], 1),
        (["experiments=demo", "lora=glob(r?)", "seed=0,1"], 4 * 2 * 2),  # r4, r8
        (["hydra/sweeper=search", "hydra.sweeper.n_trials=7"], 7),
    ],
)
def test_the_jobs_of_a_sweep_are_counted_before_any_is_composed(words, count):
    with composed(words) as config:
        assert PlannedJobs(config).total == count


@contextmanager
def composed(words: list[str]) -> Iterator[DictConfig]:
    register(words)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra.compose_config("config", words, run_mode=RunMode.MULTIRUN)


def test_the_kinds_of_jobs_to_come_are_those_of_their_methods():
    with composed(["method=zero_shot,emloc", "compression=r75", "train=quick"]) as config:
        planned = PlannedJobs(config)
        (kind,) = planned.kinds({0})
        assert (kind.method, kind.samples) == ("emloc", 800)
        assert kind.size == "0.75 of linears at 16 bits"
        assert planned.kinds({0, 2}) == []  # job 2 is job 1 again, whose worker was killed


def test_a_cell_of_an_experiment_is_of_its_method():
    with composed(["experiments=demo_vqa", "cell=demo_vqa/lora,demo_vqa/emloc_r50"]) as config:
        kinds = PlannedJobs(config).kinds(set())
    assert [kind.method for kind in kinds] == ["lora", "emloc"]
    assert {kind.task for kind in kinds} == {"easy_vqa"}


def test_jobs_that_an_earlier_launch_finished_are_not_waited_for(tmp_path):
    words = ["seed=0,1", "method=zero_shot"]
    with composed(words) as config:
        folder = tmp_path / "runs/adhoc"
        name = next(job for job in PlannedJobs(config)._composed).hydra.sweep.subdir
        (folder / name).mkdir(parents=True)
        (folder / name / "status.json").write_text('{"state": "done", "time": 1}')
        assert len(PlannedJobs(config).kinds(set())) == 1
        (folder / name / "status.json").write_text('{"state": "failed", "time": 1}')
        assert len(PlannedJobs(config).kinds(set())) == 2


def test_of_a_search_only_the_number_of_trials_is_known():
    with composed(["hydra/sweeper=search", "hydra.sweeper.n_trials=3"]) as config:
        assert PlannedJobs(config).kinds({0}) == [None, None]


def test_a_worker_records_its_jobs_and_does_not_log(tmp_path):
    progress = ProgressLines()
    launcher = {"_target_": "x.BasicLauncher"}
    sweep = {"dir": str(tmp_path), "subdir": "run"}
    cfg = {"sweep": sweep, "sweeper": {"n_trials": 2}, "launcher": launcher, "job": {"num": 0}}
    hydra = {**cfg, "runtime": {"output_dir": str(tmp_path / "run")}}
    config = OmegaConf.create({**OmegaConf.to_container(compose()), "hydra": hydra})
    progress.on_multirun_start(config)
    (folder,) = tmp_path.iterdir()
    worker = pickle.loads(pickle.dumps(progress))
    worker.on_job_start(config)
    assert [path.name for path in folder.iterdir()] == ["run-0.json"]
    worker.on_multirun_end(config)
    assert folder.exists()
    progress.on_multirun_end(config)
    assert list(tmp_path.iterdir()) == []


class Callbacks:
    """Callbacks of Hydra that remember the results of jobs."""

    def __init__(self) -> None:
        self.ended: list[JobStatus] = []

    def on_job_end(self, config: object, job_return: JobReturn) -> None:
        self.ended.append(job_return.status)


@pytest.fixture
def joblib(monkeypatch):
    """Our launcher of worker processes, whose jobs cannot start."""

    def launch(*_: object) -> None:
        raise NotADirectoryError(20, "Not a directory", "/runs/demo/run")

    monkeypatch.setattr(emloc_sweeps.JoblibLauncher, "launch", launch)
    launcher = emloc_sweeps.Joblib.__new__(emloc_sweeps.Joblib)
    launcher.config, launcher.hydra_context = None, SimpleNamespace(callbacks=Callbacks())
    return launcher


def test_a_worker_that_cannot_start_its_job_fails_this_job_alone(joblib, caplog, monkeypatch):
    (returned,) = joblib.launch([["seed=1"]], 0)
    assert returned.return_value is None
    assert joblib.hydra_context.callbacks.ended == [JobStatus.FAILED]
    assert "seed=1: could not start: /runs/demo/run: Not a directory; " in caplog.text
    again = []
    monkeypatch.setattr(
        "emloc.sweeps.lost_jobs.launch_again",
        lambda *arguments: again.append(arguments) or ["each"],
    )
    assert joblib.launch([["seed=1"], ["seed=2"]], 0) == ["each"]
    assert again[0][1] == [["seed=1"], ["seed=2"]]


def test_a_failure_without_a_record_is_counted_at_the_end_of_a_sweep(joblib, monkeypatch):
    failed = JobReturn(["seed=1"], status=JobStatus.FAILED, _return_value=OSError("full"))
    monkeypatch.setattr(emloc_sweeps.JoblibLauncher, "launch", lambda *_: [failed])
    (returned,) = joblib.launch([["seed=1"]], 0)
    assert (returned.status, returned.return_value) == (JobStatus.COMPLETED, None)
    assert joblib.hydra_context.callbacks.ended == [JobStatus.FAILED]
