"""Second moments of a block: without padding, shared by layers with one input."""

import pytest
import torch
from tiny import save_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emloc.calibration.blockwise import iterate_checkpoint
from emloc.calibration.calibrate import linears_of, record_moments
from emloc.calibration.moments import PIECE, InputRecorder, Statistics
from emloc.calibration.padding import TokenMask
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

CPU = torch.device("cpu")
ATTENTION = [f"self_attn.{leaf}_proj" for leaf in "qkvo"]
LEAVES = [*ATTENTION, *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))]
BLOCKS = ["model.layers.0", "model.layers.1"]
LENGTHS = [7, 3, 12, 5, 9]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = save_checkpoint(tmp_path_factory.mktemp("llama"))
    return Source(folder, "llama", "llama", torch.float32)


def rows() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randint(5, 261, (length,)) for length in LENGTHS]


def batches(size: int) -> list[dict[str, Tensor]]:
    """The same samples in batches of `size`, padded on the left with a noticeable token."""
    batches_of_size = []
    for start in range(0, len(LENGTHS), size):
        some = rows()[start : start + size]
        longest = max(map(len, some))
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in some])
        ids = torch.full(mask.shape, 200)
        ids[mask.bool()] = torch.cat(some)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batches_of_size.append(
            {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        )
    return batches_of_size


def observed(source: Source, size: int = 2, whole: bool = False, leaves=LEAVES) -> list[Statistics]:
    run = iterate_checkpoint(source, batches(size), BLOCKS, CPU)
    return [
        record_moments(block, [f"{block.name}.{leaf}" for leaf in leaves], whole) for block in run
    ]


@pytest.fixture(scope="module")
def inputs(source) -> dict[str, Tensor]:
    """Layer -> all its inputs (N, n), from one ordinary forward pass per sample."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    inputs_by_layer: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs_by_layer.setdefault(name, []).append(args[0][0])
            )
    with torch.no_grad():
        for row in rows():
            model(input_ids=row[None])
    return {name: torch.cat(parts).double() for name, parts in inputs_by_layer.items()}


def close(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=0, atol=float(1e-5 * exact.abs().max()))


def test_layers_with_the_same_input_share_one_gram(source):
    for block, statistics in zip(BLOCKS, observed(source), strict=True):
        query, gate = f"{block}.self_attn.q_proj", f"{block}.mlp.gate_proj"
        own = f"{block}.self_attn.o_proj"
        assert statistics.sites == {
            **{f"{block}.self_attn.{leaf}_proj": query for leaf in "qkv"},
            own: own,
            **{f"{block}.mlp.{leaf}_proj": gate for leaf in ("gate", "up")},
        }
        assert set(statistics.inputs) == {query, own, gate}
        # The 32 outputs have the smaller Gram matrix beside 64 inputs.
        assert set(statistics.outputs) == {f"{block}.mlp.down_proj"}
        assert statistics.outputs[f"{block}.mlp.down_proj"].shape == (32, 32)


def test_grams_equal_the_sum_over_single_samples(source, inputs):
    for block, statistics in zip(BLOCKS, observed(source), strict=True):
        assert statistics.tokens == sum(LENGTHS) == 36
        for leaf in LEAVES[:-1]:
            x = inputs[f"{block}.{leaf}"]
            assert x.shape[0] == 36
            close(statistics.of(f"{block}.{leaf}")["input_gram"], x.T @ x)
        layer = f"{block}.mlp.down_proj"
        y = inputs[layer] @ source.weight(layer).double().T
        assert set(statistics.of(layer)) == {"output_gram"}
        close(statistics.of(layer)["output_gram"], y.T @ y)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_grams_do_not_depend_on_padding_and_batch_size(source, size):
    """Batches of one sample have no padding at all."""
    for one, many in zip(observed(source, 1), observed(source, size), strict=True):
        assert many.tokens == one.tokens
        assert many.sites == one.sites
        for kind in ("inputs", "outputs"):
            alone, together = getattr(one, kind), getattr(many, kind)
            assert together.keys() == alone.keys()
            for name, total in alone.items():
                close(together[name], total)


def test_outputs_added_in_chunks_are_counted_once():
    torch.manual_seed(0)
    rows, weight = torch.randn(2 * PIECE + 100, 8), torch.randn(3, 8)
    statistics = Statistics()
    statistics.add({"down": rows}, {"down": weight}, inputs_only=False)
    statistics.add({"down": rows[:50]}, {"down": weight}, inputs_only=False)
    y = torch.cat([rows, rows[:50]]).double() @ weight.double().T
    close(statistics.outputs["down"], y.T @ y)
    assert statistics.tokens == 2 * PIECE + 150


def test_whole_records_only_input_grams(source, inputs):
    for block, statistics in zip(BLOCKS, observed(source, whole=True), strict=True):
        assert statistics.outputs == {}
        assert set(statistics.sites) == {f"{block}.{leaf}" for leaf in LEAVES}
        x = inputs[f"{block}.mlp.down_proj"]
        close(statistics.of(f"{block}.mlp.down_proj")["input_gram"], x.T @ x)


def test_a_shared_input_is_named_after_its_first_layer(source):
    leaves = ["self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"]
    (first, _) = observed(source, leaves=leaves)
    key, up = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    # k and v have 16 outputs each, fewer than the 32 inputs that they share.
    assert set(first.outputs) == {key, "model.layers.0.self_attn.v_proj"}
    assert first.sites == {up: up}
    (first, _) = observed(source, leaves=leaves, whole=True)
    shared = first.sites[key]
    assert first.sites == {key: shared, "model.layers.0.self_attn.v_proj": shared, up: up}
    assert set(first.inputs) == {shared, up}


def test_saved_statistics_load_unchanged(source, tmp_path):
    for statistics in observed(source):
        statistics.save(tmp_path / "block.safetensors")
        again = Statistics.load(tmp_path / "block.safetensors")
        assert (again.sites, again.tokens) == (statistics.sites, statistics.tokens)
        for kind in ("inputs", "outputs"):
            before, after = getattr(statistics, kind), getattr(again, kind)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert all(total.dtype == torch.float64 for total in after.values())


def test_recorded_inputs_are_returned_once_without_padding():
    layers = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Linear(2, 2)}
    x = torch.arange(18.0).reshape(2, 3, 3)
    with InputRecorder(layers) as recorder:
        layers["c"](layers["a"](x) + layers["b"](x))
        got = recorder.rows(MASK)
        assert recorder.rows(MASK) == {}
    assert got["a"] is got["b"]
    assert torch.equal(got["a"], torch.cat([x[0, 1:], x[1]]))
    assert got["c"].shape == (5, 2)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


MASK = TokenMask(torch.tensor([[0, 1, 1], [1, 1, 1]]).bool())
TOKENS = torch.arange(18.0).reshape(2, 3, 3)
REAL = torch.cat([TOKENS[0, 1:], TOKENS[1]])


@pytest.mark.parametrize(
    "shaped",
    [
        TOKENS,
        TOKENS.reshape(6, 3),  # as OPT does before its MLP
        TOKENS.transpose(0, 1),
        TOKENS.reshape(2, 3, 3, 1),
    ],
    ids=["rows and positions", "flat", "positions first", "heads"],
)
def test_padding_is_found_in_any_shape_of_a_batch(shaped):
    assert torch.equal(MASK.rows("layer", shaped), REAL.reshape(-1, shaped.shape[-1]))


def test_padding_that_cannot_be_found_is_refused_with_the_layer():
    """Tokens that a router has gathered, for one, are in the order of the experts."""
    message = (
        r"block\.experts\.1: its inputs have the shape \(5, 3\), in which the padding of a batch "
        r"of 2 x 3 tokens cannot be found; set model\.emulator_targets"
    )
    gathered = TOKENS.reshape(6, 3)[:5]
    with pytest.raises(ConfigError, match=message):
        MASK.rows("block.experts.1", gathered)
    whole = TokenMask(torch.ones(2, 3).bool())
    assert torch.equal(whole.rows("block.experts.1", gathered), gathered)


def test_the_mask_is_not_that_of_another_sequence():
    """Features of an image in cross attention, as many as there are tokens by chance."""
    mask = TokenMask(MASK.is_real, others=(TOKENS,))
    assert mask.rows("layer", TOKENS).shape == (6, 3)
    assert mask.rows("layer", TOKENS.clone()).shape == (5, 3)


def test_a_layer_that_runs_twice_has_the_inputs_of_both_runs():
    layer = nn.Linear(3, 2)
    with InputRecorder({"a": layer}) as recorder:
        layer(TOKENS)
        layer(-TOKENS)
        assert torch.equal(recorder.rows(MASK)["a"], torch.cat([REAL, -REAL]))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3), "it is 0 everywhere, so the batch has no token"),
        (torch.zeros(2, 1, 3, 3), r"its shape is \(2, 1, 3, 3\), so it does not say"),
    ],
)
def test_a_mask_without_tokens_is_refused(source, mask, message):
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask}
    with pytest.raises(ConfigError, match=message):
        list(iterate_checkpoint(source, [batch], BLOCKS, CPU))


def test_hooks_are_removed_after_a_failure(source):
    run = iterate_checkpoint(source, batches(2), BLOCKS, CPU)
    block = next(run)
    linears = linears_of(block, [f"{block.name}.{leaf}" for leaf in LEAVES])
    assert len(linears) == 7

    def fail():
        with InputRecorder(linears):
            assert all(len(linear._forward_pre_hooks) == 1 for linear in linears.values())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not any(linear._forward_pre_hooks for linear in linears.values())
    run.close()
