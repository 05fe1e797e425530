"""Families of transformers: weights, blocks and whole runs, on the models of `families`."""

import json
import re
from functools import cache
from itertools import groupby

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from staged import losses_of
from tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import emloc
from emloc.calibration.blockwise import by_block, iterate_checkpoint
from emloc.config.compose import compose
from emloc.config.settings import Compression
from emloc.cost.plan.gpus import find_gpu
from emloc.cost.plan.layout import StepShape
from emloc.cost.plan.table import plan
from emloc.emulators.full import Full, block_linears
from emloc.emulators.layer_drop import LayerDrop
from emloc.emulators.prune import Prune
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.stages.run_config import build

CPU = torch.device("cpu")
FAMILIES = [*families.TEXT, *families.WITH_IMAGES]
# Tensors of the files on the hub that the models of today compute instead.
UNREAD = {
    "gpt_neox": ["attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"],
    "gpt2": ["attn.bias"],
}
# A name in the files on the hub that is no name of the model.
RENAMED = {
    "gpt_neox": "embed_out.weight",
    "llava_next": "language_model.model.layers.0.mlp.up_proj.weight",
    "llava_onevision": "language_model.model.layers.0.mlp.up_proj.weight",
    "mllama": "language_model.model.layers.0.mlp.up_proj.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w1.weight",
    "qwen2_5_vl": "visual.blocks.0.attn.qkv.weight",
    "qwen2_vl": "visual.blocks.0.attn.qkv.weight",
}
BUFFERS = {
    "apertus": "model.layers.1.mlp.act_fn.beta",
    "gemma4": "model.language_model.layers.1.layer_scalar",
    "gemma4_text": "model.layers.1.layer_scalar",
}
# Family -> class that most parameters of its blocks belong to.
FEW_LINEARS = {
    "gpt2": "Conv1D",
    "gpt_oss": "GptOssExperts",
    "mixtral": "MixtralExperts",
    "olmoe": "OlmoeExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
}
WITH_LINEARS = {"gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
PATTERN = r".*\.\d+\..*"


def auto_of(family: str):
    return AutoModelForCausalLM if family in families.TEXT else AutoModelForImageTextToText


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    """Function that returns a family's checkpoint, with the tensor names of the hub."""

    @cache
    def source(family: str) -> Source:
        folder = tmp_path_factory.mktemp(family)
        families.tiny_model(family).save_pretrained(folder)
        if family in UNREAD:
            file = folder / "model.safetensors"
            tensors = load_file(file)
            [(block, _)] = groupby(re.findall(r"(\w+\.\w+)\.0\.", " ".join(tensors)))
            tensors |= {f"{block}.0.{leaf}": torch.ones(4, 4) for leaf in UNREAD[family]}
            save_file(tensors, file, {"format": "pt"})
        return Source(folder, family, family, torch.float32, auto_of(family))

    return source


def block_outputs(module: nn.Module, name: str, outputs: dict[str, list[Tensor]]):
    """Record copies of the hidden states that a block returns; return the hook's handle."""

    def hook(_, args, out):
        states = out if isinstance(out, Tensor) else out[0]
        outputs.setdefault(name, []).append(states.clone())

    return module.register_forward_hook(hook, prepend=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_blocks_are_those_of_from_pretrained(source_of, family):
    """Each parameter and each saved buffer differs from its default value."""
    source, batch = source_of(family), families.batch_of(family)
    stored = load_file(source.folder / "model.safetensors")
    reference = auto_of(family).from_pretrained(source.folder, dtype=torch.float32).eval()
    state, loaded = reference.state_dict(), source.load(CPU)
    assert RENAMED.get(family) in {None, *stored} - set(state)
    assert BUFFERS.get(family) in {None, *state} - set(source.sizes)
    original = families.tiny_model(family).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], t) for name, t in loaded.state_dict().items())

    blocks = list(by_block(block_linears(source) or [n for n in state if re.match(PATTERN, n)]))
    expected, actual = {}, {}
    for name in blocks:
        block_outputs(reference.get_submodule(name), name, expected)
    with torch.no_grad():
        logits = reference(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, logits)
    for block in iterate_checkpoint(source, [batch], blocks, CPU):
        handle = block_outputs(block.module, block.name, actual)
        block.run(lambda mask: None)
        handle.remove()
    assert actual.keys() == expected.keys() == set(blocks)
    for name in blocks:
        torch.testing.assert_close(actual[name], expected[name], equal_nan=True)


def test_the_list_of_families_is_long_enough():
    models = [auto_of(family)._model_mapping[CONFIG_MAPPING[family]] for family in FAMILIES]
    assert len({model.__module__ for model in models}) >= 50


EMULATORS = {
    "emulator=svd": (Svd(algorithm="subspace", aware=True, multiple=1), 16),
    "emulator=prune": (Prune(importance="upop", spread="global", first=0, last=0, seed=0), 16),
    "compression.bits=4": (Full(), 4),
    "compression.bits=4 ": (LayerDrop(first=1, last=1), 4),
}


@pytest.mark.parametrize("subject", EMULATORS)
@pytest.mark.parametrize("family", sorted(WITH_LINEARS))
def test_blocks_with_few_linear_layers_are_refused_with_their_share(source_of, family, subject):
    source, (emulator, bits) = source_of(family), EMULATORS[subject]
    layers = {name: source.linears[name] for name in block_linears(source)}
    linear = sum(rows * columns for rows, columns in layers.values())
    total = sum(count for name, count in source.sizes.items() if re.match(PATTERN, name))
    with pytest.raises(ConfigError) as refused:
        emulator.plan(source, layers, Compression(0.5, "linears", bits))
    message = re.fullmatch(
        rf"{subject.strip()} works on linear layers, which have (\d+)% of the parameters of the "
        rf"blocks; most are in {FEW_LINEARS[family]} and would stay as they are; "
        r"set model to another.*",
        str(refused.value),
    )
    assert int(message[1]) == pytest.approx(100 * linear / total, abs=1.5)


@pytest.mark.parametrize("family", sorted(FEW_LINEARS))
def test_the_library_refuses_blocks_with_few_linear_layers(source_of, family):
    model = source_of(family).load(CPU)
    kind = FEW_LINEARS[family]
    message = (
        f"blocks consist of {kind} and have no nn.Linear layer; pass another model$"
        f"|most are in {kind} and would stay as they are; pass targets to compress these alone$"
    )
    with pytest.raises(ConfigError, match=message):
        emloc.build_emulator(model, [families.batch_of(family)], ratio=0.5)


def test_a_packed_format_or_whole_blocks_fit_any_family_in_16_bits(source_of):
    """LoRA on the original compresses nothing, so the share does not matter."""
    assert Full().plan(source_of("mixtral"), {}, Compression(0.5, "linears", 16)) is None


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture
def run_family(run_cached, source_of):
    """Function that runs the pipeline on a family of text."""

    def run(family: str, *overrides: str):
        folder = source_of(family).folder
        if not (folder / "tokenizer.json").exists():
            tiny_tokenizer(True).save_pretrained(folder)
        targets = [f"model.{key}='{PATTERN}'" for key in ("lora_targets", "emulator_targets")]
        return run_cached(f"model.source={folder}", *targets, *overrides)

    return run


@pytest.mark.parametrize("family", ["falcon"])
def test_the_whole_pipeline_runs_on_a_family_that_changes_outputs_in_place(run_family, family):
    """With fused layers, and with those of PEFT; the losses are the same."""
    settings = ("method=emloc_covariance", "compression=r50", "train.steps=3")
    fused = run_family(family, *settings)
    plain = run_family(family, *settings, "train.lean=false", "train.checkpointing=true")
    assert losses_of(fused) == pytest.approx(losses_of(plain), rel=1e-4)
    layers = json.loads((fused.recovered.folder / "layers.json").read_text())
    assert len(layers) == 8
    assert fused.evaluated.facts["scores"]["loss"] > 0


def test_no_plan_is_made_for_blocks_with_few_linear_layers(tiny, source_of):
    target = f"model.emulator_targets='{PATTERN}'"
    run_config = build(
        compose([*tiny, f"model.source={source_of('mixtral').folder}", target, "method=emloc"])
    )
    with pytest.raises(ConfigError, match=r"linear layers, which have \d+% of .*MixtralExperts"):
        plan(run_config, StepShape.of(run_config.train, 64, 8), find_gpu("rtx4090"))


def test_a_run_on_conv1d_is_refused_with_its_reason(run_family):
    message = r"its blocks consist of Conv1D and have no nn\.Linear layer.*set model to another"
    with pytest.raises(ConfigError, match=message):
        run_family("gpt2", "method=emloc")
