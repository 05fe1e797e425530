"""Second moments of a block: of its tokens only, shared where the input is, however batched."""

import pytest
import torch
from tiny import save_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emloc.calibration.blockwise import iterate_checkpoint
from emloc.calibration.calibrate import linears_of, record_moments
from emloc.calibration.moments import PIECE, InputRecorder, Statistics
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
    """The same samples, `size` at a time, padded on the left with a token that would be seen."""
    made = []
    for start in range(0, len(LENGTHS), size):
        some = rows()[start : start + size]
        longest = max(map(len, some))
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in some])
        ids = torch.full(mask.shape, 200)
        ids[mask.bool()] = torch.cat(some)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        made.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    return made


def observed(source: Source, size: int = 2, whole: bool = False, leaves=LEAVES) -> list[Statistics]:
    run = iterate_checkpoint(source, batches(size), BLOCKS, CPU)
    return [
        record_moments(block, [f"{block.name}.{leaf}" for leaf in leaves], whole) for block in run
    ]


@pytest.fixture(scope="module")
def inputs(source) -> dict[str, Tensor]:
    """Layer -> all it takes (N, n), from one ordinary forward pass for each sample."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    taken: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: taken.setdefault(name, []).append(args[0][0])
            )
    with torch.no_grad():
        for row in rows():
            model(input_ids=row[None])
    return {name: torch.cat(parts).double() for name, parts in taken.items()}


def close(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=0, atol=float(1e-5 * exact.abs().max()))


def test_layers_fed_by_one_tensor_share_one_gram(source):
    for block, found in zip(BLOCKS, observed(source), strict=True):
        query, gate = f"{block}.self_attn.q_proj", f"{block}.mlp.gate_proj"
        own = f"{block}.self_attn.o_proj"
        assert found.sites == {
            **{f"{block}.self_attn.{leaf}_proj": query for leaf in "qkv"},
            own: own,
            **{f"{block}.mlp.{leaf}_proj": gate for leaf in ("gate", "up")},
        }
        assert set(found.inputs) == {query, own, gate}
        # Outputs of 32 are the smaller matrix beside inputs of 64.
        assert set(found.outputs) == {f"{block}.mlp.down_proj"}
        assert found.outputs[f"{block}.mlp.down_proj"].shape == (32, 32)


def test_grams_are_those_of_the_samples_one_by_one(source, inputs):
    for block, found in zip(BLOCKS, observed(source), strict=True):
        assert found.tokens == sum(LENGTHS) == 36
        for leaf in LEAVES[:-1]:
            x = inputs[f"{block}.{leaf}"]
            assert x.shape[0] == 36
            close(found.of(f"{block}.{leaf}")["input_gram"], x.T @ x)
        layer = f"{block}.mlp.down_proj"
        y = inputs[layer] @ source.weight(layer).double().T
        assert set(found.of(layer)) == {"output_gram"}
        close(found.of(layer)["output_gram"], y.T @ y)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_neither_padding_nor_the_size_of_a_batch_enters(source, size):
    """One sample at a time has no padding at all."""
    for one, many in zip(observed(source, 1), observed(source, size), strict=True):
        assert many.tokens == one.tokens
        assert many.sites == one.sites
        for kind in ("inputs", "outputs"):
            alone, together = getattr(one, kind), getattr(many, kind)
            assert together.keys() == alone.keys()
            for name, total in alone.items():
                close(together[name], total)


def test_outputs_formed_in_pieces_are_counted_once_each():
    torch.manual_seed(0)
    rows, weight = torch.randn(2 * PIECE + 100, 8), torch.randn(3, 8)
    found = Statistics()
    found.add({"down": rows}, {"down": weight}, whole=False)
    found.add({"down": rows[:50]}, {"down": weight}, whole=False)
    y = torch.cat([rows, rows[:50]]).double() @ weight.double().T
    close(found.outputs["down"], y.T @ y)
    assert found.tokens == 2 * PIECE + 150


def test_whole_gives_input_grams_alone(source, inputs):
    for block, found in zip(BLOCKS, observed(source, whole=True), strict=True):
        assert found.outputs == {}
        assert set(found.sites) == {f"{block}.{leaf}" for leaf in LEAVES}
        x = inputs[f"{block}.mlp.down_proj"]
        close(found.of(f"{block}.mlp.down_proj")["input_gram"], x.T @ x)


def test_a_site_is_called_after_the_first_layer_that_is_observed(source):
    leaves = ["self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"]
    (first, _) = observed(source, leaves=leaves)
    key, up = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    # k and v give 16 each: their outputs are smaller than the input of 32 they share.
    assert set(first.outputs) == {key, "model.layers.0.self_attn.v_proj"}
    assert first.sites == {up: up}
    (first, _) = observed(source, leaves=leaves, whole=True)
    shared = first.sites[key]
    assert first.sites == {key: shared, "model.layers.0.self_attn.v_proj": shared, up: up}
    assert set(first.inputs) == {shared, up}


def test_save_and_load_give_the_same(source, tmp_path):
    for found in observed(source):
        found.save(tmp_path / "block.safetensors")
        again = Statistics.load(tmp_path / "block.safetensors")
        assert (again.sites, again.tokens) == (found.sites, found.tokens)
        for kind in ("inputs", "outputs"):
            before, after = getattr(found, kind), getattr(again, kind)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert all(total.dtype == torch.float64 for total in after.values())


def test_what_was_taken_is_given_once_and_padding_is_left_out():
    layers = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Linear(2, 2)}
    x = torch.arange(18.0).reshape(2, 3, 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    with InputRecorder(layers) as taken:
        layers["c"](layers["a"](x) + layers["b"](x))
        got = taken.rows(mask)
        assert taken.rows(mask) == {}
        layers["a"](x[0])
        flat = taken.rows(mask)
    assert got["a"] is got["b"]
    assert torch.equal(got["a"], torch.cat([x[0, 1:], x[1]]))
    assert got["c"].shape == (5, 2)
    # Not the mask's shape: these are tokens already.
    assert torch.equal(flat["a"], x[0])
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_hooks_are_gone_after_a_failure(source):
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
