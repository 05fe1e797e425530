"""A blockwise forward equals an ordinary forward pass, with one block in memory at a time."""

import gc
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from greenlet import greenlet
from safetensors.torch import load_file, save_file
from tiny import IMAGE_TOKEN, image_batch, save_checkpoint, tiny_internvl
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from walked import batches_of, model_and_blocks

from emloc.calibration.blockwise import block_of, by_block, iterate_blocks, iterate_checkpoint
from emloc.calibration.calibrate import record_moments
from emloc.calibration.offload import OffloadPool, StateLimits
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
KINDS = ["llama", "tied", "qwen2", "gemma3"]
BLOCKS = {"llama": 2, "tied": 2, "qwen2": 2, "gemma3": 4}


def make(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, **SIZES))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        model.save_pretrained(folder)
    elif kind == "gemma3":
        # Two kinds of attention, each with its own mask and rotary table.
        layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(
            num_hidden_layers=4, layer_types=layers, sliding_window=3, head_dim=8, **SIZES
        )
        Gemma3ForCausalLM(config).save_pretrained(folder)
    else:
        save_checkpoint(folder, tie_word_embeddings=kind == "tied")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    sources_by_kind = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        make(kind, folder)
        sources_by_kind[kind] = Source(folder, kind, kind, torch.float32)
    return sources_by_kind


def batch(lengths: list[int], seed: int) -> dict[str, Tensor]:
    """Return a batch of random tokens, padded on the left."""
    torch.manual_seed(seed)
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    return {
        "input_ids": torch.randint(5, 261, mask.shape) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


BATCHES = [batch([7, 3, 12], 1), batch([5, 5], 2), batch([9], 3)]


def names_of(kind: str) -> list[str]:
    return [f"model.layers.{i}" for i in range(BLOCKS[kind])]


def model_of(source: Source):
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()


def flat(value: object) -> list[Tensor]:
    """Return the tensors in an argument, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    return [one for item in value for one in flat(item)] if isinstance(value, list | tuple) else []


def record_calls(module: nn.Module, records: list) -> torch.utils.hooks.RemovableHandle:
    """Append all inputs and outputs of each call of a module to `records`, but no cache."""

    def hook(_, args, kwargs, out):
        recorded_kwargs = {
            k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")
        }
        records.append([tensor.clone() for tensor in flat([args, recorded_kwargs, out])])

    # Runs first, since the hook of the blockwise forward suspends the pass.
    return module.register_forward_hook(hook, with_kwargs=True, prepend=True)


def record_whole_passes(model: nn.Module, names: list[str]) -> dict[str, list]:
    """Return the inputs and outputs of each block in ordinary forward passes."""
    records = {name: [] for name in names}
    handles = [record_calls(model.get_submodule(name), records[name]) for name in names]
    with torch.no_grad():
        for one in BATCHES:
            model(**one)
    for handle in handles:
        handle.remove()
    return records


def record_blockwise(run) -> dict[str, list]:
    """Return the inputs and outputs of each block in a blockwise forward."""
    records = {}
    for block in run:
        handle = record_calls(block.module, records.setdefault(block.name, []))
        block.run(lambda _: None)
        handle.remove()
    return records


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class RecordingSource(Source):
    """A source that records the skeletons it creates."""

    skeletons: ClassVar[list] = []

    def skeleton(self):
        self.skeletons.append(super().skeleton())
        return self.skeletons[-1]


def recording_source(source: Source) -> Source:
    RecordingSource.skeletons.clear()
    return RecordingSource(source.folder, source.name, source.identity, source.dtype)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "in memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_of_each_block_equal_those_of_a_whole_pass(sources, kind, streamed):
    source, names = sources[kind], names_of(kind)
    model = model_of(source)
    expected = record_whole_passes(model, names)
    run = (
        iterate_checkpoint(source, BATCHES, names, CPU)
        if streamed
        else iterate_blocks(model, BATCHES, names, CPU)
    )
    actual = record_blockwise(run)
    assert list(actual) == names
    for name in names:
        assert len(actual[name]) == len(BATCHES)
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            # Hidden states, mask, two rotary tables, positions; and the output.
            assert len(ours) == len(theirs) >= 4
            assert all(map(torch.equal, ours, theirs))


def test_the_fixture_has_masks_and_tables_that_differ_between_layers(sources):
    names = names_of("gemma3")
    records = record_whole_passes(model_of(sources["gemma3"]), names)
    sliding, full = records[names[1]][0], records[names[2]][0]
    same = [torch.equal(a, b) for a, b in zip(sliding, full, strict=True) if a.shape == b.shape]
    assert sum(not one for one in same) >= 4  # input and output states, cosines, sines or mask


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_is_in_memory_at_a_time(sources, kind):
    source, names = recording_source(sources[kind]), names_of(kind)
    loaded_blocks = []

    def look(*_):
        model, *_ = source.skeletons  # a second skeleton is used only for its names
        loaded_blocks.append(
            [
                name
                for name in names
                if any(not p.is_meta for p in model.get_submodule(name).parameters())
            ]
        )

    for block in iterate_checkpoint(source, BATCHES, names, CPU):
        look()
        block.run(look)
        look()
    per_block = len(BATCHES) + 2
    assert loaded_blocks == [[name] for name in names for _ in range(per_block)]
    look()
    assert loaded_blocks[-1] == []
    model, *_ = source.skeletons  # a second skeleton is used only for its names
    assert model.lm_head.weight.is_meta
    assert not model.get_input_embeddings().weight.is_meta


def test_only_the_requested_blocks_are_streamed(sources):
    source, names = recording_source(sources["gemma3"]), names_of("gemma3")
    expected = record_whole_passes(model_of(source), names)
    records = record_blockwise(iterate_checkpoint(source, BATCHES, names[2:3], CPU))
    assert list(records) == names[2:3]
    for ours, theirs in zip(records[names[2]], expected[names[2]], strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_no_keys_and_values_are_kept(sources):
    """A cache would grow with each block until it is larger than the model."""
    model = model_of(sources["llama"])
    assert model.config.use_cache
    caches = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
        )
    for _ in iterate_blocks(model, BATCHES, names_of("llama"), CPU):
        pass
    assert caches == [None] * 2 * len(BATCHES)


def test_modules_after_the_last_block_never_run(sources):
    model = model_of(sources["llama"])
    names_of_run_modules = []
    for module in (model.lm_head, model.model.norm, model.model.layers[1]):
        module.register_forward_hook(
            lambda module, *_: names_of_run_modules.append(type(module).__name__)
        )
    for _ in iterate_blocks(model, BATCHES, names_of("llama")[:1], CPU):
        pass
    assert names_of_run_modules == []


def test_each_block_runs_exactly_once(sources):
    model, names = model_of(sources["llama"]), names_of("llama")
    counts = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).self_attn.register_forward_hook(
            lambda *_, name=name: counts[name].append(1)
        )
    masks = []
    for block in iterate_blocks(model, BATCHES, names, CPU):
        if block.name == names[1]:
            block.run(masks.append)
            block.run(lambda _: pytest.fail("run again"))
    assert {name: len(ones) for name, ones in counts.items()} == dict.fromkeys(names, 3)
    assert [mask.is_real.tolist() for mask in masks] == [
        one["attention_mask"].bool().tolist() for one in BATCHES
    ]


def test_batches_without_a_mask_give_none(sources):
    model = model_of(sources["llama"])
    masks = []
    for block in iterate_blocks(
        model, [{"input_ids": BATCHES[1]["input_ids"]}], names_of("llama"), CPU
    ):
        block.run(masks.append)
    assert masks == [None, None]


# Whatever happens, the model is as it was --------------------------------------------------------


@pytest.fixture
def model_checked_afterwards(sources):
    """A model; after the test the fixture checks that the model is unchanged."""
    model = model_of(sources["llama"])
    model.train()
    model.requires_grad_(True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(**BATCHES[0]).logits
    own = hooks(model)
    yield model
    assert hooks(model) == own
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.use_cache
    with torch.no_grad():
        assert torch.equal(model(**BATCHES[0]).logits, before)
    records = record_blockwise(iterate_blocks(model, BATCHES, names_of("llama"), CPU))
    assert [len(records[name]) for name in names_of("llama")] == [3, 3]


def test_the_model_is_unchanged_after_all_blocks(model_checked_afterwards):
    record_blockwise(iterate_blocks(model_checked_afterwards, BATCHES, names_of("llama"), CPU))


def test_the_model_is_unchanged_after_a_consumer_stops_early(model_checked_afterwards):
    for block in iterate_blocks(model_checked_afterwards, BATCHES, names_of("llama"), CPU):
        block.run(lambda _: None)
        assert hooks(model_checked_afterwards) > 0
        break


def test_the_model_is_unchanged_after_the_generator_is_closed_early(model_checked_afterwards):
    run = iterate_blocks(model_checked_afterwards, BATCHES, names_of("llama"), CPU)
    assert next(run).name == "model.layers.0"
    run.close()
    assert next(run, None) is None


def test_the_model_is_unchanged_after_a_consumer_fails(model_checked_afterwards):
    def consume():
        for _ in iterate_blocks(model_checked_afterwards, BATCHES, names_of("llama"), CPU):
            raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume()


def test_the_model_is_unchanged_after_a_failure_between_two_batches(model_checked_afterwards):
    def fail(_):
        raise RuntimeError("between")

    def go():
        for block in iterate_blocks(model_checked_afterwards, BATCHES, names_of("llama"), CPU):
            block.run(fail)

    with pytest.raises(RuntimeError, match="between"):
        go()


def test_the_model_is_unchanged_after_the_model_refuses_a_batch(model_checked_afterwards):
    bad = [*BATCHES, {"input_ids": torch.tensor([[999]])}]
    with pytest.raises(IndexError):
        next(iterate_blocks(model_checked_afterwards, bad, names_of("llama"), CPU))


def test_the_model_is_unchanged_after_a_block_fails(model_checked_afterwards):
    def fail(*_):
        raise ArithmeticError("in block 1")

    handle = model_checked_afterwards.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="in block 1"):
        list(iterate_blocks(model_checked_afterwards, BATCHES, names_of("llama"), CPU))
    handle.remove()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_gradient_mode_of_the_caller_is_kept(sources, enabled):
    model = model_of(sources["llama"])
    modes, outputs = [], []
    for name in names_of("llama")[:1]:
        model.get_submodule(name).mlp.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.set_grad_enabled(enabled):
        for block in iterate_blocks(model, BATCHES, names_of("llama"), CPU):
            modes.append(torch.is_grad_enabled())
            block.run(lambda _: modes.append(torch.is_grad_enabled()))
        modes.append(torch.is_grad_enabled())
    assert modes == [enabled] * (1 + 2 * (1 + len(BATCHES)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(outputs) == len(BATCHES)
    assert not any(out.requires_grad for out in outputs)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_without_a_needed_tensor_is_refused_before_anything_runs(
    sources, name, tmp_path
):
    tensors = load_file(sources["llama"].folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((sources["llama"].folder / "config.json").read_text())
    source = Source(tmp_path, "x", "x", torch.float32)
    with pytest.raises(ConfigError) as caught:
        iterate_checkpoint(source, BATCHES, names_of("llama"), CPU)
    assert (
        str(caught.value)
        == f"{tmp_path}: holds no tensor {name}; set model.source to another checkpoint"
    )


# A look ------------------------------------------------------------------------------------------


class RecordedPool(OffloadPool):
    """An offload pool that tests can inspect while passes are suspended."""

    pools: ClassVar[list] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.pools.append(self)


def in_use() -> tuple[int, int, int]:
    """Return the bytes offloaded to memory and to disk, and the bytes of all live tensors."""
    gc.collect()
    # Uses the type, since some objects fail when their class is read.
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    sizes = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    pool = RecordedPool.pools[-1]
    return pool.memory, pool.disk, sum(sizes.values())


def rounds_of(kind: str, looks: int, host_bytes: int | None, folder: Path) -> dict[str, list]:
    """Block -> masks, inputs and outputs of each peek and of the final run."""
    model, names = model_and_blocks(kind)
    rounds_by_block = {}
    for block in iterate_blocks(
        model, batches_of(kind), names, CPU, limits=StateLimits(host=host_bytes), folder=folder
    ):
        rounds = rounds_by_block.setdefault(block.name, [])
        for go in (*[block.peek] * looks, block.run):
            records, masks = [], []
            handle = record_calls(block.module, records)
            go(lambda mask, masks=masks: masks.append(mask and mask.is_real))
            handle.remove()
            rounds.append((masks, records))
    return rounds_by_block


@pytest.mark.parametrize("host_bytes", [None, 0])
@pytest.mark.parametrize("kind", ["llama", "internvl"])
def test_peeks_do_not_change_the_run_of_a_block(kind, host_bytes, tmp_path):
    alone = rounds_of(kind, 0, host_bytes, tmp_path)
    rounds_with_peeks = rounds_of(kind, 2, host_bytes, tmp_path)
    assert list(rounds_with_peeks) == list(alone)
    counts = {name: len(masks) for name, [(masks, _)] in alone.items()}
    # One batch of InternVL has no image and never reaches the blocks of the vision tower.
    assert counts == {name: 2 if "vision" in name else 3 for name in alone}
    for name, [(masks, expected)] in alone.items():
        assert len(rounds_with_peeks[name]) == 3
        for masks_then, records in rounds_with_peeks[name]:
            assert [one is None for one in masks_then] == ["vision" in name] * len(masks)
            assert all(map(torch.equal, flat(masks_then), flat(masks)))
            assert len(masks_then) == len(records) == len(expected) == len(masks)
            for ours, theirs in zip(records, expected, strict=True):
                assert len(ours) == len(theirs) >= 2
                assert all(map(torch.equal, ours, theirs))
    padded = [one["attention_mask"].bool() for one in batches_of(kind)]
    assert not all(mask.all() for mask in padded)
    assert all(map(torch.equal, rounds_with_peeks[name][0][0], padded))


@pytest.mark.parametrize("host_bytes", [None, 0])
@pytest.mark.parametrize("kind", ["llama", "internvl"])
def test_a_peek_keeps_no_tensors(kind, host_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("emloc.calibration.blockwise.OffloadPool", RecordedPool)
    model, names = model_and_blocks(kind)
    batches = batches_of(kind)
    for block in iterate_blocks(
        model, batches, names, CPU, limits=StateLimits(host=host_bytes), folder=tmp_path
    ):
        before = in_use()
        assert before[2] > 0
        assert (before[1] > 0) == (host_bytes == 0)
        block.peek(lambda _: None)
        block.peek(lambda _: None)
        assert in_use() == before
    assert in_use()[:2] == (0, 0)


def test_the_model_is_unchanged_after_a_peek_fails(model_checked_afterwards):
    def fail(_):
        raise RuntimeError("looking")

    def go():
        for block in iterate_blocks(model_checked_afterwards, BATCHES, names_of("llama"), CPU):
            block.peek(fail)

    with pytest.raises(RuntimeError, match="looking"):
        go()


def test_a_blockwise_forward_works_within_a_greenlet(sources):
    model, names = model_of(sources["llama"]), names_of("llama")

    def go():
        counts = []
        for block in iterate_blocks(model, BATCHES, names, CPU):
            block.peek(lambda _: counts.append("look"))
            block.run(lambda _: counts.append("run"))
        return counts

    assert greenlet(go).switch() == (["look"] * 3 + ["run"] * 3) * 2


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("model.layers.12", "model.layers.12"),
        ("h.0.attn.c_attn", "h.0"),
        ("model.vision_tower.layers.1.blocks.2.fc1", "model.vision_tower.layers.1"),
    ],
)
def test_the_block_of_a_name_ends_at_its_first_number(name, block):
    assert block_of(name) == block


@pytest.mark.parametrize("name", ["lm_head", "model.norm2.weight", "3.mlp"])
def test_a_name_without_a_number_is_in_no_block(name):
    with pytest.raises(ConfigError, match=f"{name} lies in no numbered block"):
        block_of(name)


def test_layers_by_block_keep_their_order():
    names = ["m.1.b", "m.0.a", "m.1.a", "m.10.a"]
    assert by_block(names) == {"m.1": ["m.1.b", "m.1.a"], "m.0": ["m.0.a"], "m.10": ["m.10.a"]}


def test_blocks_run_in_the_order_of_the_model(sources):
    """Names come in the order of a file; no block may be skipped."""
    model, names = model_of(sources["llama"]), names_of("llama")
    reached = []
    for block in iterate_blocks(model, BATCHES, sorted(names, reverse=True), CPU):
        masks = []
        block.run(masks.append)
        reached.append((block.name, len(masks)))
    assert reached == [(name, len(BATCHES)) for name in names]


def test_a_block_missing_in_the_model_is_refused(sources):
    model = model_of(sources["llama"])
    with pytest.raises(ValueError, match=r"the model has no block model\.layers\.99"):
        next(iterate_blocks(model, BATCHES, [*names_of("llama"), "model.layers.99"], CPU))


# Images ------------------------------------------------------------------------------------------


def mixed(ones: list[int]) -> dict[str, Tensor]:
    """Return two rows of 17 tokens, padded on the left, each with an image of 17 patches."""
    ids = torch.arange(34).reshape(2, 17) + 10
    ids[:, 8:12] = IMAGE_TOKEN
    mask = torch.tensor([[0] * (17 - n) + [1] * n for n in ones])
    return {**image_batch(), "input_ids": ids, "attention_mask": mask}


def inputs_of(model: nn.Module, batch: dict[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """Layer -> its input (batch, length, n) in an ordinary forward pass."""
    inputs_by_layer = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs_by_layer.update({name: args[0]})
        )
        for name in layers
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return inputs_by_layer


def test_padding_is_left_out_but_image_patches_are_not():
    model, batch = tiny_internvl(), mixed([17, 11])
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = by_block(name for name in names if ".layer" in name)
    vision = [name for name in layers if "vision_tower" in name]
    assert (len(vision), len(layers)) == (2, 4)
    inputs = inputs_of(model, batch, [name for group in layers.values() for name in group])
    mask = batch["attention_mask"].bool()
    visited = []
    for block in iterate_blocks(model, [batch], list(layers), CPU):
        statistics = record_moments(block, layers[block.name], inputs_only=True)
        visited.append(block.name)
        for name in layers[block.name]:
            assert inputs[name].shape[:2] == mask.shape  # patches and tokens have the same shape
            rows = inputs[name].flatten(0, 1) if block.name in vision else inputs[name][mask]
            assert len(rows) == statistics.tokens == (34 if block.name in vision else 28)
            expected = rows.double().T @ rows.double()
            torch.testing.assert_close(
                statistics.of(name)["input_gram"], expected, rtol=1e-5, atol=1e-6
            )
    assert visited == list(layers)


def test_blocks_of_image_patches_get_no_mask():
    model, batches = tiny_internvl(), [mixed([17, 11]), mixed([9, 17])]
    names = [f"model.vision_tower.encoder.layer.{i}" for i in range(2)]
    names += [f"model.language_model.layers.{i}" for i in range(2)]
    masks = {name: [] for name in names}
    for block in iterate_blocks(model, batches, names, CPU):
        block.peek(masks[block.name].append)
        block.run(masks[block.name].append)
    assert all(masks[name] == [None] * 4 for name in names[:2])
    for name in names[2:]:
        for mask, batch in zip(masks[name], batches * 2, strict=True):
            assert torch.equal(mask.is_real, batch["attention_mask"].bool())
