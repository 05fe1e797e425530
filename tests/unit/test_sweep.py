"""What a sweep knows of itself."""

import pickle

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from emloc.config.compose import register
from emloc.config.paths import CONF
from emloc.sweeps.callbacks import Progress, cells_of


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["method=zero_shot,lora", "seed=range(3)", "lora.rank=8"], 6),
        (["seed=0"], 1),
        (["experiments=demo"], 5),
        (["experiments=demo", "method=lora"], 1),
        (["experiments=demo", "lora=glob(r?)", "seed=0,1"], 5 * 2 * 2),  # r4, r8
        (["hydra/sweeper=search", "hydra.sweeper.n_trials=7"], 7),
    ],
)
def test_the_cells_of_a_sweep_are_counted_before_any_is_composed(words, count):
    register(words)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("config", words, run_mode=RunMode.MULTIRUN)
        assert cells_of(config) == count


def test_a_worker_has_the_tally_and_does_not_speak(tmp_path):
    progress = Progress()
    launcher = {"_target_": "x.BasicLauncher"}
    sweep = {"dir": str(tmp_path), "subdir": "run"}
    cfg = {"sweep": sweep, "sweeper": {"n_trials": 2}, "launcher": launcher, "job": {"num": 0}}
    config = OmegaConf.create({"hydra": {**cfg, "runtime": {"output_dir": str(tmp_path / "run")}}})
    progress.on_multirun_start(config)
    (folder,) = tmp_path.iterdir()
    worker = pickle.loads(pickle.dumps(progress))
    worker.on_job_start(config)
    assert [path.name for path in folder.iterdir()] == ["run-0.json"]
    worker.on_multirun_end(config)
    assert folder.exists()
    progress.on_multirun_end(config)
    assert list(tmp_path.iterdir()) == []
