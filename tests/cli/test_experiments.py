"""Every experiment file of the repository composes to valid runs."""

import re

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from emloc.config.compose import compose
from emloc.config.paths import EXPERIMENTS
from emloc.stages.run_config import build


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_cell_of_every_experiment_builds(path):
    """Each swept value is in one of the built runs, which are as few as the longest sweep is long.

    Of cells that differ only in numbers, one is built.
    """
    cells = OmegaConf.load(path).get("cells", {})
    shapes = {f"{path.stem}/{name}": re.sub(r"\d+", "0", words) for name, words in cells.items()}
    compose([f"experiments={path.stem}"])  # registers the experiment and its sweep
    node = ConfigStore.instance().repo["experiments"][path.name].node
    params = OmegaConf.select(node, "hydra.sweeper.params") or {}
    sweeps = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    values = {
        sweep.get_key_element(): list(
            {shapes.get(value, value): value for value in sweep.sweep_string_iterator()}.values()
        )
        for sweep in sweeps
    }
    for turn in range(max(map(len, values.values()))):
        chosen = {key: some[turn % len(some)] for key, some in values.items()}
        words = [f"{key}={value}" for key, value in chosen.items()]
        run_config = build(compose([f"experiments={path.stem}", *words]))
        assert run_config.name == path.stem
        assert run_config.method == chosen.get("method", run_config.method)
