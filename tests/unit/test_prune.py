"""Structured pruning: prunable units, their scores, the selection, and the pruned model."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import precision_of
from safetensors.torch import load_file
from tiny import (
    TINY_INTERNVL,
    image_batch,
    save_checkpoint,
    tiny_internvl,
    tiny_llama,
    tiny_tokenizer,
)
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from emloc.calibration.samples import Samples
from emloc.config.settings import Compression
from emloc.data.collate import IGNORE
from emloc.data.examples import Example, Examples
from emloc.emulators import BuildInputs
from emloc.emulators.prune import Prune
from emloc.emulators.prune.unit_scores import UnitMask, importance, recompute_blocks
from emloc.emulators.prune.units import units_of
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.objectives.answer_loss import install_answer_loss
from emloc.models.objectives.tokens import Tokens
from emloc.tensors.linalg.prune import (
    ATTENTION,
    MLP,
    UnitGroup,
    keep_best,
    keep_evenly,
    minimum_parameters,
)

CPU = torch.device("cpu")
IDS = torch.arange(120).reshape(4, 30) + 5


def prune(**changes) -> Prune:
    settings = {"importance": "random", "spread": "global", "first": 0, "last": 0, "seed": 0}
    return Prune(**(settings | changes))


def qwen2(tokenizer) -> Qwen2ForCausalLM:
    """Return a random Qwen2 with two blocks and non-zero biases on q, k and v."""
    sizes = tiny_llama(tokenizer).config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = Qwen2Config(**{name: sizes[name] for name in (*names, *heads)})
        model = Qwen2ForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def source(request, tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny_tokenizer(True)
    model = tiny_llama(tokenizer) if request.param == "llama" else qwen2(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(folder, request.param, "0", torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Source:
    return Source(save_checkpoint(tmp_path_factory.mktemp("model")), "tiny", "0", torch.float64)


def layers_of(source) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in source.linears.items() if name.endswith("_proj")}


def samples(count=5) -> Samples:
    rows = tuple(Example(str(i), f"{i} + {i}?", f"it is {2 * i}") for i in range(count))
    return Samples(Examples("sums", rows), 512)


def built_emulator(folder, source, emulator, ratio=0.5, bits=16, of="linears"):
    """Build an emulator in `folder` and return its facts and its model."""
    plan = emulator.plan(source, layers_of(source), Compression(ratio, of, bits))
    build_inputs = BuildInputs(
        plan, None, samples() if emulator.samples else None, precision_of(bits)
    )
    facts = emulator.build(folder, source, build_inputs, device=CPU)
    return facts, emulator.open(folder, source, CPU, precision=precision_of(bits))


# Which units are kept -----------------------------------------------------------------------------


@st.composite
def grouped(draw):
    """Draw groups of both kinds, scores, and a budget of at least one unit of each group."""
    groups, scores = {}, {}
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from([ATTENTION, MLP]))
        group = UnitGroup(kind, draw(st.integers(1, 12)), draw(st.integers(1, 30)))
        # Few different values, so that some scores are equal.
        values = draw(st.lists(st.integers(-5, 5), min_size=group.count, max_size=group.count))
        groups[str(index)] = group
        scores[str(index)] = torch.tensor(values, dtype=torch.float32)
    whole = sum(group.count * group.size for group in groups.values())
    return groups, scores, draw(st.integers(minimum_parameters(groups), whole))


def size(groups, kept_units) -> int:
    return sum(len(kept_units[name]) * group.size for name, group in groups.items())


@given(grouped())
def test_keep_best_fills_the_budget(problem):
    groups, scores, budget = problem
    kept_units = keep_best(groups, scores, budget)
    assert size(groups, kept_units) <= budget
    for name, group in groups.items():
        assert len(kept_units[name]) >= 1
        assert kept_units[name].tolist() == sorted(set(kept_units[name].tolist()))
        assert kept_units[name].dtype == torch.int64
        assert 0 <= int(kept_units[name][0]) <= int(kept_units[name][-1]) < group.count
        if len(kept_units[name]) < group.count:
            assert size(groups, kept_units) + group.size > budget


@given(grouped())
def test_in_each_group_kept_units_score_at_least_as_high_as_dropped_ones(problem):
    groups, scores, budget = problem
    for keep in (keep_best, keep_evenly):
        for name, units in keep(groups, scores, budget).items():
            out = [i for i in range(groups[name].count) if i not in units.tolist()]
            if out:
                assert scores[name][out].max() <= scores[name][units].min()


@given(grouped(), st.integers(1, 50))
def test_keep_evenly_with_a_larger_budget_keeps_all_earlier_units(problem, more):
    groups, scores, budget = problem
    small, large = (keep_evenly(groups, scores, one) for one in (budget, budget + more))
    assert all(set(small[name].tolist()) <= set(large[name].tolist()) for name in groups)


@given(grouped())
def test_keep_evenly_uses_the_counts_of_loram_with_the_largest_share_that_fits(problem):
    """An exact share gives all counts, and the next larger share exceeds the budget."""
    groups, scores, budget = problem
    kept_units = keep_evenly(groups, scores, budget)
    assert size(groups, kept_units) <= budget

    def counts(step, steps):
        unit_counts = {}
        for name, group in groups.items():
            p = step * group.count
            up = group.count - (group.count * (steps - step)) // steps
            unit_counts[name] = max(1, up if group.kind == ATTENTION else p // steps)
        return unit_counts

    steps = 2 * math.lcm(*(group.count for group in groups.values()))
    sizes = [
        sum(n * groups[name].size for name, n in counts(step, steps).items())
        for step in range(1, steps + 1)
    ]
    assert sizes == sorted(sizes)
    best = max(step for step, one in enumerate(sizes, 1) if one <= budget)
    assert {name: len(units) for name, units in kept_units.items()} == counts(best, steps)


def test_scores_of_attention_and_mlp_are_standardised_before_ranking():
    """Scaling and shifting the scores of one kind changes nothing."""
    groups = {"a": UnitGroup(ATTENTION, 3, 10), "m": UnitGroup(MLP, 3, 10)}
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "m": torch.tensor([4e3, 1e3, 2e3])}
    kept_units = keep_best(groups, scores, 30)
    assert {name: units.tolist() for name, units in kept_units.items()} == {
        "a": [2],
        "m": [0, 2],
    } or {name: units.tolist() for name, units in kept_units.items()} == {"a": [1, 2], "m": [0]}
    larger = {"a": scores["a"] * 1e6 + 7, "m": scores["m"]}
    again = keep_best(groups, larger, 30)
    assert all(torch.equal(kept_units[name], again[name]) for name in groups)


def test_a_budget_below_one_unit_of_each_group_is_refused():
    groups = {"a": UnitGroup(ATTENTION, 3, 10), "m": UnitGroup(MLP, 3, 7)}
    scores = {name: torch.zeros(3) for name in groups}
    for keep in (keep_best, keep_evenly):
        assert [len(units) for units in keep(groups, scores, 17).values()] == [1, 1]
        with pytest.raises(ValueError, match="one unit of each group has 17 parameters, not 16"):
            keep(groups, scores, 16)


# Which units there are ----------------------------------------------------------------------------


def test_a_unit_is_an_mlp_neuron_or_a_key_value_head_with_its_query_heads(source):
    units = units_of(source, layers_of(source), 0, 0)
    assert list(units) == [
        f"model.layers.{i}.{module}" for i in (0, 1) for module in ("self_attn", "mlp")
    ]
    attention, mlp = units["model.layers.1.self_attn"], units["model.layers.1.mlp"]
    # The head dimension is 8, with two query heads for each key/value head.
    assert (attention.kind, attention.count) == (ATTENTION, 2)
    assert attention.size == 32 * (16 + 8 + 8 + 16)
    assert [*attention.rows.values(), *attention.columns.values()] == [16, 8, 8, 16]
    assert (mlp.kind, mlp.count, mlp.size) == (MLP, 64, 3 * 32)
    total = sum(m * n for m, n in layers_of(source).values())
    assert sum(one.count * one.size for one in units.values()) == total


def test_outer_blocks_and_partly_compressed_modules_have_no_units(source):
    layers = layers_of(source)
    assert {name.split(".")[2] for name in units_of(source, layers, 1, 0)} == {"1"}
    assert {name.split(".")[2] for name in units_of(source, layers, 0, 1)} == {"0"}
    assert units_of(source, layers, 1, 1) == {}
    assert units_of(source, layers, 4, 2) == {}
    some = {name for name in layers if not name.endswith("layers.0.mlp.down_proj")}
    assert "model.layers.0.mlp" not in units_of(source, some, 0, 0)
    assert "model.layers.0.self_attn" in units_of(source, some, 0, 0)


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("internvl")
    tiny_internvl().save_pretrained(folder)
    return Source(folder, "internvl", "0", torch.float32, AutoModelForImageTextToText)


def in_both_halves(source) -> dict[str, tuple[int, int]]:
    halves = ("model.language_model.layers.", "model.vision_tower.encoder.layer.")
    return {name: shape for name, shape in source.linears.items() if name.startswith(halves)}


def test_only_the_mlps_of_a_vision_tower_are_pruned(vision, caplog):
    assert TINY_INTERNVL["vision_config"]["intermediate_size"] == 24
    units = units_of(vision, in_both_halves(vision), 1, 0)
    assert set(units) == {
        *(f"model.vision_tower.encoder.layer.{i}.mlp" for i in (0, 1)),
        *(f"model.language_model.layers.1.{module}" for module in ("self_attn", "mlp")),
    }
    tower = units["model.vision_tower.encoder.layer.0.mlp"]
    assert (tower.count, tower.size) == (24, 2 * 16)
    with caplog.at_level("INFO"):
        plan = prune().plan(vision, in_both_halves(vision), Compression(0.6, "linears", 16))
    total = sum(m * n for m, n in in_both_halves(vision).values())
    assert plan["parameters"] == int(0.6 * total)
    assert "model.vision_tower.encoder.layer.*.attention.q_proj (2)" in caplog.text
    assert "mlp" not in caplog.text


def test_vision_tower_and_language_model_are_pruned(tmp_path, vision):
    emulator, layers = prune(), in_both_halves(vision)
    build_inputs = BuildInputs(
        emulator.plan(vision, layers, Compression(0.6, "linears", 16)), None, None, None
    )
    facts = emulator.build(tmp_path, vision, build_inputs, device=CPU)
    model = emulator.open(tmp_path, vision, CPU)
    assert facts["parameters"] == sum(one.numel() for one in model.parameters())
    assert 0.55 < facts["share_of_linears"] <= 0.6
    assert facts["whole"]["model.vision_tower.encoder.layer.*.attention.k_proj"] == 2
    twin = with_zeroed_units(emulator, tmp_path, vision)
    with torch.no_grad():
        actual, expected = (one(**image_batch()).logits for one in (model, twin))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# The smaller model --------------------------------------------------------------------------------


def with_zeroed_units(emulator, folder, source):
    """Return the original model with zeros in the columns that read pruned units."""
    model = source.load(CPU)
    for layer in source.linears:
        _, columns = emulator.kept_indices(folder, layer)
        if columns is not None:
            weight = model.get_submodule(layer).weight
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[columns] = False
            weight.data[:, gone] = 0
    return model


@pytest.mark.parametrize("spread", ["global", "layer"])
@pytest.mark.parametrize("importance", ["upop", "taylor", "random"])
def test_the_pruned_model_equals_the_original_with_zeroed_units(
    tmp_path, source, importance, spread
):
    """Biases of removed rows are removed; biases of outputs stay."""
    emulator = prune(importance=importance, spread=spread)
    facts, model = built_emulator(tmp_path, source, emulator)
    twin = with_zeroed_units(emulator, tmp_path, source)
    with torch.no_grad():
        actual, expected = (one(input_ids=IDS).logits for one in (model, twin))
        original = source.load(CPU)(input_ids=IDS).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert float((actual - original).norm()) > 0.01 * float(original.norm())
    assert facts["parameters"] == sum(one.numel() for one in model.parameters())
    assert facts["bytes"] == 4 * facts["parameters"]
    assert 0.45 < facts["share_of_linears"] <= 0.5


def test_the_emulator_stores_indices_scores_and_one_line_per_layer(tmp_path, source):
    emulator = prune(importance="upop")
    built_emulator(tmp_path, source, emulator)
    table = json.loads((tmp_path / "layers.json").read_text())
    scores = load_file(tmp_path / "scores.safetensors")
    for layer, (out, into) in layers_of(source).items():
        rows, columns = emulator.kept_indices(tmp_path, layer)
        kept_shape = [out if rows is None else len(rows), into if columns is None else len(columns)]
        line = table[layer]
        assert line["shape"] == kept_shape
        cuts_rows = not layer.endswith(("down_proj", "o_proj"))
        if line["kept"] < line["of"]:
            assert (rows is None, columns is None) == (not cuts_rows, cuts_rows)
        assert line["kept"] / line["of"] == (
            kept_shape[0] / out if cuts_rows else kept_shape[1] / into
        )
        assert scores[layer.rpartition(".")[0]].shape == (line["of"],)
    assert emulator.kept_indices(tmp_path, "lm_head") == (None, None)
    assert emulator.residual(tmp_path, source, "model.layers.0.mlp.up_proj") is None


def test_a_share_of_the_model_counts_uncompressed_parameters(tmp_path, source):
    facts, _ = built_emulator(tmp_path, source, prune(), 0.7, of="model")
    assert 0.69 < facts["share_of_model"] <= 0.7


def test_a_larger_ratio_keeps_more_parameters(tmp_path, source):
    shares = []
    for ratio in (0.3, 0.5, 0.7):
        folder = tmp_path / str(ratio)
        folder.mkdir()
        facts, _ = built_emulator(folder, source, prune(spread="layer"), ratio)
        shares.append(facts["parameters"])
    assert shares == sorted(set(shares))


# How much a unit matters --------------------------------------------------------------------------


def text_batches() -> list[dict[str, torch.Tensor]]:
    """Return batches whose labels are the second half of each row."""
    batches = []
    for ids in (IDS, IDS[:1].flip(1)):
        labels = ids.clone()
        labels[:, :14] = IGNORE
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def answers(batches) -> int:
    return sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)


def part_of_the_loss(model, batch, batches) -> torch.Tensor:
    """Return the summed loss of a batch, divided by the answer tokens of all batches.

    The loss of transformers would be in float32.
    """
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    return functional.cross_entropy(logits, labels, reduction="sum") / answers(batches)


def in_float64(source):
    """Load the model in float64, with norms that do not round to float32."""
    model = source.load(CPU)
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.forward = partial(
                functional.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return model


def mean_loss(model, batches) -> float:
    with torch.no_grad():
        return sum(float(part_of_the_loss(model, batch, batches)) for batch in batches)


def test_the_upop_score_is_minus_the_derivative_of_the_loss_by_the_mask(llama):
    """Compared with central differences in float64, for all heads and some neurons."""
    units = units_of(llama, layers_of(llama), 0, 0)
    scores = importance(in_float64(llama), text_batches(), units, "upop", Tokens())
    for name, one in units.items():
        ((layer, size),) = one.columns.items()
        assert scores[name].dtype == torch.float64
        for unit in range(0, one.count, 1 if one.kind == ATTENTION else 13):
            losses = []
            for mask in (1 + 1e-5, 1 - 1e-5):
                model = in_float64(llama)
                weight = model.get_submodule(layer).weight.data
                weight[:, unit * size : (unit + 1) * size] *= mask
                losses.append(mean_loss(model, text_batches()))
            slope = (losses[0] - losses[1]) / 2e-5
            assert float(scores[name][unit]) == pytest.approx(-slope, abs=1e-9, rel=1e-6)


def test_upop_prunes_the_units_with_the_lowest_scores(tmp_path, source):
    emulator = prune(importance="upop", spread="layer")
    built_emulator(tmp_path, source, emulator)
    batches = samples().training_batches(source)
    units = units_of(source, layers_of(source), 0, 0)
    model = source.load(CPU)
    name = "model.layers.0.mlp"
    rows, _ = emulator.kept_indices(tmp_path, f"{name}.up_proj")
    gradient = -importance(model, batches, units, "upop", Tokens())[name]
    gone = [unit for unit in range(64) if unit not in rows.tolist()]
    assert gradient[gone].min() >= gradient[rows].max()


def test_the_taylor_score_of_one_batch_is_the_gradient_times_the_weights(llama):
    units = units_of(llama, layers_of(llama), 0, 0)
    (batch, *_) = text_batches()
    scores = importance(llama.load(CPU), [batch], units, "taylor", Tokens())
    for name, summed in by_autograd(llama, [batch], units).items():
        torch.testing.assert_close(scores[name], summed, atol=1e-14, rtol=1e-10)


def test_taylor_scores_of_several_batches_are_summed(llama):
    units = units_of(llama, layers_of(llama), 0, 0)
    scores = importance(llama.load(CPU), text_batches(), units, "taylor", Tokens())
    for name, summed in by_autograd(llama, text_batches(), units).items():
        # The model's norms round to float32.
        torch.testing.assert_close(scores[name], summed, atol=1e-14, rtol=1e-6)


def by_autograd(source, batches, units) -> dict[str, torch.Tensor]:
    """Sum |w dL/dw| of each unit, with gradients of all weights at once."""
    model = source.load(CPU).requires_grad_(True)
    scores = {name: torch.zeros(one.count, dtype=torch.float64) for name, one in units.items()}
    for batch in batches:
        model.zero_grad()
        part_of_the_loss(model, batch, batches).backward()
        for name, one in units.items():
            for dim, sizes in enumerate((one.rows, one.columns)):
                for layer, size in sizes.items():
                    weight = model.get_submodule(layer).weight
                    each = (weight * weight.grad).detach().abs().sum(1 - dim)
                    scores[name] += each.reshape(-1, size).sum(1)
    return scores


@pytest.mark.parametrize("kind", ["upop", "taylor"])
def test_recomputed_blocks_and_the_lean_loss_give_the_same_scores(source, kind):
    units = units_of(source, layers_of(source), 0, 0)
    plain = importance(source.load(CPU), text_batches(), units, kind, Tokens())
    model = source.load(CPU)
    loss = install_answer_loss(model)
    assert loss is not None
    recompute_blocks(model)
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    again = importance(model, text_batches(), units, kind, Tokens(), loss)
    assert len(runs) == 2 * len(text_batches())  # each block runs again in the backward pass
    for name in units:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-4)


def test_scoring_leaves_the_model_unchanged(source):
    model = source.load(CPU)
    units = units_of(source, layers_of(source), 0, 0)
    before = model(input_ids=IDS).logits
    for kind in ("upop", "taylor"):
        importance(model, text_batches(), units, kind, Tokens())
    after = model(input_ids=IDS).logits
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert not any(one.requires_grad or one.grad is not None for one in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("kind", ["upop", "taylor"])
def test_scores_do_not_underflow_with_many_answer_tokens(llama, kind):
    """With float16 gradients would vanish for so many tokens, and all scores would be 0."""
    many = [{key: one.repeat(1, 8) for key, one in batch.items()} for batch in text_batches()] * 8
    units = units_of(llama, layers_of(llama), 0, 0)
    scores = []
    for dtype in (torch.float32, torch.float16):
        model = replace(llama, dtype=dtype).load(CPU)
        scores.append(importance(model, many, units, kind, Tokens()))
    for name, exact in scores[0].items():
        together = torch.corrcoef(torch.stack([exact, scores[1][name].float()]))[0, 1]
        assert together > 0.99, name


def test_attention_with_a_fixed_number_of_heads_is_not_pruned():
    """StableLM, for example, splits by a number of heads that pruning cannot change."""
    shape = {
        "model_type": "stablelm",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    source = Source(None, "stable", "0", torch.float32, shape=shape, seed=0)
    kinds = {one.kind for one in units_of(source, layers_of(source), 0, 0).values()}
    assert kinds == {MLP}


def test_a_seed_without_random_importance_is_refused():
    with pytest.raises(
        ConfigError, match=r"emulator\.seed=3 has .* emulator\.importance=random only"
    ):
        prune(importance="taylor", seed=3)


def test_scores_are_float32_sums_for_a_model_of_16_bits(source):
    half = replace(source, dtype=torch.bfloat16)
    units = units_of(half, layers_of(half), 0, 0)
    for kind in ("upop", "taylor"):
        wide = importance(source.load(CPU), text_batches(), units, kind, Tokens())
        scores = importance(half.load(CPU), text_batches(), units, kind, Tokens())
        for name in units:
            assert scores[name].dtype == torch.float32
            assert float((scores[name] - wide[name]).norm()) < 0.15 * float(wide[name].norm())


def test_a_mask_of_ones_is_the_identity():
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 6, dtype=torch.float64)
    y = UnitMask.apply(x, mask)
    assert torch.equal(y, x)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)
    expected = (x * upstream).detach().view(15, 2, 3).sum((0, 2))
    torch.testing.assert_close(mask.grad, expected)


def test_random_scores_depend_on_the_seed_alone(tmp_path, source):
    scores = []
    for index, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(index)
        folder.mkdir()
        built_emulator(folder, source, prune(seed=seed), bits=16 if index else 4)
        scores.append(load_file(folder / "scores.safetensors")["model.layers.1.mlp"])
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_labels_of_scoring_are_the_answer_tokens(source):
    """Only answers have labels; the last label is the end token."""
    tokenizer = source.tokenizer()
    labelled_texts = set()
    for batch in samples(9).training_batches(source):
        assert set(batch) >= {"input_ids", "attention_mask", "labels", "logits_to_keep"}
        for labels in batch["labels"]:
            labelled_texts.add(tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=True))
    assert labelled_texts == {f"it is {2 * i}" for i in range(9)}


def test_all_tokens_of_running_text_are_labels(source):
    rows = Samples(Examples("text", (Example("0", "", "some words"),)), 512)
    (batch,) = rows.training_batches(source)
    assert int((batch["labels"] != IGNORE).sum()) >= len("some words")


# What cannot be right -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"importance": "act"},
            "emulator.importance=act is none of upop, taylor, random; set ",
        ),
        (
            {"spread": "block"},
            "emulator.spread=block is none of global, layer; set emulator.spread=",
        ),
        ({"first": -1}, "emulator.first must be at least 0, got -1; set emulator.first=0"),
        ({"last": -2}, "emulator.last must be at least 0, got -2; set emulator.last=0"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_valid_value(changes, message):
    with pytest.raises(ConfigError) as caught:
        prune(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["upop", "taylor"])
def test_a_module_that_no_sample_reaches_is_refused(vision, kind):
    """Text without images does not reach the vision tower."""
    model = vision.load(CPU)
    units = units_of(vision, in_both_halves(vision), 0, 0)
    message = (
        r"model.vision_tower.encoder.layer.0.mlp: no calibration sample runs through it.*"
        r"set emulator.importance=random"
    )
    with pytest.raises(ConfigError, match=message):
        importance(model, text_batches(), units, kind, Tokens())
    images = image_batch()
    learnt = [images | {"labels": images["input_ids"]}]
    scores = importance(model, learnt, units, kind, Tokens())
    assert all(float(one.abs().sum()) > 0 for one in scores.values())


def test_gradients_that_are_not_finite_are_refused(source):
    model = source.load(CPU)
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("nan")
    units = units_of(source, layers_of(source), 0, 0)
    with pytest.raises(ConfigError, match="gradients of the calibration loss are not finite"):
        importance(model, text_batches(), units, "upop", Tokens())


@pytest.mark.parametrize("of", ["linears", "model"])
@pytest.mark.parametrize("emulator", [prune(), prune(last=1, spread="layer")], ids=str)
def test_a_too_small_ratio_is_refused_with_the_smallest_valid_ratio(tmp_path, source, emulator, of):
    def plan(ratio):
        return emulator.plan(source, layers_of(source), Compression(ratio, of, 16))

    with pytest.raises(ConfigError) as caught:
        plan(0.0001 if of == "linears" else 0.49)
    message = str(caught.value)
    assert "\n" not in message
    assert ("or emulator.first=0 emulator.last=0" in message) == (emulator.last == 1)
    ratio = float(message.partition("set compression.ratio=")[2].split()[0].rstrip(","))
    with pytest.raises(ConfigError, match=f"set compression.ratio={ratio:g} or more"):
        plan(round(ratio - 2e-4, 4))
    facts = emulator.build(tmp_path, source, BuildInputs(plan(ratio), None, None, None), device=CPU)
    table = json.loads((tmp_path / "layers.json").read_text())
    attention = {line["kept"] for name, line in table.items() if line.get("unit") == ATTENTION}
    assert attention == {1}
    share = facts["share_of_linears" if of == "linears" else "share_of_model"]
    assert ratio - 0.01 < share <= ratio
