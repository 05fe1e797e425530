"""Every experiment that is shipped, as its name on the command line would compose it."""

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
    """One of those whose words differ in their numbers alone."""
    cells = OmegaConf.load(path).get("cells", {})
    shapes = {f"{path.stem}/{name}": re.sub(r"\d+", "0", words) for name, words in cells.items()}
    compose([f"experiments={path.stem}"])  # which registers it, and what it sweeps
    known = ConfigStore.instance().repo["experiments"][path.name].node
    params = OmegaConf.select(known, "hydra.sweeper.params") or {}
    sweeps = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    seen = set()
    for sweep in sweeps:
        for value in sweep.sweep_string_iterator():
            shape = shapes.get(value, value)
            if shape in seen:
                continue
            seen.add(shape)
            override = f"{sweep.get_key_element()}={value}"
            cell = build(compose([f"experiments={path.stem}", override]))
            assert cell.name == path.stem
            if sweep.get_key_element() == "method":
                assert cell.method == value
