"""method=small_model is LoRA on the smaller checkpoint, and does not use the larger one."""

import json
from functools import partial

import pytest
import torch
from composed import compose_cached
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny import save_checkpoint

from emloc.config.run_folder import folder_name
from emloc.errors import ConfigError
from emloc.pipeline import run
from emloc.stages.merge_run import merge_run
from emloc.stages.run_config import build


@pytest.fixture(scope="session")
def small(made_once):
    """Folder with a narrower model of one layer."""
    overrides = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 48}
    return made_once("small", partial(save_checkpoint, **overrides))


@pytest.fixture
def pair(tiny, small):
    """Overrides of a tiny run whose model has a sibling of half its size."""
    model = compose_cached(tiny).model
    own = OmegaConf.to_container(model) | {
        "name": "small",
        "id": "somebody/small",
        "source": str(small),
    }
    own.pop("siblings", None)
    own["shape"] = {}
    values = [f"{key}={_quoted(value)}" for key, value in own.items()]
    return [*tiny, *(f"++model.siblings.r50.{value}" for value in values)]


def _quoted(value):
    if isinstance(value, dict):
        return "{}"
    return "null" if value is None else f"'{value}'" if isinstance(value, str) else value


@pytest.fixture
def run_cached(stages):
    def run_with(*overrides: str):
        return run(build(compose_cached([*overrides])), stages, lambda step, values: None)

    return run_with


def test_small_model_equals_lora_on_the_sibling(run_cached, pair, tiny, small):
    result = run_cached(*pair, "method=small_model")
    alone = run_cached(*tiny, "method=lora", f"model.source={small}", "model.id=somebody/small")
    assert result.evaluated.facts["scores"] == alone.evaluated.facts["scores"]
    assert result.trained.facts["trainable"] == alone.trained.facts["trainable"]
    tensors = load_file(result.recovered.folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    assert tensors[f"{q}_A.weight"].shape == (4, 16)
    assert tensors[f"{q}_B.weight"].shape == (16, 4)
    config = json.loads((result.recovered.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/small"
    facts = result.emulated.facts
    weights = load_file(small / "model.safetensors")
    assert facts["model"] == "somebody/small"
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_small_model_has_another_run_folder_than_lora(pair):
    names = [
        folder_name(compose_cached([*pair, f"method={one}"])) for one in ("lora", "small_model")
    ]
    assert names[0].rpartition("-")[2] != names[1].rpartition("-")[2]


def test_small_model_in_four_bits_equals_qlora_on_the_sibling(run_cached, pair):
    result = run_cached(*pair, "method=small_model", "compression.bits=4")
    assert result.emulated.facts["bits"] == 4
    layers = json.loads((result.emulated.folder / "layers.json").read_text())
    assert len(layers) == 7


def test_a_run_is_merged_into_the_sibling(run_cached, pair, small, tmp_path):
    result = run_cached(*pair, "method=small_model", "train.learning_rate=0.05")
    folder = tmp_path / "run"
    cfg = compose_cached([*pair, "method=small_model"])
    folder.mkdir()
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    (folder / "adapter").symlink_to(result.recovered.folder / "adapter")
    merged = load_file(merge_run(folder, tmp_path / "merged") / "model.safetensors")
    own = load_file(small / "model.safetensors")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in own.items()}
    changed = {name for name in own if not torch.equal(own[name], merged[name])}
    assert len(changed) == 7


def test_models_of_the_package_have_siblings():
    run_config = build(compose_cached(["model=internvl2_5_8b", "method=small_model"]))
    names = {choice: one.name for choice, one in run_config.model.siblings.items()}
    assert names == {"r50": "internvl2_5_4b", "r25": "internvl2_5_2b"}
    for choice, name in names.items():
        alone = build(compose_cached([f"model={name}", "method=lora"])).model
        assert run_config.model.siblings[choice] == alone
        ratio = int(choice[1:]) / 100
        chosen = build(
            compose_cached(
                ["model=internvl2_5_8b", "method=small_model", f"compression.ratio={ratio}"]
            )
        )
        assert chosen.emulator.model(chosen.model, chosen.compression) == alone
    moved = ["model=internvl2_5_8b", "method=small_model", "model.siblings.r25.source=/elsewhere"]
    assert build(compose_cached(moved)).model.siblings["r25"].source == "/elsewhere"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=qwen2_5_7b"],
            "emulator=sibling: qwen2_5_7b names no smaller checkpoint of its family; set model to "
            "one with siblings, such as model=internvl2_5_8b, or emulator=full",
        ),
        (
            ["model=internvl2_5_8b", "compression=r75"],
            "emulator=sibling: compression.ratio=0.75 selects r75, but internvl2_5_8b has only "
            "r50, r25; set compression=r50",
        ),
        (
            ["model=internvl2_5_8b", "compression=auto", "budget.gpu_gib=24"],
            "emulator=sibling: compression=auto has no ratio to choose a smaller checkpoint by; "
            "internvl2_5_8b has r50, r25; set compression=r50",
        ),
    ],
    ids=["none", "none of this share", "auto"],
)
def test_a_missing_sibling_is_refused(overrides, message):
    run_config = build(compose_cached(["method=small_model", *overrides]))
    with pytest.raises(ConfigError) as refused:
        run_config.emulator.model(run_config.model, run_config.compression)
    assert str(refused.value) == message
