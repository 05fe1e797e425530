"""What is planned is what is held: weights, adapter, a step; and what a budget has room for."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from composed import compose_cached
from packed import FIVE_BITS, precision_of
from tiny import linears, save_checkpoint

from emloc.adapters.fused import fuse
from emloc.adapters.lora import Lora
from emloc.anchors.none import NoAnchor
from emloc.config.paths import CONF
from emloc.config.run_folder import folder_name
from emloc.cost.expected_memory import planned_peak
from emloc.cost.plan.advice import Machine, advice, settings_of
from emloc.cost.plan.anchors import anchor_plan, with_offsets
from emloc.cost.plan.cost import cost_of
from emloc.cost.plan.fit import RESERVE, WORKSPACE, layout_of, need_of, solve_compression
from emloc.cost.plan.gains import Trained, measured_gain
from emloc.cost.plan.gpus import GPUS, find_gpu
from emloc.cost.plan.here import disk_gib, host_gib
from emloc.cost.plan.layout import StepShape
from emloc.cost.plan.rows import Planner
from emloc.cost.plan.solve import longest_step
from emloc.cost.plan.sweep import plan_sweep, planned_run, repeated_seconds
from emloc.cost.plan.table import HEADER, plan
from emloc.cost.plan.trace import trace
from emloc.emulators import BuildInputs
from emloc.emulators.full import Full
from emloc.emulators.offload import Offload
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.pipeline import run
from emloc.precision.nf4 import Nf4Linear
from emloc.runtime.memory import GIB
from emloc.runtime.stage_cache import Store
from emloc.stages.run_config import build
from emloc.tensors.lean.embedding import HostEmbedding
from emloc.tensors.lean.model import offload_embedding
from emloc.tensors.nn.factorized import PackedFactorized

CPU = torch.device("cpu")
PLAIN_SVD = Svd(algorithm="eigen", aware=False, multiple=1, sequential=False, allocation="uniform")
MIB = 2**20
SMALL = (
    *("hidden_size=64", "intermediate_size=96", "num_hidden_layers=2", "vocab_size=300"),
    *("num_attention_heads=4", "num_key_value_heads=2", "bos_token_id=null", "eos_token_id=null"),
)
# Large enough for a budget to tell ratios from each other; nothing of it ever exists.
MIDDLE = (
    *("hidden_size=2048", "intermediate_size=5632", "num_hidden_layers=6", "vocab_size=32000"),
    *("num_attention_heads=16", "num_key_value_heads=4", "bos_token_id=1", "eos_token_id=2"),
)
# Parameters of the matrices of its blocks.
MATRICES = 6 * 2048 * (2 * 2048 + 2 * 512 + 3 * 5632)
WORK = StepShape(length=512, batch=2, answer=64, checkpointing=True, host_activations=False)
# A checkpoint of which a part more or less can be told in a budget, most of which is WORKSPACE.
WIDE = {"hidden_size": 256, "intermediate_size": 512}
BUDGETS_MIB = (71.2, 78)
HELD = [
    *((None, 16, "none"), (None, 4, "none"), (0.5, 16, "none"), (0.5, 4, "none")),
    *((0.5, 16, "inputs"), (0.5, 4, "inputs")),
]
NAMES = ["lora", "qlora", "emloc", "emloc_nf4", "emloc_shared", "emloc_nf4_shared"]


def cell_of(shape, *overrides, model="llama3_8b"):
    shape = tuple(f"model.shape.{one}" for one in shape)
    return build(compose_cached([f"model={model}", "tracker=none", "lora=r4", *shape, *overrides]))


def shaped(run_config):
    return run_config.model.shape_source()


def opened(run_config, ratio, bits, folder):
    """The model of a layout as the pipeline opens it, on a CPU; factors by a plain SVD."""
    source = run_config.model.open()
    chosen = replace(run_config.compression, ratio=ratio or 0.5, bits=bits)
    shared = getattr(run_config.emulator, "shared", "none")
    emulator = Full() if ratio is None else replace(PLAIN_SVD, shared=shared)
    ranks = emulator.plan(source, run_config.model.compressible_layers(source), chosen)
    emulator.build(folder, source, BuildInputs(ranks, None, None, precision_of(bits)), device=CPU)
    return emulator.open(folder, source, CPU, precision=precision_of(bits))


def held_bytes(model):
    """Of the frozen weights, four-bit scales included, the rows of a host embedding not."""
    total = sum(one.nbytes for one in model.parameters())
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            total += module.matrix.nbytes - module.weight.nbytes
    factorised = [module for module in model.modules() if isinstance(module, PackedFactorized)]
    total += sum(module.ut.nbytes for module in factorised)
    return total + sum({module.v_id: module.v.nbytes for module in factorised}.values())


# Weights and adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "bits", "shared"), HELD, ids=NAMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model", ["llama3_8b", "qwen2_5_7b"])
def test_weights_are_the_bytes_that_an_opened_model_holds(
    tmp_path, model, tied, ratio, bits, shared
):
    said = (
        *("model.weights=random", f"model.shape.tie_word_embeddings={str(tied).lower()}"),
        f"emulator.shared={shared}",
    )
    run_config = cell_of(SMALL, *said, model=model)
    layout = layout_of(run_config, shaped(run_config), ratio, precision_of(bits))
    found = opened(run_config, ratio, bits, tmp_path)
    before = held_bytes(found)
    freed = offload_embedding(found)
    assert layout.embedding == freed == (0 if tied else 300 * 64 * 2)
    assert isinstance(found.get_input_embeddings(), HostEmbedding) != tied
    assert layout.weights == held_bytes(found) == before - freed
    assert layout.weights >= layout.uncompressed


@pytest.mark.parametrize(("ratio", "bits", "shared"), HELD, ids=NAMES)
def test_the_adapter_is_its_parameters_moments_and_copies(tmp_path, ratio, bits, shared):
    run_config = cell_of(SMALL, "model.weights=random", f"emulator.shared={shared}")
    layout = layout_of(run_config, shaped(run_config), ratio, precision_of(bits))

    def storages(model, lows=()):
        tensors = [*model.parameters(), *lows]
        return sum(
            {(s := one.untyped_storage()).data_ptr(): s.nbytes() for one in tensors}.values()
        )

    model = opened(run_config, ratio, bits, tmp_path)
    before = storages(model)
    tuned = Lora().attach(model, run_config.lora, linears(model, run_config.model.lora_targets))
    assert fuse(tuned) == 14
    layers = [m for m in tuned.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    # The operands of all layers that read the same input.
    shared = {id(one): one for one in (layer.forward.func.__self__ for layer in layers)}
    lows = [low for one in shared.values() for low in one.layers.loras]
    assert len(lows) == 14
    copies = storages(tuned, [t for low in lows for t in (low.down, low.up)]) - before
    trained = [one for one in tuned.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for one in trained:
        one.grad = torch.zeros_like(one)
    optimizer.step()
    state = (t for one in optimizer.state.values() for t in one.values())
    moments = sum(t.nbytes for t in state if t.dim() == 2)
    assert layout.parameters == sum(one.numel() for one in trained)
    need = need_of(layout, WORK)
    assert need.adapter == copies + moments
    assert need.opening == copies + layout.embedding
    again = need_of(layout, replace(WORK, accumulate=4))
    assert again.adapter == need.adapter + 4 * layout.parameters


def test_room_for_four_bit_matrices_is_that_of_the_largest():
    run_config = cell_of(SMALL, "emulator.shared=none")
    assert layout_of(run_config, shaped(run_config), 0.5, None).scratch == 0
    assert layout_of(run_config, shaped(run_config), None, precision_of(4)).scratch == 64 * 96 * 2
    # Ranks 16 (64 x 64), 10 (32 x 64) and 19 (64 x 96) with 4 of the adapter, in eights. Query,
    # key and value are stacked.
    assert (
        layout_of(run_config, shaped(run_config), 0.5, precision_of(4)).scratch
        == (24 + 16 + 16) * 64 * 2
    )
    # With one v for each input the ranks are 21 and 24, and 12 and 8 rows of the adapter are below.
    joint = cell_of(SMALL, "emulator.shared=inputs")
    assert layout_of(joint, shaped(joint), 0.5, precision_of(4)).scratch == (24 + 8) * 96 * 2
    targets = r"model.lora_targets='model\.layers\.\d+\.self_attn\.k_proj'"
    few = cell_of(SMALL, "emulator.shared=none", targets)
    # The adapted one (32, 64), and beside it the largest without an adapter.
    assert layout_of(few, shaped(few), None, precision_of(4)).scratch == (32 * 64 + 64 * 96) * 2
    assert layout_of(few, shaped(few), 0.5, precision_of(4)).scratch == (16 * 64 + 19 * 96) * 2


@pytest.mark.parametrize("model", sorted(path.stem for path in CONF.glob("model/[!_]*.yaml")))
def test_every_model_can_be_planned_without_its_weights(model):
    run_config = build(compose_cached([f"model={model}", "model.dtype=bfloat16", "tracker=none"]))
    source = shaped(run_config)
    whole = layout_of(run_config, source, None, None)
    parameters = sum(source.sizes.values())
    assert whole.weights + whole.embedding == 2 * parameters
    four, half = (
        layout_of(run_config, source, *one).weights
        for one in ((None, precision_of(4)), (0.5, None))
    )
    linears = sum(rows * columns for rows, columns in whole.compressed.values())
    # Half of 2 bytes each; the ranks of a layer 88 wide are rounded down by up to a 44th.
    assert half - whole.uncompressed == pytest.approx(linears, rel=0.015)
    assert 0.5 * linears < four < whole.weights
    packed = layout_of(run_config, source, 0.5, precision_of(4)).weights - whole.uncompressed
    assert packed == pytest.approx((0.5 + 1 / 64) * linears / 2, rel=0.015)


def test_a_ratio_of_the_model_is_one_of_the_model():
    run_config = cell_of(MIDDLE, "compression.of=model")
    layout = layout_of(run_config, shaped(run_config), 0.6, None)
    total = 2 * sum(layout.source.sizes.values())
    assert layout.weights + layout.embedding == pytest.approx(0.6 * total, rel=0.002)


# One step -----------------------------------------------------------------------------------------


def test_a_trace_counts_what_a_graph_keeps_and_lets_go_of():
    x = torch.empty(MIB // 4, device="meta", requires_grad=True)

    def saving():
        y = x.exp().exp()  # both results are kept for the backward pass
        assert y.nbytes == MIB
        return y

    assert trace(saving).peak == 2 * MIB

    def dropping():
        with torch.no_grad():
            for _ in range(5):
                x.exp()

    assert trace(dropping).peak == MIB
    assert trace(dropping).operations == 5
    assert trace(lambda: x.detach().view(2, -1)).peak == 0  # the same storage
    assert trace(lambda: torch.empty(3, device="meta")).peak == 512
    rows = torch.empty(4, MIB // 16, device="meta")
    assert trace(lambda: rows.logsumexp(-1)).peak == MIB  # its kernel writes exp(rows)


@pytest.mark.parametrize("ratio", [None, 0.5], ids=["whole", "factors"])
def test_a_recomputed_block_keeps_one_hidden_state_and_on_the_host_none(ratio):
    source = shaped(cell_of(MIDDLE))
    layout = layout_of(cell_of(MIDDLE), source, ratio, None)
    state = WORK.batch * WORK.length * 2048 * 2
    assert state >= MIB  # smaller ones stay on the device

    def growth(work):
        return layout.trace_depth(work, 4).peak - layout.trace_depth(work, 3).peak

    assert growth(WORK) == pytest.approx(state, rel=0.01)
    assert growth(replace(WORK, host_activations=True)) < 0.25 * state
    kept = growth(replace(WORK, checkpointing=False))
    assert kept > 8 * state


@pytest.mark.parametrize(("checkpointing", "host"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_few_blocks_tell_what_all_of_them_hold(checkpointing, host, accumulate):
    run_config = cell_of(MIDDLE)
    layout = layout_of(run_config, shaped(run_config), 0.5, None)
    work = StepShape(512, 2, 64, checkpointing, host, accumulate)
    assert layout.blocks.count == 6
    all_of_them, traced = layout.trace_depth(work, 6), layout.trace_pass(work)
    assert traced.peak == pytest.approx(all_of_them.peak, rel=0.01)
    assert traced.operations == all_of_them.operations


def test_the_loss_is_the_peak_where_the_vocabulary_is_most_of_the_model():
    run_config = cell_of((*SMALL, "vocab_size=65536"))
    layout = layout_of(run_config, shaped(run_config), None, None)
    work = replace(WORK, length=256, batch=1, answer=256)
    assert layout.logits(work) == 256 * 65536 * (4 + 2)
    # In float32 with the exponentials beside them, and next to nothing else.
    assert layout.trace_pass(work).peak == pytest.approx(256 * 65536 * 8, rel=0.02)
    assert layout.logits(replace(work, answer=10)) == 10 * 65536 * 6


def test_before_the_first_step_the_embedding_is_on_the_device():
    run_config = cell_of((*SMALL, "vocab_size=2000000"))
    need = need_of(
        layout_of(run_config, shaped(run_config), None, None), replace(WORK, length=8, answer=1)
    )
    assert need.opening > 2000000 * 64 * 2 > need.adapter + need.activations + need.scratch
    assert need.peak == need.weights + need.opening
    longer = need_of(
        layout_of(run_config, shaped(run_config), None, None), replace(WORK, length=100000)
    )
    assert longer.peak == (longer.weights + longer.adapter + longer.activations + longer.scratch)
    assert longer.scratch == WORKSPACE


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lean=false", "train.lean=true"),
        ("lora.dropout=0.1", "lora.dropout=0"),
    ],
)
def test_what_is_not_the_lean_training_is_not_planned_with(override, said):
    run_config = cell_of(SMALL, override)
    with pytest.raises(
        ConfigError,
        match=rf"^only the memory-saving training \(train.lean\) can be planned; set {said}$",
    ):
        layout_of(run_config, shaped(run_config), None, None)


# A budget -----------------------------------------------------------------------------------------


def auto(*overrides):
    return cell_of(MIDDLE, "compression=auto", *overrides)


def peak(run_config, ratio, bits):
    return need_of(layout_of(run_config, shaped(run_config), ratio, precision_of(bits)), WORK).peak


@pytest.mark.parametrize("bits", [16, 4])
def test_a_budget_gets_the_largest_ratio_that_fits(bits, caplog):
    run_config = auto("budget.gpu_gib=0.55" if bits == 16 else "budget.gpu_gib=0.42")
    compression = replace(run_config.compression, bits=bits)
    run_config = replace(run_config, compression=compression, precision=precision_of(bits))
    with caplog.at_level(logging.INFO):
        chosen = solve_compression(run_config, shaped(run_config), WORK)
    assert (chosen.bits, chosen.of) == (bits, "linears")
    assert 0.1 < chosen.ratio < 0.9
    room = run_config.budget.gpu_gib * GIB * (1 - RESERVE)
    assert peak(run_config, chosen.ratio, bits) <= room
    assert peak(run_config, round(chosen.ratio + 0.01, 2), bits) > room
    said = f"compression=auto: ratio {chosen.ratio:.2f} at {bits} bits is the largest within"
    assert said in caplog.text


def test_left_open_bits_are_16_where_nearly_all_can_be_kept_so_and_else_what_kept_most_so_far():
    found = {}
    for gib in (0.36, 0.45, 0.5, 1):
        run_config = auto(f"budget.gpu_gib={gib}")
        found[gib] = solve_compression(run_config, shaped(run_config), WORK)
    assert [one.bits for one in found.values()] == [2, 4, 4, 16]
    # In three bits nearly all would fit, but smaller factors in four bits have kept more.
    assert 0.4 < found[0.36].ratio < 0.9
    assert 0.8 < found[0.45].ratio < 0.9
    assert found[0.5].ratio == 0.99
    assert found[1].ratio == 0.99


def test_a_format_of_a_plug_in_is_solved_for_and_has_rows_of_its_own(monkeypatch):
    monkeypatch.setenv("EMLOC_PLUGINS", str(FIVE_BITS))
    run_config = auto("budget.gpu_gib=0.53")
    room = run_config.budget.gpu_gib * GIB * (1 - RESERVE)
    chosen = solve_compression(run_config, shaped(run_config), WORK)
    assert chosen.bits == 5  # the most bits at which nearly all can be kept
    assert peak(run_config, chosen.ratio, 5) <= room
    named = replace(run_config, precision=precision_of(4))
    assert solve_compression(named, shaped(named), WORK).bits == 4
    rows = rows_of(plan(cell_of(MIDDLE), WORK, find_gpu("rtx4090")))[2:]
    assert [(row[0], row[2]) for row in rows] == [
        *(("lora", "16"), ("lora five_bits", "5"), ("qlora", "4")),
        *(("lora int3", "3"), ("lora int2", "2")),
        *(("offload", "16"), ("offload five_bits", "5"), ("offload nf4", "4")),
        *(("offload int3", "3"), ("offload int2", "2")),
        *(("emloc", "16"), ("emloc five_bits", "5"), ("emloc_nf4", "4")),
        *(("emloc int3", "3"), ("emloc int2", "2")),
    ]
    weights = [float(row[3]) for row in rows[:5]]
    assert weights == sorted(weights, reverse=True)


def test_a_model_trained_through_whole_gets_the_larger_bits_that_fit():
    for gib, bits in ((0.9, 16), (0.6, 4)):
        run_config = auto(f"budget.gpu_gib={gib}", "method=lora")
        chosen = solve_compression(run_config, shaped(run_config), WORK)
        assert (chosen.ratio, chosen.bits) == (None, bits)


REST = "weights that are never compressed need 0.1 GiB, the adapter and activations the rest; set "
REST += "budget.gpu_gib higher, or train.batch or lora.rank lower"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "compression=auto needs budget.gpu_gib; set budget.gpu_gib=24"),
        (("method=lora",), "compression=auto needs budget.gpu_gib; set budget.gpu_gib=24"),
        (("budget.gpu_gib=0.1",), f"budget.gpu_gib=0.1: no ratio fits; {REST}"),
        (
            ("budget.gpu_gib=0.1", "compression.bits=16"),
            f"budget.gpu_gib=0.1: no ratio fits at 16 bits; {REST}",
        ),
        (
            ("budget.gpu_gib=0.1", "method=lora"),
            "budget.gpu_gib=0.1: the whole model does not fit at 2 bits; "
            "set method=emloc or budget.gpu_gib higher",
        ),
        (
            ("budget.gpu_gib=0.6", "method=lora", "compression.bits=16"),
            "budget.gpu_gib=0.6: the whole model does not fit at 16 bits; "
            "set method=emloc or budget.gpu_gib higher",
        ),
    ],
)
def test_what_no_budget_holds_is_said_in_one_line(overrides, said):
    run_config = auto(*overrides)
    with pytest.raises(ConfigError) as raised:
        solve_compression(run_config, shaped(run_config), WORK)
    assert str(raised.value) == said


# The table ----------------------------------------------------------------------------------------


def rows_of(table):
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines]


def test_the_table_has_a_row_for_each_method_and_says_what_fits():
    run_config = cell_of(MIDDLE, "budget.gpu_gib=0.6")
    work = replace(WORK, accumulate=4)
    table = plan(run_config, work, find_gpu("rtx4090"))
    header, dashes, *rows = rows_of(table)
    assert tuple(header) == HEADER
    assert set("".join(dashes)) == {"-"}
    fewer = "train.batch=4 train.accumulate=2"
    assert [row[:3] for row in rows] == [
        ["lora", "", "16"],
        ["qlora", "", "4"],
        ["lora int3", "", "3"],
        ["lora int2", "", "2"],
        [f"offload {fewer}", "", "16"],
        [f"offload nf4 {fewer}", "", "4"],
        [f"offload int3 {fewer}", "", "3"],
        [f"offload int2 {fewer}", "", "2"],
        ["emloc", "0.5", "16"],
        ["emloc_nf4", "0.5", "4"],
        ["emloc int3", "0.5", "3"],
        ["emloc int2", "0.5", "2"],
    ]
    for row, (ratio, bits, _) in zip([*rows[:2], *rows[8:10]], HELD[:4], strict=True):
        need = need_of(layout_of(run_config, shaped(run_config), ratio, precision_of(bits)), work)
        found = dict(zip(HEADER, row, strict=True))
        assert found["peak GiB"] == f"{need.peak / GIB:.2f}"
        parts = sum(float(found[part]) for part in ("weights", "adapter", "activations"))
        assert parts == pytest.approx(need.peak / GIB, abs=0.016)
        fits = need.peak <= 0.6 * GIB * (1 - RESERVE)
        assert found["fits"] == ("yes" if fits else "no: GPU")
    assert {row[7] for row in rows} == {"yes", "no: GPU"}
    assert "4 x 2 x 512 tokens a step, 50 steps, LoRA rank 4" in table


@pytest.mark.parametrize("bits", [16, 4])
def test_an_offloaded_model_has_two_blocks_on_the_device_and_all_in_host_memory(tmp_path, bits):
    sizes = ("hidden_size=256", "intermediate_size=512", "num_hidden_layers=5")
    shape = (*sizes, "tie_word_embeddings=false", *SMALL[3:])
    run_config = cell_of(shape, "model.weights=random")
    whole = layout_of(run_config, shaped(run_config), None, precision_of(bits))
    layout = replace(whole, streamed=True)
    source = run_config.model.open()
    linears = run_config.model.compressible_layers(source)
    offload, chosen = Offload(), replace(run_config.compression, bits=bits)
    inputs = BuildInputs(offload.plan(source, linears, chosen), None, None, precision_of(bits))
    offload.build(tmp_path, source, inputs, device=CPU)
    model = offload.open(tmp_path, source, CPU, precision=precision_of(bits))
    offload_embedding(model)
    tensors = [*model.parameters(), *model.model.layers.buffers()]
    storages = {(s := one.untyped_storage()).data_ptr(): s.nbytes() for one in tensors}
    on_host = model.get_input_embeddings()
    assert isinstance(on_host, HostEmbedding)
    assert layout.weights == pytest.approx(sum(storages.values()), rel=0.01)
    assert whole.weights - layout.weights == pytest.approx(3 / 5 * layout.streamed_bytes)
    costs = [
        cost_of(
            one, replace(WORK, checkpointing=True), 0, find_gpu("rtx4090"), 1, run_config.budget
        )
        for one in (whole, layout)
    ]
    assert costs[1].host - costs[0].host == layout.streamed_bytes
    # Each block comes twice a step, at 25 GB/s.
    assert costs[1].step_seconds >= 2 * layout.streamed_bytes / 25e9
    assert costs[1].step_seconds >= costs[0].step_seconds


ANCHORED = ("method=emloc_anchored", "train.steps=9", "anchor.rounds=2", "anchor.places=3")


def planned(run_config, budget=None, **changed):
    """The lines about anchors, with changed settings of the group `anchor`, or another budget."""
    run_config = replace(run_config, budget=budget or run_config.budget)
    anchor = replace(run_config.anchor, **changed)
    shape = StepShape.of(run_config.train, 512, 64)
    source = shaped(run_config)
    return anchor_plan(replace(run_config, anchor=anchor), source, shape).lines()


def gib(line):
    return float(re.search(r"([\d.e-]+) GiB", line)[1])


def test_anchors_have_rows_of_their_own_with_one_batch_of_offsets():
    run_config = cell_of(SMALL, *ANCHORED, "anchor.places=2", "budget.gpu_states_gib=0")
    table = plan(run_config, replace(WORK, length=65536), find_gpu("rtx4090"))
    rows = {row[0]: dict(zip(HEADER, row, strict=True)) for row in rows_of(table)[2:]}
    assert list(rows) == [
        *("lora", "qlora", "qlora_anchored", "lora int3", "lora int3 anchor=blocks"),
        *("lora int2", "lora int2 anchor=blocks"),
        *("offload", "offload nf4", "offload int3", "offload int2"),
        *("emloc", "emloc_anchored", "emloc_nf4", "emloc_nf4_anchored"),
        *("emloc int3", "emloc int3 anchor=blocks", "emloc int2", "emloc int2 anchor=blocks"),
    ]
    offsets = 2 * 2 * 65536 * 64 * 2  # places, rows, tokens, width, bytes
    for method in ("qlora", "emloc", "emloc_nf4"):
        before, after = (float(rows[f"{method}{end}"]["peak GiB"]) for end in ("", "_anchored"))
        assert after - before == pytest.approx(offsets / GIB, abs=0.011)
        before, after = (float(rows[f"{method}{end}"]["disk GiB"]) for end in ("", "_anchored"))
        assert after > before
    assert [line.split(":")[0] for line in table.splitlines()[-5:]] == [
        *["anchor=blocks"] * 3,
        "compression=auto",
        "recommended",
    ]


def test_the_passes_of_the_original_are_said_in_a_line_each():
    # The longer of two rounds has 5 of 9 steps; a step has 8 passes of 2 rows.
    run_config = cell_of(MIDDLE, *ANCHORED, "train.batch=2", "train.accumulate=8")
    offsets, host, reads = planned(run_config)
    tokens = 5 * 2 * 8 * 512
    assert "(80 rows of 512 tokens, 3 places, bfloat16)" in offsets
    assert gib(offsets) == pytest.approx(tokens * 3 * 2048 * 2 / GIB, rel=0.01)
    states, embedding = 2 * tokens * 2048 * 2, 32000 * 2048 * 2
    # The next block of the original has 86 MiB; pinned memory is a power of two.
    pinned = 128 * 2**20
    unwritten = states / 2  # those of one model behind a place
    assert gib(host) == pytest.approx(3 + (embedding + pinned + unwritten) / GIB, rel=0.002)
    assert f", of which {states / GIB:.3g} GiB are hidden states that wait" in host
    # The largest block, and what one row takes in it: at least the inputs and outputs of its MLP.
    block = (2 * 2048 + 2 * 512 + 3 * 5632) * 2048 * 2
    beside = gib(host.partition("beside the emulator")[2])
    row = 512 * (2048 + 3 * 5632) * 2
    assert block + row < beside * GIB - states < block + 2 * row
    budget = replace(run_config.budget, gpu_states_gib=0)
    host = planned(run_config, budget=budget)[1]
    assert gib(host) == pytest.approx(3 + (1.5 * states + embedding + pinned) / GIB, rel=0.002)
    assert ", of which 0 GiB are hidden states that wait" in host
    assert gib(host.partition("beside the emulator")[2]) == pytest.approx(
        beside - states / GIB, abs=1e-3
    )
    assert "read 3 times" in reads  # for two rounds, and for the guard behind the last
    assert "read 2 times" in planned(run_config, guard=0)[2]
    halved = gib(planned(run_config, dtype="int8")[0]) / gib(offsets)
    assert halved == pytest.approx(0.5 + 1 / 64, rel=0.01)
    assert "more than" not in offsets
    line = planned(run_config, budget=replace(run_config.budget, disk_gib=0.4))[0]
    assert "more than budget.disk_gib=0.4, so set anchor.rounds" in line


def test_a_new_fit_of_factors_is_planned_on_the_disk():
    """Gradients at the outputs of all layers, and factors beside those of the first round."""
    disks = {}
    for fit in ("true", "false"):
        short = ("train.steps=2", "train.batch=1", "train.accumulate=1", f"anchor.refit={fit}")
        run_config = cell_of(MIDDLE, *ANCHORED, "compression=r25", *short)
        rows, _ = table_of(run_config, WORK)
        disks[fit] = {name: float(row["disk GiB"]) for name, row in rows.items()}
    outputs = 6 * (2 * 2048 + 2 * 512 + 2 * 5632 + 2048)
    more = disks["true"]["emloc_anchored"] - disks["false"]["emloc_anchored"]
    assert more == pytest.approx((4096 * outputs * 2 + 0.25 * MATRICES * 2) / GIB, abs=0.11)
    assert disks["true"]["qlora_anchored"] == disks["false"]["qlora_anchored"]


def test_an_offset_in_front_of_the_head_is_planned_for_the_answers():
    run_config = cell_of(MIDDLE, "method=emloc_uncorrected", "anchor=logits", "train.steps=4")
    line, disk, _ = anchor_plan(run_config, shaped(run_config), WORK).lines()
    assert "1 place," in line
    rows = run_config.train.batch * run_config.train.accumulate
    size = rows * 64 * 2048 * 2 / GIB
    assert gib(line) == pytest.approx(size, rel=0.01)
    # With the states of both models at these tokens.
    assert gib(disk.partition("memory, and ")[2]) == pytest.approx(3 * size, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("anchor.places=9",), r"anchor.places=9: the model has only 6 blocks"),
        (("anchor.places=[2,6]",), r"block 6 is behind the last block"),
        (("emulator.sequential=true",), "set emulator.sequential=false"),
        (("emulator=full",), "there is nothing to put back; set anchor=none, or compression.bits"),
    ],
)
def test_anchors_that_no_run_can_have_are_not_planned(overrides, said):
    with pytest.raises(ConfigError, match=said):
        plan(cell_of(MIDDLE, *ANCHORED, *overrides), WORK, find_gpu("rtx4090"))


def test_a_budget_has_room_for_the_offsets_of_a_batch():
    run_config = auto("budget.gpu_gib=0.55", "method=emloc_anchored", "anchor.places=6")
    work = with_offsets(WORK, anchor_plan(run_config, shaped(run_config), WORK))
    assert work.offsets == 6 * 2 * 512 * 2048 * 2
    chosen = solve_compression(run_config, shaped(run_config), work)
    layout = layout_of(run_config, shaped(run_config), chosen.ratio, precision_of(chosen.bits))
    room = run_config.budget.gpu_gib * GIB * (1 - RESERVE)
    assert need_of(layout, work).peak == need_of(layout, WORK).peak + work.offsets <= room


def test_a_whole_model_with_anchors_is_packed_in_any_budget():
    run_config = auto("budget.gpu_gib=9", "method=qlora_anchored", "anchor.places=6")
    run_config = replace(run_config, compression=replace(run_config.compression, bits=None))
    run_config = replace(run_config, precision=None)
    work = with_offsets(WORK, anchor_plan(run_config, shaped(run_config), WORK))
    assert solve_compression(run_config, shaped(run_config), work).bits == 4
    plain = replace(run_config, anchor=NoAnchor())
    assert solve_compression(plain, shaped(plain), WORK).bits == 16


@pytest.mark.parametrize("method", ["emloc", "lora"])
def test_the_line_about_auto_is_of_an_emulator_with_nothing_given_but_the_budget(method):
    run_config = cell_of(MIDDLE, "budget.gpu_gib=0.45", f"method={method}", "compression=r25")
    free = auto("budget.gpu_gib=0.45")
    chosen = solve_compression(free, shaped(free), WORK)
    assert chosen.bits == 4  # the configuration says 16
    expected = f"compression.ratio={chosen.ratio:g} compression.bits=4"
    line = plan(run_config, WORK, find_gpu("rtx4090")).splitlines()[-2]
    assert line == f"compression=auto: {expected}"
    none = plan(cell_of(SMALL), WORK, find_gpu("rtx4090")).splitlines()[-2]
    assert none == "compression=auto: set budget.gpu_gib to see what it would choose"
    small = plan(cell_of(MIDDLE, "budget.gpu_gib=0.1"), WORK, find_gpu("rtx4090"))
    assert small.splitlines()[-2] == f"compression=auto: budget.gpu_gib=0.1: no ratio fits; {REST}"


def test_a_step_of_more_passes_takes_so_many_times_as_long():
    run_config = cell_of(MIDDLE)
    layout = layout_of(run_config, shaped(run_config), 0.5, None)
    one, four = (
        cost_of(layout, replace(WORK, accumulate=n), 5000, GPUS["h200"], 64, run_config.budget)
        for n in (1, 4)
    )
    assert four.step_seconds == pytest.approx(4 * one.step_seconds)
    assert one.step_seconds >= 5000 * 18e-6
    assert (four.host, four.disk, four.build_seconds) == (one.host, one.disk, one.build_seconds)
    assert one.disk > layout.factors


def test_a_step_that_is_a_graph_does_not_wait_for_launches():
    run_config = cell_of(MIDDLE)
    layout = layout_of(run_config, shaped(run_config), 0.5, None)
    launched, captured = (
        cost_of(layout, replace(WORK, captured=one), 50_000, GPUS["h200"], 64, run_config.budget)
        for one in (False, True)
    )
    assert captured.step_seconds < launched.step_seconds / 10


# Steps that `emloc bench` has timed on an H200, one row of 2048 tokens, rank 8.
TIMED = {
    "llama3_8b": {"lora": 0.19, "r25": 0.087, "r25 nf4": 0.099, "nf4": 0.21},
    "internvl2_5_38b": {"lora": 0.87, "r20": 0.29, "r20 nf4": 0.33, "nf4": 0.98},
}


@pytest.mark.parametrize("model", TIMED)
def test_planned_steps_are_within_a_tenth_of_the_timed_ones(model):
    words = ("train=steps500", "train.batch=1", "train.accumulate=1")
    run_config = build(compose_cached([f"model={model}", "tracker=none", *words]))
    shape = StepShape.of(run_config.train, 2048, 128)
    assert shape.captured
    for name, seconds in TIMED[model].items():
        ratio = int(name[1:3]) / 100 if name.startswith("r") else None
        precision = precision_of(4) if name.endswith("nf4") else None
        layout = layout_of(run_config, shaped(run_config), ratio, precision)
        cost = cost_of(layout, shape, 0, GPUS["h200"], 64, run_config.budget)
        assert cost.step_seconds == pytest.approx(seconds, rel=0.11), name


# What to take -------------------------------------------------------------------------------------


def table_of(run_config, work=WORK, gpu="rtx4090", **machine):
    lines = plan(run_config, work, find_gpu(gpu), **machine).splitlines()
    rows = {row[0]: dict(zip(HEADER, row, strict=True)) for row in rows_of("\n".join(lines))[2:]}
    return rows, lines


def test_a_step_that_does_not_fit_is_divided_into_more_passes():
    run_config = cell_of(MIDDLE, "budget.gpu_gib=1")
    whole = table_of(cell_of(MIDDLE), replace(WORK, batch=8))[0]["lora"]
    rows, _ = table_of(run_config, replace(WORK, batch=8))
    (label,) = (name for name in rows if name.startswith("lora train.batch="))
    assert rows[label]["fits"] == "yes"
    batch, accumulate = (int(word.split("=")[1]) for word in label.split()[1:])
    assert batch * accumulate == 8
    assert float(rows[label]["peak GiB"]) < 1 < float(whole["peak GiB"])


def test_what_host_memory_or_disk_is_too_small_for_does_not_fit():
    run_config = cell_of(MIDDLE, "train.steps=5")
    layout = layout_of(run_config, shaped(run_config), None, None)
    rows = list(Planner(run_config, layout, WORK, find_gpu("rtx4090"), 24, None).rows())
    host, disk = (max(getattr(row.cost, name) for row in rows) / GIB for name in ("host", "disk"))

    def lacking(gpu, host, disk):
        return {Machine(gpu, host, disk).lacks(row) for row in rows}

    assert lacking(24, host, disk) == {None}
    assert lacking(24, host * 0.999, disk) == {None, "host"}
    assert lacking(24, host, disk * 0.999) == {None, "disk"}
    assert lacking(0.1, 0.1, 0.1) == {"GPU"}
    every = Machine(24, host, disk)
    assert advice(rows, every, 5).startswith("recommended: method=lora, about ")
    none = advice(rows, Machine(24, 0.1, disk), 5)
    assert none.startswith("recommended: nothing, since no method fits; ")
    fits = [row for row in rows if row.gain is not None and row.gain < 0.9]
    assert "has kept most of LoRA's gain, but less than 0.95 of it" in advice(fits, every, 5)


def test_the_recommended_method_is_the_fastest_with_enough_gain_among_those_that_fit():
    rows, lines = table_of(cell_of(MIDDLE, "train.steps=400"), gpu="12GiB")
    assert lines[-1].startswith("recommended: method=lora, ")
    run_config = cell_of(
        MIDDLE, *ANCHORED, "train.steps=90000", "budget.gpu_gib=0.5", "compression=r25"
    )
    rows, lines = table_of(run_config, WORK)
    fitting = {
        name: row for name, row in rows.items() if row["fits"] == "yes" and row["gain"] >= "0.950"
    }
    best = min(fitting, key=lambda name: float(fitting[name]["hours"]))
    assert f"recommended: method={best.split()[0]} " in lines[-1].replace(",", " ")
    assert f"({fitting[best]['gain']} of it, measured on" in lines[-1]
    gains = {name: row["gain"] for name, row in rows.items()}
    assert gains["lora"] == "1.000" > gains["qlora_anchored"] > gains["qlora"] > gains["lora int2"]
    assert gains["emloc_anchored"] > gains["emloc"] > ""
    assert float(rows["emloc_anchored"]["read GiB"]) > float(rows["emloc"]["read GiB"])
    assert float(rows["emloc_anchored"]["hours"]) >= float(rows["emloc"]["hours"])
    assert rows["emloc"]["passes s"] == ""


def test_the_settings_of_each_row_compose():
    run_config = cell_of(MIDDLE, *ANCHORED)
    source = shaped(run_config)
    layout, anchors = (
        layout_of(run_config, source, None, None),
        anchor_plan(run_config, source, WORK),
    )
    rows = Planner(run_config, layout, WORK, find_gpu("rtx4090"), 24, anchors).rows()
    for row in rows:
        words = settings_of(row).split()
        own = build(compose_cached(["model=llama3_8b", "tracker=none", *words]))
        assert own.compression.bits == row.bits
        assert own.anchor.anchors == ("anchor" in row.method)
        assert row.ratio is None or own.compression.ratio == row.ratio


def test_exact_steps_behind_the_training_are_in_the_rows_of_emulators():
    rows, _ = table_of(cell_of(MIDDLE, "train.steps=1"))
    polished, lines = table_of(cell_of(MIDDLE, "train.steps=1", "polish=exact_steps"))
    assert lines[-3].startswith("polish=exact_steps: 20 steps on the original take ")
    assert polished["lora"] == rows["lora"]
    for name in ("qlora", "emloc", "emloc_nf4"):
        assert polished[name]["gain"] == ""  # not measured
        assert float(polished[name]["read GiB"]) > float(rows[name]["read GiB"])
        assert float(polished[name]["host GiB"]) >= float(polished["offload"]["host GiB"])


def test_a_gpu_is_a_name_or_a_size_with_the_rates_of_the_slowest_card_so_large():
    assert find_gpu("12GiB") == GPUS["rtx3060"]
    assert find_gpu("11GiB") == replace(GPUS["rtx3060"], memory_gib=11)
    assert find_gpu("20GiB") == replace(GPUS["rtx3090"], memory_gib=20)
    consumer = {gpu.memory_gib for name, gpu in GPUS.items() if name.startswith("rtx")}
    assert consumer == {8, 10, 12, 16, 24, 32}


@pytest.mark.parametrize("word", ["gt710", "0GiB", "2000GiB", "12"])
def test_an_unknown_gpu_is_refused(word):
    said = (
        rf"^--gpu {word}: there is no such GPU; set --gpu to its memory, such as 12GiB, or to one"
    )
    with pytest.raises(ConfigError, match=said):
        find_gpu(word)


def test_host_memory_and_disk_are_those_of_this_machine_unless_they_are_stated():
    assert (host_gib("48GiB"), disk_gib("1.5 GiB")) == (48, 1.5)
    assert 0.5 < host_gib(None) < 10_000
    assert 0 < disk_gib(None) < 1_000_000
    with pytest.raises(ConfigError, match=r"^--host 48: this is no size; give it as --host 64GiB$"):
        host_gib("48")


def test_gains_lie_between_those_that_were_measured():
    own = [measured_gain(Trained(True, 16, anchored=True), ratio) for ratio in (0.125, 0.2, 0.25)]
    assert own == sorted(own)
    assert own[0] > 0.8
    assert measured_gain(Trained(True, 16, anchored=True), 0.1) is None
    shared = Trained(True, 16, anchored=True, shared="inputs")
    assert measured_gain(shared, 0.25) > own[2]
    assert measured_gain(shared, 0.2) == own[1]  # only own factors were measured there
    assert measured_gain(replace(shared, bits=7), 0.25) is None
    assert measured_gain(Trained(False, 16), None) == pytest.approx(1, abs=1e-3)


# A sweep ------------------------------------------------------------------------------------------


def runs_of(*several):
    return [
        planned_run(words, cell_of(MIDDLE, *ANCHORED, *words.split()), 512, 64, GPUS["rtx3060"])
        for words in several
    ]


def test_runs_of_one_emulator_share_its_build_and_the_first_pass():
    runs = runs_of("train.learning_rate=1e-4", "train.learning_rate=2e-4 seed=1", "lora=r8")
    cost = runs[0].row.cost
    assert 0 < cost.first_pass_seconds < cost.pass_seconds
    assert len({run.pass_key for run in runs}) == 1
    assert repeated_seconds(runs) == pytest.approx(
        2 * (cost.build_seconds + cost.first_pass_seconds)
    )


def test_runs_with_other_places_share_only_the_build_and_those_of_other_ratios_nothing():
    places = runs_of("anchor.places=2", "anchor.places=3")
    assert repeated_seconds(places) == pytest.approx(places[0].row.cost.build_seconds)
    assert repeated_seconds(runs_of("compression=r25", "compression=r50")) == pytest.approx(0)


def test_a_sweep_has_a_row_for_each_training():
    several = [
        ("method=zero_shot", "zero_shot"),
        ("method=lora", "lora"),
        ("method=qlora", "qlora"),
    ]
    runs = [(words, cell_of(MIDDLE, words)) for words, _ in several]
    lines = plan_sweep(runs, 512, 64, find_gpu("rtx4090")).splitlines()
    header, _, *rows = rows_of("\n".join(lines))
    assert header == ["run", *HEADER[1:]]
    assert [row[0] for row in rows] == ["method=lora", "method=qlora"]
    alone = table_of(cell_of(MIDDLE), StepShape.of(runs[1][1].train, 512, 64))[0]
    assert [row[1:] for row in rows] == [
        list(alone[name].values())[1:] for name in ("lora", "qlora")
    ]
    assert lines[-1].startswith("2 trainings take ")
    assert ", and 1 train nothing; " in lines[-1]


def test_each_run_of_a_sweep_has_to_fit_its_own_budget():
    budgets = ["budget.gpu_gib=0.1", "budget.gpu_gib=8"]
    runs = [(words, cell_of(MIDDLE, words)) for words in budgets]
    text = plan_sweep(runs, 512, 64, find_gpu("rtx4090"))
    header, _, *rows = rows_of(text)
    assert [row[header.index("fits")] for row in rows] == ["no: GPU", "yes"]
    assert "fits: within 0.1 or 8 GiB of the GPU" in text


def test_a_sweep_that_trains_nothing_takes_no_time():
    runs = [("method=zero_shot", cell_of(MIDDLE, "method=zero_shot"))]
    assert "\n0 trainings take 0 min" in plan_sweep(runs, 512, 64, find_gpu("rtx4090"))


def test_the_gain_of_a_run_is_that_of_its_recovery():
    runs = [
        planned_run(
            "", cell_of(MIDDLE, f"method={method}", "compression=r50"), 512, 64, GPUS["l40s"]
        )
        for method in ("emloc", "emloc_uncorrected")
    ]
    assert 0.5 < runs[0].row.gain < runs[1].row.gain < 0.8


def test_a_run_of_a_sweep_that_is_not_planned_is_named():
    with pytest.raises(ConfigError, match=r"^method=upop: only trainings through the whole model"):
        planned_run("", cell_of(MIDDLE, "method=upop"), 512, 64, GPUS["rtx4090"])


# In a run -----------------------------------------------------------------------------------------


def test_budgets_have_folders_of_their_own_only_where_they_are_solved_for():
    def name(*overrides):
        return folder_name(compose_cached(["tracker=none", *overrides]))

    assert name("budget.gpu_gib=24") == name("budget.gpu_gib=12") == name()
    solved = {
        name("compression=auto", *more)
        for more in ((), ("budget.gpu_gib=24",), ("budget.gpu_gib=12",))
    }
    assert len(solved | {name()}) == 4
    assert name("compression=auto", "budget.host_gib=1") in solved


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device would be held to so little")
def test_a_run_finds_its_numbers_and_is_of_them(tiny, tmp_path, caplog):
    wide = save_checkpoint(tmp_path / "wide", **WIDE)
    said = [*tiny, f"model.source={wide}", "compression=auto", "train.batch=1", "train.steps=1"]
    found = {}
    for mib in BUDGETS_MIB:
        run_config = build(compose_cached([*said, "method=emloc", f"budget.gpu_gib={mib / 1024}"]))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            result = run(run_config, Store(tmp_path / "cache"), lambda step, values: None)
        facts = result.emulated.facts
        [line] = [one for one in caplog.messages if one.startswith("compression=auto")]
        ratio = float(line.split("ratio ")[1].split()[0])
        assert facts["share_of_linears"] == pytest.approx(ratio, abs=0.02)
        assert f"at {facts['bits']} bits" in line
        found[mib] = ratio, facts["bits"], result.stages["emulate"].key
    assert len(set(found.values())) == 2, found


# What a run takes, before it waits for a GPU -----------------------------------------------------


def test_the_expected_memory_covers_the_training_and_the_evaluation_of_each_method(tiny):
    words = [*tiny, "train.batch=2", "eval.batch=2"]
    of_method = {
        method: build(compose_cached([*words, f"method={method}"]))
        for method in ("lora", "emloc", "zero_shot")
    }
    peaks = {method: planned_peak(run_config) for method, run_config in of_method.items()}
    assert len(set(peaks.values())) == 1
    emloc = of_method["emloc"]
    source = emloc.model.open()
    step_shape = longest_step(emloc, source)
    assert peaks["emloc"] == need_of(layout_of(emloc, source, None, None), step_shape).peak
    assert peaks["emloc"] > need_of(layout_of(emloc, source, 0.25, None), step_shape).peak
    larger = [
        planned_peak(build(compose_cached([*words, f"{section}.batch=8"])))
        for section in ("train", "eval")
    ]
    assert larger[0] == larger[1] > peaks["emloc"]
    assert planned_peak(build(compose_cached([*words, "train.lean=false"]))) is None
