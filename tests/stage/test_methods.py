"""Every method in whole runs on text, and every emulator in four bits."""

import json
from functools import partial

import pytest
from composed import compose_cached
from tiny import save_checkpoint

from emloc.adapters.saved import read_adapter
from emloc.config.paths import CONF
from emloc.errors import ConfigError
from emloc.pipeline import run
from emloc.stages.run_config import build

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
# Settings of methods that a model of eight blocks with two key/value heads each needs.
ROOM = {
    "offsite": ["compression=r75"],
    "loram_stru": ["emulator.first=1", "emulator.last=1", "compression=r75"],
    "loram_rand": ["emulator.first=1", "emulator.last=1", "compression=r75"],
    "upop": ["compression=r75"],
    "svd_llm": ["calibration.samples=6"],
}
# One method per emulator.
IN_NF4 = ["emloc", "lora", "offload", "offsite", "small_model", "upop"]


@pytest.fixture(scope="session")
def family(made_once):
    """Overrides that select a model of eight blocks with a smaller sibling of four blocks."""
    folders = [
        made_once(f"blocks_{depth}", partial(save_checkpoint, num_hidden_layers=depth))
        for depth in (8, 4)
    ]
    sibling = {
        "_target_": "emloc.models.text.TextModel",
        "name": "tiny_sibling",
        "id": "tiny/sibling",
        "revision": None,
        "source": str(folders[1]),
        "wheel": None,
        "dtype": "float32",
        "max_length": 2048,
        "lora_targets": r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        "emulator_targets": r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    }
    return folders, sibling


@pytest.fixture
def run_cached(tiny, stages, family):
    folders, sibling = family

    def run_with(*overrides: str):
        cfg = compose_cached([*tiny, f"model.source={folders[0]}", "compression=r50", *overrides])
        cfg.model.siblings = {"r50": sibling, "r75": sibling}
        return run(build(cfg), stages, lambda step, values: None)

    return run_with


@pytest.mark.parametrize("bits", [16, 4])
def test_an_emulator_with_one_v_for_each_input_runs_as_any(run_cached, bits):
    result = run_cached("method=emloc", "emulator.shared=inputs", f"compression.bits={bits}")
    assert 0 < result.evaluated.facts["scores"]["loss"] < 10
    assert 0.4 < result.emulated.facts["share_of_linears"] <= 0.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_settings_to_scores(run_cached, method):
    result = run_cached(f"method={method}", *ROOM.get(method, []))
    scores = result.evaluated.facts["scores"]
    assert 0 < scores["loss"] < 10
    lines = (result.evaluated.folder / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"test/{i}" for i in range(6)]
    if method == "zero_shot":
        assert result.trained is None
        return
    facts = result.emulated.facts
    assert facts["bytes"] > 0
    assert 0 < facts["share_of_model"] <= 1
    assert result.trained.facts["step_seconds"] > 0
    adapter = read_adapter(result.recovered.folder / "adapter")
    assert adapter.recovered is not None
    depth = 4 if method == "small_model" else 8
    shapes = {name: tuple(pair.delta.shape) for name, pair in adapter.pairs.items()}
    assert len(shapes) == 7 * (4 if method == "offsite" else depth)
    for name, shape in shapes.items():  # the shapes of the original, for each emulator
        assert shape == SHAPES[name.rpartition(".")[2]]


SHAPES = {
    **dict.fromkeys(("q_proj", "o_proj"), (32, 32)),
    **dict.fromkeys(("k_proj", "v_proj"), (16, 32)),
    **dict.fromkeys(("gate_proj", "up_proj"), (64, 32)),
    "down_proj": (32, 64),
}


def test_an_emulator_without_layers_to_adapt_is_refused(run_cached):
    """Two blocks are trained at each end, but lora_targets selects layers between them."""
    middle = r"model.lora_targets='model\.layers\.[345]\.mlp\.\w+_proj'"
    with pytest.raises(ConfigError, match="matches none of the layers that the emulator leaves"):
        run_cached("method=offsite", *ROOM["offsite"], middle)


def test_calibration_rows_are_recorded_by_each_stage_that_reads_them(run_cached):
    result = run_cached("method=qlora", "recovery=correction_covariance")
    assert len(result.samples) == 6
    assert result.stages["evaluate_as_trained"] is result.as_trained


@pytest.mark.parametrize("method", IN_NF4)
def test_every_emulator_can_be_trained_in_four_bits(run_cached, method):
    whole = run_cached(f"method={method}", *ROOM.get(method, []))
    packed = run_cached(f"method={method}", *ROOM.get(method, []), "compression.bits=4")
    assert packed.emulated.facts["bits"] == 4
    assert packed.emulated.facts["bytes"] < whole.emulated.facts["bytes"]
    assert packed.as_trained is not None
    assert whole.as_trained is None
    assert packed.evaluated.facts["scores"] != whole.evaluated.facts["scores"]
