"""The whole state of a model is read: persistent buffers as well as parameters, in every path."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from emloc.adapters.fold import merge
from emloc.adapters.saved import SavedLora
from emloc.calibration.blockwise import iterate_checkpoint
from emloc.emulators.full import load_quantized
from emloc.emulators.layer_drop import IdentityBlock
from emloc.emulators.offload import load_streamed
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision.nf4 import Nf4
from emloc.tensors.linalg.correct import LoraPair
from emloc.tensors.nn.factorized import Factorized

CPU = torch.device("cpu")
IDS = torch.arange(20).reshape(2, 10) + 5
BLOCKS = ["model.layers.0", "model.layers.1"]
SCALARS = [f"{block}.layer_scalar" for block in BLOCKS]
LAYER = "model.layers.1.mlp.up_proj"


def move_off_defaults(model: PreTrainedModel) -> PreTrainedModel:
    """Add noise to all floating-point parameters and persistent buffers."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Gemma 4, which multiplies the output of each block by a buffer."""
    folder = tmp_path_factory.mktemp("gemma4")
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
    )
    move_off_defaults(Gemma4ForCausalLM(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def source(folder) -> Source:
    return Source(folder, "tiny", "identity", torch.float32)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def original(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_has_the_buffers_of_the_files(folder, dtype):
    ours = Source(folder, "tiny", "identity", dtype).load(CPU)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {float(ours.get_buffer(name)) for name in SCALARS}.isdisjoint({1.0})
    for name, tensor in other.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(ours.state_dict()[name], tensor)
    assert torch.equal(logits(ours), logits(other))


def test_a_blockwise_forward_reads_the_buffers_of_each_block(source, original):
    expected: dict[str, Tensor] = {}
    hooks = [
        original.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: expected.__setitem__(name, output)
        )
        for name in BLOCKS
    ]
    logits(original)
    for hook in hooks:
        hook.remove()
    outputs: list[Tensor] = []
    for block in iterate_checkpoint(source, [{"input_ids": IDS}], BLOCKS, CPU):
        block.module.register_forward_hook(lambda *values: outputs.append(values[-1]))
        block.peek(lambda mask: None)
        assert torch.equal(outputs.pop(), expected[block.name])


@pytest.mark.parametrize(
    "load",
    [
        lambda source: load_streamed(source, (), CPU),
        lambda source: load_quantized(source, [], CPU, None),
        lambda source: source.load(
            CPU, {LAYER: Factorized(torch.eye(48), source.weight(LAYER), None)}
        ),
    ],
    ids=["offload", "full", "factorised layer"],
)
def test_an_emulator_keeps_the_buffers_of_the_original(source, original, load):
    torch.testing.assert_close(logits(load(source)), logits(original), atol=1e-5, rtol=0)


def test_a_packed_emulator_keeps_the_buffers_of_the_original(source):
    precision = Nf4(name="nf4", bits=4)
    for model in (
        load_quantized(source, [LAYER], CPU, precision),
        load_streamed(source, [LAYER], CPU, precision),
    ):
        assert [float(model.get_buffer(name)) for name in SCALARS] == [
            float(value) for _, value in source.read(SCALARS)
        ]


def test_buffers_of_dropped_blocks_are_not_read(source):
    model = source.load(CPU, {BLOCKS[0]: IdentityBlock("full_attention")})
    assert SCALARS[0] not in model.state_dict()
    assert (
        model.get_buffer(SCALARS[1]) == load_file(source.folder / "model.safetensors")[SCALARS[1]]
    )


def test_a_merged_checkpoint_keeps_the_buffers(source, original, tmp_path):
    pair = LoraPair(torch.randn(3, 32), torch.randn(48, 3), 0.5)
    target = merge(source, SavedLora({LAYER: pair}, {}), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    expected = copy.deepcopy(original)
    expected.get_submodule(LAYER).weight.data += pair.scale * pair.b @ pair.a
    torch.testing.assert_close(logits(merged), logits(expected), atol=1e-5, rtol=0)


def test_a_missing_buffer_is_named(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    del tensors[SCALARS[1]]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    source = Source(tmp_path, "tiny", "identity", torch.float32)
    reads = [
        lambda: source.load(CPU),
        lambda: iterate_checkpoint(source, [], BLOCKS, CPU),
        lambda: load_streamed(source, (), CPU),
    ]
    for read in reads:
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value) == (
            f"{tmp_path}: holds no tensor {SCALARS[1]}; set model.source to another checkpoint"
        )


def test_random_weights_leave_the_buffers_of_a_new_model(folder):
    shape = json.loads((folder / "config.json").read_text())
    source = Source(None, "tiny", "random", torch.float32, shape=shape, seed=0)
    assert [float(source.load(CPU).get_buffer(name)) for name in SCALARS] == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_model_that_keeps_parameters_in_float32_keeps_them(dtype, tmp_path):
    """The router's correction of DeepSeek is kept in float32, and its experts are stored apart."""
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    move_off_defaults(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    source = Source(tmp_path, "tiny", "identity", dtype)
    ours = source.load(CPU).state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {
        name: tensor.dtype for name, tensor in other.items()
    }
    assert all(torch.equal(ours[name], tensor) for name, tensor in other.items())
    assert ours[source.buffers[0]].dtype == torch.float32
    assert not any(".experts.0." in name for name in ours)
