"""Settings that cannot work are refused in one line with the override, before any stage starts."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from composed import compose_cached
from safetensors.torch import load_file, save_file

from emloc import cli
from emloc.cost.plan.gpus import GPUS
from emloc.errors import ConfigError
from emloc.pipeline import run
from emloc.stages.run_config import build

# The shape of a language model as small as the tiny checkpoint, without weights.
SHAPE = (
    *("model=llama3_8b", "model.source=auto", "model.weights=random"),
    *("model.shape.hidden_size=32", "model.shape.intermediate_size=64"),
    *("model.shape.num_hidden_layers=2", "model.shape.num_attention_heads=4"),
    *("model.shape.num_key_value_heads=2", "model.shape.vocab_size=261"),
    *("model.shape.bos_token_id=1", "model.shape.eos_token_id=2"),
)


@pytest.fixture
def refusal(tiny, store):
    """Function that returns the message which refuses a run.

    It also checks that the message is one line and that no stage has left files.
    """

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            run(build(compose_cached([*tiny, *overrides])), store, lambda step, values: None)
        assert list(store.root.glob("*/*")) == []
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refused


@pytest.mark.parametrize("method", ["emloc", "emloc_covariance", "lora", "zero_shot"])
@pytest.mark.parametrize("ratio", ["0", "1", "-0.1", "1.5"])
def test_a_ratio_outside_0_to_1_is_refused(refusal, method, ratio):
    """For each method, also those that do not compress."""
    assert refusal(f"method={method}", f"compression.ratio={ratio}") == (
        f"compression.ratio must lie between 0 and 1, got {ratio}; set compression.ratio=0.5"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=emloc", "compression=auto"],
            r"compression=auto needs budget\.gpu_gib; set budget\.gpu_gib=24",
        ),
        (
            ["method=emloc", "compression=auto", "budget.gpu_gib=0.01"],
            r"budget\.gpu_gib=0\.01: no ratio fits; .* set budget\.gpu_gib higher, or "
            r"train\.batch or lora\.rank lower",
        ),
        (
            ["method=lora", "compression=auto", "budget.gpu_gib=0.01"],
            r"budget\.gpu_gib=0\.01: .* fit.*; set .*budget\.gpu_gib higher",
        ),
        (
            ["method=upop", "compression=auto", "budget.gpu_gib=1"],
            r"compression=auto is solved for emulator=svd and emulator=full; with others "
            r"set compression=r50",
        ),
        (
            ["method=dora", "compression=auto", "budget.gpu_gib=1"],
            r"compression=auto is solved for adapters whose update is s B A, while this adapter "
            r"sets the norm of each row .*; set adapter=lora, or compression=r50",
        ),
        (
            ["method=lora", "budget.gpu_gib=0"],
            r"budget\.gpu_gib must be above 0 or null, got 0; set budget\.gpu_gib=24",
        ),
    ],
    ids=["no budget", "too small", "too small for the whole", "pruned", "dora", "none at all"],
)
def test_a_budget_too_small_for_any_ratio_is_refused(refusal, overrides, message):
    assert re.fullmatch(message, refusal(*overrides))


@pytest.mark.parametrize(
    ("method", "key"),
    [("emloc", "emulator_targets"), ("emloc", "lora_targets"), ("lora", "lora_targets")],
)
def test_targets_without_a_matching_layer_are_refused(refusal, method, key):
    assert refusal(f"method={method}", rf"model.{key}='.*\.nothing'") == (
        rf"model.{key}='.*\\.nothing' matches no linear layer of smollm2_135m "
        f"(one of its layers is model.layers.0.self_attn.q_proj); set model.{key}"
    )


@pytest.mark.parametrize("method", ["emloc", "zero_shot"])
def test_random_weights_without_a_tokenizer_are_refused(refusal, method):
    assert refusal(*SHAPE, f"method={method}") == (
        "meta-llama/Meta-Llama-3-8B: without a checkpoint there is no tokenizer; "
        "set model.source=/path/to/checkpoint"
    )


def test_an_unknown_gpu_is_refused_with_the_list_of_gpus(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["emloc", "plan", "--gpu", "gtx970"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.USER_ERROR
    output = capsys.readouterr()
    assert output.out == ""
    names = ", ".join(GPUS)
    known = f"set --gpu to its memory, such as 12GiB, or to one of {names}"
    assert output.err == f"emloc: --gpu gtx970: there is no such GPU; {known}\n"


# Checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def sharded(checkpoint, tmp_path) -> Path:
    """The tiny checkpoint in two files and an index."""
    folder = shutil.copytree(checkpoint, tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    homes = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(homes.values()):
        tensors_of_file = {name: tensor for name, tensor in tensors.items() if homes[name] == file}
        save_file(tensors_of_file, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


@pytest.mark.parametrize("method", ["emloc", "lora", "zero_shot"])
def test_a_missing_shard_is_refused(refusal, sharded, method):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert refusal(f"model.source={sharded}", f"method={method}") == (
        f"{sharded}: shard model-00002-of-00002.safetensors is missing; "
        "set model.source to a complete checkpoint"
    )


@pytest.mark.parametrize("method", ["emloc", "lora", "zero_shot"])
def test_a_checkpoint_without_safetensors_is_refused(refusal, sharded, method):
    """Such as a model that is published only in another format."""
    for path in sharded.glob("*.safetensors*"):
        path.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    assert refusal(f"model.source={sharded}", f"method={method}") == (
        f"{sharded}: no model.safetensors, only pytorch_model.bin, which is not read; load it once "
        "with transformers and write it with save_pretrained, then set model.source to the new "
        "folder"
    )
