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
    """Build one run of each group of cells that differ only in numbers."""
    cells = OmegaConf.load(path).get("cells", {})
    shapes = {f"{path.stem}/{name}": re.sub(r"\d+", "0", words) for name, words in cells.items()}
    compose([f"experiments={path.stem}"])  # registers the experiment and its sweep
    node = ConfigStore.instance().repo["experiments"][path.name].node
    params = OmegaConf.select(node, "hydra.sweeper.params") or {}
    sweeps = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    built_shapes = set()
    for sweep in sweeps:
        for value in sweep.sweep_string_iterator():
            shape = shapes.get(value, value)
            if shape in built_shapes:
                continue
            built_shapes.add(shape)
            override = f"{sweep.get_key_element()}={value}"
            run_config = build(compose([f"experiments={path.stem}", override]))
            assert run_config.name == path.stem
            if sweep.get_key_element() == "method":
                assert run_config.method == value
