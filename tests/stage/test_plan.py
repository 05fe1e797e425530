"""Planned memory equals measured memory, and `compression=auto` uses the whole budget."""

import logging
from dataclasses import replace

import pytest
import torch
from packed import THREE_BITS, precision_of
from tiny import linears, save_checkpoint

from emloc.adapters.fused import fuse
from emloc.adapters.lora import Lora
from emloc.config.compose import compose
from emloc.config.paths import CONF
from emloc.config.run_folder import folder_name
from emloc.cost.plan.cost import cost_of
from emloc.cost.plan.fit import RESERVE, WORKSPACE, fitting, need_of, scheme_of
from emloc.cost.plan.gpus import GPUS, gpu_called
from emloc.cost.plan.layout import StepShape
from emloc.cost.plan.table import HEADER, plan
from emloc.cost.plan.trace import trace
from emloc.emulators import BuildInputs
from emloc.emulators.full import Full
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
# Large enough for budgets to give different ratios; this model is never created.
MIDDLE = (
    *("hidden_size=2048", "intermediate_size=5632", "num_hidden_layers=6", "vocab_size=32000"),
    *("num_attention_heads=16", "num_key_value_heads=4", "bos_token_id=1", "eos_token_id=2"),
)
WORK = StepShape(length=512, batch=2, answer=64, checkpointing=True, host_activations=False)
# A checkpoint large enough that ratios differ within a budget, most of which is WORKSPACE.
WIDE = {"hidden_size": 256, "intermediate_size": 512}
BUDGETS_MIB = (71.2, 78)
HELD = [(None, 16), (None, 4), (0.5, 16), (0.5, 4)]
NAMES = ["lora", "qlora", "emloc", "emloc_nf4"]


def cell_of(shape, *overrides, model="llama3_8b"):
    shape = tuple(f"model.shape.{one}" for one in shape)
    return build(compose([f"model={model}", "tracker=none", "lora=r4", *shape, *overrides]))


def shaped(run_config):
    return run_config.model.shape_source()


def opened(run_config, ratio, bits, folder):
    """Open the model of a plan on a CPU as the pipeline does; factors by a plain SVD."""
    source = run_config.model.open()
    chosen = replace(run_config.compression, ratio=ratio or 0.5, bits=bits)
    emulator = Full() if ratio is None else PLAIN_SVD
    ranks = emulator.plan(source, run_config.model.compressed(source), chosen)
    emulator.build(folder, source, BuildInputs(ranks, None, None, precision_of(bits)), device=CPU)
    return emulator.open(folder, source, CPU, precision=precision_of(bits))


def held_bytes(model):
    """Bytes of the frozen weights with four-bit scales, without the embedding in host memory."""
    total = sum(one.nbytes for one in model.parameters())
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            total += module.matrix.nbytes - module.weight.nbytes
        if isinstance(module, PackedFactorized):
            total += module.v.nbytes + module.ut.nbytes
    return total


# Weights and adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "bits"), HELD, ids=NAMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model", ["llama3_8b", "qwen2_5_7b"])
def test_planned_weights_equal_the_bytes_of_an_opened_model(tmp_path, model, tied, ratio, bits):
    settings = ("model.weights=random", f"model.shape.tie_word_embeddings={str(tied).lower()}")
    run_config = cell_of(SMALL, *settings, model=model)
    scheme = scheme_of(run_config, shaped(run_config), ratio, precision_of(bits))
    emulator_model = opened(run_config, ratio, bits, tmp_path)
    before = held_bytes(emulator_model)
    freed = offload_embedding(emulator_model)
    assert scheme.embedding == freed == (0 if tied else 300 * 64 * 2)
    assert isinstance(emulator_model.get_input_embeddings(), HostEmbedding) != tied
    assert scheme.weights == held_bytes(emulator_model) == before - freed
    assert scheme.weights >= scheme.uncompressed


@pytest.mark.parametrize(("ratio", "bits"), HELD, ids=NAMES)
def test_planned_adapter_bytes_are_parameters_moments_and_copies(tmp_path, ratio, bits):
    run_config = cell_of(SMALL, "model.weights=random")
    scheme = scheme_of(run_config, shaped(run_config), ratio, precision_of(bits))

    def storages(model, operands=()):
        tensors = [*model.parameters(), *operands]
        return sum(
            {(s := one.untyped_storage()).data_ptr(): s.nbytes() for one in tensors}.values()
        )

    model = opened(run_config, ratio, bits, tmp_path)
    before = storages(model)
    tuned = Lora().attach(model, run_config.lora, linears(model, run_config.model.lora_targets))
    assert fuse(tuned) == 14
    layers = [m for m in tuned.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    # The operands of a forward pass beside its input: base and adapter.
    operands = [
        operand for layer in layers for operand in layer.forward.args if hasattr(operand, "down")
    ]
    assert len(operands) == 14
    copies = (
        storages(tuned, [t for operand in operands for t in (operand.down, operand.up)]) - before
    )
    trained = [one for one in tuned.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for one in trained:
        one.grad = torch.zeros_like(one)
    optimizer.step()
    state = (t for one in optimizer.state.values() for t in one.values())
    moments = sum(t.nbytes for t in state if t.dim() == 2)
    assert scheme.parameters == sum(one.numel() for one in trained)
    need = need_of(scheme, WORK)
    assert need.adapter == copies + moments
    assert need.opening == copies + scheme.embedding
    again = need_of(scheme, replace(WORK, accumulate=4))
    assert again.adapter == need.adapter + 4 * scheme.parameters


def test_scratch_memory_holds_the_largest_dequantised_matrices():
    run_config = cell_of(SMALL)
    assert scheme_of(run_config, shaped(run_config), 0.5, None).scratch == 0
    assert scheme_of(run_config, shaped(run_config), None, precision_of(4)).scratch == 64 * 96 * 2
    # Ranks 16 (64 x 64), 10 (32 x 64) and 19 (64 x 96) plus 4 of the adapter, rounded up to
    # multiples of 8.
    assert (
        scheme_of(run_config, shaped(run_config), 0.5, precision_of(4)).scratch
        == (24 * 96 + 24 * 96) * 2
    )
    few = cell_of(SMALL, r"model.lora_targets='model\.layers\.\d+\.self_attn\.k_proj'")
    # The adapted layer (32, 64), and the largest layer without an adapter.
    assert scheme_of(few, shaped(few), None, precision_of(4)).scratch == (32 * 64 + 64 * 96) * 2
    assert (
        scheme_of(few, shaped(few), 0.5, precision_of(4)).scratch
        == (16 * 64 + 16 * 32 + 19 * 96) * 2
    )


@pytest.mark.parametrize("model", sorted(path.stem for path in CONF.glob("model/[!_]*.yaml")))
def test_every_model_can_be_planned_without_its_weights(model):
    run_config = build(compose([f"model={model}", "model.dtype=bfloat16", "tracker=none"]))
    source = shaped(run_config)
    whole = scheme_of(run_config, source, None, None)
    parameters = sum(source.sizes.values())
    assert whole.weights + whole.embedding == 2 * parameters
    four, half = (
        scheme_of(run_config, source, *one).weights
        for one in ((None, precision_of(4)), (0.5, None))
    )
    linears = sum(rows * columns for rows, columns in whole.compressed.values())
    # Half of 2 bytes each; the ranks of a layer of width 88 are rounded down by at most 1/44.
    assert half - whole.uncompressed == pytest.approx(linears, rel=0.015)
    assert 0.5 * linears < four < whole.weights
    packed = scheme_of(run_config, source, 0.5, precision_of(4)).weights - whole.uncompressed
    assert packed == pytest.approx((0.5 + 1 / 64) * linears / 2, rel=0.015)


def test_a_ratio_of_the_model_counts_all_parameters():
    run_config = cell_of(MIDDLE, "compression.of=model")
    scheme = scheme_of(run_config, shaped(run_config), 0.6, None)
    total = 2 * sum(scheme.source.sizes.values())
    assert scheme.weights + scheme.embedding == pytest.approx(0.6 * total, rel=0.002)


# One step -----------------------------------------------------------------------------------------


def test_a_trace_counts_saved_and_freed_tensors():
    x = torch.empty(MIB // 4, device="meta", requires_grad=True)

    def saving():
        y = x.exp().exp()  # both results are saved for the backward pass
        assert y.nbytes == MIB
        return y

    assert trace(saving).peak == 2 * MIB

    def dropping():
        with torch.no_grad():
            for _ in range(5):
                x.exp()

    assert trace(dropping).peak == MIB
    assert trace(dropping).operations == 5
    assert trace(lambda: x.detach().view(2, -1)).peak == 0  # a view shares the storage
    assert trace(lambda: torch.empty(3, device="meta")).peak == 512
    rows = torch.empty(4, MIB // 16, device="meta")
    assert trace(lambda: rows.logsumexp(-1)).peak == MIB  # the kernel allocates exp(rows)


@pytest.mark.parametrize("ratio", [None, 0.5], ids=["whole", "factors"])
def test_a_recomputed_block_saves_one_hidden_state_or_none_with_host_activations(ratio):
    source = shaped(cell_of(MIDDLE))
    scheme = scheme_of(cell_of(MIDDLE), source, ratio, None)
    state = WORK.batch * WORK.length * 2048 * 2
    assert state >= MIB  # smaller tensors stay on the device

    def growth(work):
        return scheme.run(work, 4).peak - scheme.run(work, 3).peak

    assert growth(WORK) == pytest.approx(state, rel=0.01)
    assert growth(replace(WORK, host_activations=True)) < 0.25 * state
    growth_without_recomputation = growth(replace(WORK, checkpointing=False))
    assert growth_without_recomputation > 8 * state


@pytest.mark.parametrize(("checkpointing", "host"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_memory_of_all_blocks_is_extrapolated_from_a_few(checkpointing, host, accumulate):
    run_config = cell_of(MIDDLE)
    scheme = scheme_of(run_config, shaped(run_config), 0.5, None)
    work = StepShape(512, 2, 64, checkpointing, host, accumulate)
    assert scheme.blocks.count == 6
    all_of_them, extrapolated = scheme.run(work, 6), scheme.traced(work)
    assert extrapolated.peak == pytest.approx(all_of_them.peak, rel=0.01)
    assert extrapolated.operations == all_of_them.operations


def test_the_loss_is_the_peak_with_a_very_large_vocabulary():
    run_config = cell_of((*SMALL, "vocab_size=65536"))
    scheme = scheme_of(run_config, shaped(run_config), None, None)
    work = replace(WORK, length=256, batch=1, answer=256)
    assert scheme.logits(work) == 256 * 65536 * (4 + 2)
    # Logits in float32 and their exponentials; all else is negligible.
    assert scheme.traced(work).peak == pytest.approx(256 * 65536 * 8, rel=0.02)
    assert scheme.logits(replace(work, answer=10)) == 10 * 65536 * 6


def test_the_embedding_is_on_the_device_before_the_first_step():
    run_config = cell_of((*SMALL, "vocab_size=2000000"))
    need = need_of(
        scheme_of(run_config, shaped(run_config), None, None), replace(WORK, length=8, answer=1)
    )
    assert need.opening > 2000000 * 64 * 2 > need.adapter + need.activations + need.scratch
    assert need.peak == need.weights + need.opening
    longer = need_of(
        scheme_of(run_config, shaped(run_config), None, None), replace(WORK, length=100000)
    )
    assert longer.peak == (longer.weights + longer.adapter + longer.activations + longer.scratch)
    assert longer.scratch == WORKSPACE


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.lean=false", "train.lean=true"),
        ("lora.dropout=0.1", "lora.dropout=0"),
        ("model.dtype=float16", "model.dtype=bfloat16"),
    ],
)
def test_only_the_memory_saving_training_can_be_planned(override, remedy):
    run_config = cell_of(SMALL, override)
    with pytest.raises(
        ConfigError, match=f"^only the lean training is planned with; set {remedy}$"
    ):
        scheme_of(run_config, shaped(run_config), None, None)


# A budget -----------------------------------------------------------------------------------------


def auto(*overrides):
    return cell_of(MIDDLE, "compression=auto", *overrides)


def peak(run_config, ratio, bits):
    return need_of(scheme_of(run_config, shaped(run_config), ratio, precision_of(bits)), WORK).peak


@pytest.mark.parametrize("bits", [16, 4])
def test_a_budget_gets_the_largest_ratio_that_fits(bits, caplog):
    run_config = auto("budget.gpu_gib=0.55" if bits == 16 else "budget.gpu_gib=0.42")
    compression = replace(run_config.compression, bits=bits)
    run_config = replace(run_config, compression=compression, precision=precision_of(bits))
    with caplog.at_level(logging.INFO):
        chosen = fitting(run_config, shaped(run_config), WORK)
    assert (chosen.bits, chosen.of) == (bits, "linears")
    assert 0.1 < chosen.ratio < 0.9
    room = run_config.budget.gpu_gib * GIB * (1 - RESERVE)
    assert peak(run_config, chosen.ratio, bits) <= room
    assert peak(run_config, round(chosen.ratio + 0.01, 2), bits) > room
    message = f"compression=auto: ratio {chosen.ratio:.2f} at {bits} bits within"
    assert message in caplog.text


def test_automatic_bits_are_16_if_nearly_all_weights_fit_and_4_otherwise():
    solutions = {}
    for gib in (0.36, 0.45, 1):
        run_config = auto(f"budget.gpu_gib={gib}")
        solutions[gib] = fitting(run_config, shaped(run_config), WORK)
    assert [one.bits for one in solutions.values()] == [4, 4, 16]
    assert 0.1 < solutions[0.36].ratio < 0.5 < solutions[0.45].ratio < 0.99
    assert solutions[1].ratio == 0.99


def test_compression_auto_and_plan_consider_the_format_of_a_plug_in(monkeypatch):
    monkeypatch.setattr("emloc.config.paths.conf_folders", lambda: [CONF, THREE_BITS / "conf"])
    run_config = auto("budget.gpu_gib=0.36")
    chosen = fitting(run_config, shaped(run_config), WORK)
    assert chosen.bits == 3  # nearly all weights do not fit with four bits either
    room = run_config.budget.gpu_gib * GIB * (1 - RESERVE)
    assert (
        peak(run_config, chosen.ratio, 3)
        <= room
        < peak(run_config, round(chosen.ratio + 0.01, 2), 3)
    )
    named = replace(run_config, precision=precision_of(4))
    assert fitting(named, shaped(named), WORK).bits == 4
    rows = rows_of(plan(cell_of(MIDDLE), WORK, gpu_called("rtx4090")))[2:]
    assert [(row[0], row[2]) for row in rows] == [
        *(("lora", "16"), ("qlora", "4"), ("lora three_bits", "3")),
        *(("emloc", "16"), ("emloc_nf4", "4"), ("emloc three_bits", "3")),
    ]
    weights = [float(row[3]) for row in rows]
    assert weights[0] > weights[1] > weights[2]


def test_compression_auto_selects_the_largest_bits_for_a_full_model():
    for gib, bits in ((0.9, 16), (0.6, 4)):
        run_config = auto(f"budget.gpu_gib={gib}", "method=lora")
        chosen = fitting(run_config, shaped(run_config), WORK)
        assert (chosen.ratio, chosen.bits) == (None, bits)


REST = "what is never compressed takes 0.1 GiB of it, the adapter and activations the rest; set "
REST += "budget.gpu_gib higher, or train.batch or lora.rank lower"


@pytest.mark.parametrize(
    ("overrides", "message"),
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
            "budget.gpu_gib=0.1: the whole model does not fit at 4 bits; "
            "set method=emloc or budget.gpu_gib higher",
        ),
        (
            ("budget.gpu_gib=0.6", "method=lora", "compression.bits=16"),
            "budget.gpu_gib=0.6: the whole model does not fit at 16 bits; "
            "set method=emloc or budget.gpu_gib higher",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_in_one_line(overrides, message):
    run_config = auto(*overrides)
    with pytest.raises(ConfigError) as raised:
        fitting(run_config, shaped(run_config), WORK)
    assert str(raised.value) == message


# The table ----------------------------------------------------------------------------------------


def rows_of(table):
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines]


def test_the_table_has_a_row_per_method_and_states_whether_it_fits():
    run_config = cell_of(MIDDLE, "budget.gpu_gib=0.6")
    work = replace(WORK, accumulate=4)
    table = plan(run_config, work, gpu_called("rtx4090"))
    header, dashes, *rows = rows_of(table)
    assert tuple(header) == HEADER
    assert set("".join(dashes)) == {"-"}
    assert [row[:3] for row in rows] == [
        ["lora", ".", "16"],
        ["qlora", ".", "4"],
        ["emloc", "0.5", "16"],
        ["emloc_nf4", "0.5", "4"],
    ]
    for row, (ratio, bits) in zip(rows, HELD, strict=True):
        need = need_of(scheme_of(run_config, shaped(run_config), ratio, precision_of(bits)), work)
        columns = dict(zip(HEADER, row, strict=True))
        assert columns["peak GiB"] == f"{need.peak / GIB:.2f}"
        parts = sum(float(columns[part]) for part in ("weights", "adapter", "activations"))
        assert parts == pytest.approx(need.peak / GIB, abs=0.016)
        assert columns["fits"] == ("yes" if need.peak <= 0.6 * GIB * (1 - RESERVE) else "no")
    assert {row[8] for row in rows} == {"yes", "no"}
    assert "4 x 2 x 512 tokens a step, LoRA rank 4" in table


@pytest.mark.parametrize("method", ["emloc", "lora"])
def test_the_last_line_is_the_choice_of_compression_auto(method):
    run_config = cell_of(MIDDLE, "budget.gpu_gib=0.45", f"method={method}", "compression=r25")
    free = auto("budget.gpu_gib=0.45")
    chosen = fitting(free, shaped(free), WORK)
    assert chosen.bits == 4  # although the configuration sets 16
    expected = f"compression.ratio={chosen.ratio:g} compression.bits=4"
    last = plan(run_config, WORK, gpu_called("rtx4090")).splitlines()[-1]
    assert last == f"compression=auto: {expected}"
    none = plan(cell_of(SMALL), WORK, gpu_called("rtx4090")).splitlines()[-1]
    assert none == "compression=auto: set budget.gpu_gib to see what it would choose"
    small = plan(cell_of(MIDDLE, "budget.gpu_gib=0.1"), WORK, gpu_called("rtx4090"))
    assert small.splitlines()[-1] == f"compression=auto: budget.gpu_gib=0.1: no ratio fits; {REST}"


def test_the_seconds_of_a_step_are_proportional_to_its_passes():
    run_config = cell_of(MIDDLE)
    scheme = scheme_of(run_config, shaped(run_config), 0.5, None)
    one, four = (
        cost_of(scheme, replace(WORK, accumulate=n), 5000, GPUS["h200"], 64, run_config.budget)
        for n in (1, 4)
    )
    assert four.step_seconds == pytest.approx(4 * one.step_seconds)
    assert one.step_seconds >= 5000 * 18e-6
    assert (four.host, four.disk, four.build_seconds) == (one.host, one.disk, one.build_seconds)
    assert one.disk > scheme.factors


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"^--gpu gt710: one of rtx3090, rtx4090, "):
        gpu_called("gt710")


# In a run -----------------------------------------------------------------------------------------


def test_budgets_have_separate_folders_only_with_compression_auto():
    def name(*overrides):
        return folder_name(compose(["tracker=none", *overrides]))

    assert name("budget.gpu_gib=24") == name("budget.gpu_gib=12") == name()
    solved = {
        name("compression=auto", *more)
        for more in ((), ("budget.gpu_gib=24",), ("budget.gpu_gib=12",))
    }
    assert len(solved | {name()}) == 4
    assert name("compression=auto", "budget.host_gib=1") in solved


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device would be held to so little")
def test_a_run_uses_the_solution_of_compression_auto(tiny, tmp_path, caplog):
    wide = save_checkpoint(tmp_path / "wide", **WIDE)
    settings = [*tiny, f"model.source={wide}", "compression=auto", "train.batch=1", "train.steps=1"]
    solutions = {}
    for mib in BUDGETS_MIB:
        run_config = build(compose([*settings, "method=emloc", f"budget.gpu_gib={mib / 1024}"]))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            result = run(run_config, Store(tmp_path / "cache"), lambda step, values: None)
        facts = result.emulated.facts
        [line] = [one for one in caplog.messages if one.startswith("compression=auto")]
        ratio = float(line.split("ratio ")[1].split()[0])
        assert facts["share_of_linears"] == pytest.approx(ratio, abs=0.02)
        assert f"at {facts['bits']} bits" in line
        solutions[mib] = ratio, facts["bits"], result.stages["emulate"].key
    assert len(set(solutions.values())) == 2, solutions
