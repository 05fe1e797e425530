"""Whole runs on a tiny random model: reuse of stages, equal results, and resumed work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from composed import compose_cached
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from staged import curve_of, losses_of
from tiny import save_checkpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, set_seed

from emloc.adapters.saved import read_lora
from emloc.calibration.blockwise import block_of
from emloc.calibration.calibrate import calibrate
from emloc.calibration.moments import Statistics
from emloc.calibration.samples import Samples, choose_examples
from emloc.data.reader import encode_all
from emloc.emulators import BuiltEmulator
from emloc.errors import ConfigError, StageError
from emloc.stages.run_config import build

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"


def adapter_of(artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.folder / "adapter" / "adapter_model.safetensors")


def product_of(artifact) -> dict[str, torch.Tensor]:
    return {k: p.delta for k, p in read_lora(artifact.folder / "adapter").pairs.items()}


def test_a_second_run_reuses_every_stage(run_uncached, monkeypatch):
    first = run_uncached("method=emloc")
    monkeypatch.setattr(
        "emloc.runtime.stage_cache.Store._compute", lambda *_: pytest.fail("computed again")
    )
    assert run_uncached("method=emloc") == first


def test_another_clamp_repeats_only_recovery_and_evaluation(run_cached):
    first, second = run_cached("method=emloc"), run_cached("method=emloc", "recovery.clamp=1")
    assert (second.statistics, second.emulated, second.trained) == (
        first.statistics,
        first.emulated,
        first.trained,
    )
    assert second.recovered != first.recovered
    assert second.evaluated != first.evaluated


def test_another_rank_reuses_the_emulator_and_another_ratio_the_statistics(run_cached):
    first = run_cached("method=emloc")
    rank, ratio = (
        run_cached("method=emloc", "lora=r8"),
        run_cached("method=emloc", "compression=r25"),
    )
    assert rank.emulated == first.emulated
    assert rank.trained != first.trained
    assert ratio.statistics == first.statistics
    assert ratio.emulated != first.emulated


def test_lora_ignores_ratio_and_calibration(run_cached):
    assert run_cached("method=lora") == run_cached(
        "method=lora", "compression=r25", "calibration.seed=7"
    )


def test_seeds_share_the_emulator_but_not_the_training(run_cached):
    first, second = run_cached("method=emloc"), run_cached("method=emloc", "seed=1")
    assert first.emulated == second.emulated
    assert first.trained != second.trained


def test_clamp_zero_gives_the_uncorrected_adapter(run_cached):
    plain = product_of(run_cached("method=emloc_uncorrected").recovered)
    clamped = product_of(run_cached("method=emloc", "recovery.clamp=0").recovered)
    for name, delta in plain.items():
        torch.testing.assert_close(clamped[name], delta, atol=1e-7, rtol=1e-5)


def test_recovery_none_keeps_the_matrices(run_cached):
    result = run_cached("method=emloc_uncorrected")
    trained, recovered = adapter_of(result.trained), adapter_of(result.recovered)
    assert trained.keys() == recovered.keys()
    assert all(torch.equal(trained[name], recovered[name]) for name in trained)


@pytest.mark.parametrize("alpha", [2, 4, 8, 16])
def test_the_unclamped_correction_is_exact_on_the_row_space_for_any_scale(run_cached, tiny, alpha):
    """W x + s B'A' x = W_e x + s B A x holds for x in the rows of A, with the stored weights."""
    result = run_cached("method=emloc", "recovery.clamp=null", f"lora.alpha={alpha}")
    run_config = build(compose_cached([*tiny, "method=emloc"]))
    source = run_config.model.open()
    trained = read_lora(result.trained.folder / "adapter").pairs
    for layer, new in read_lora(result.recovered.folder / "adapter").pairs.items():
        old = trained[layer]
        residual = run_config.emulator.residual(result.emulated.folder, source, layer)
        corrected_outputs = (residual + new.delta.double()) @ old.a.double().T
        assert new.scale == alpha / 4
        torch.testing.assert_close(
            corrected_outputs, old.delta.double() @ old.a.double().T, atol=1e-6, rtol=0
        )


def test_covariance_reduces_the_error_of_every_layer(run_cached):
    """The metric guarantees this on the calibration activations."""
    recovered = run_cached("method=emloc_covariance").recovered
    changes = json.loads((recovered.folder / "layers.json").read_text())
    assert len(changes) == 14
    assert all(change["removed"] > 0 for change in changes.values())
    assert all(change["clamped"] == 0 for change in changes.values())


def test_peft_loads_the_adapter_on_the_original_model(run_cached, tiny, checkpoint, tmp_path):
    """PEFT alone loads the adapter and gives the reported losses."""
    result = run_cached("method=emloc")
    folder = shutil.copytree(result.recovered.folder / "adapter", tmp_path / "elsewhere")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    run_config = build(compose_cached(tiny))
    reader = run_config.model.open().reader()
    lines = (result.evaluated.folder / "predictions.jsonl").read_text().splitlines()
    rows = encode_all(reader, run_config.task.held_out(None), 2048)
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        start = row.answer_start
        nll = -logits[start - 1 : -1].gather(1, ids[0, start:, None]).sum()
        assert line["nll"] == pytest.approx(float(nll), abs=1e-4)
        assert line["tokens"] == len(row.input_ids) - start
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_lora_equals_peft_trained_by_hand(run_uncached, tiny, checkpoint):
    """The same steps, written with PEFT and torch alone, give equal losses."""
    losses = []
    recipe = ["train.schedule=constant", "train.learning_rate=0.05", "train.warmup=0"]
    run_uncached("method=lora", *recipe, report=lambda step, values: losses.append(values["loss"]))
    run_config = build(compose_cached([*tiny, "method=lora", *recipe]))
    reader = run_config.model.open().reader()
    rows = encode_all(reader, run_config.task.train(), 2048)
    order = _order_of_the_trainer(run_config, rows, reader)

    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    set_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=run_config.model.lora_targets)
    model = get_peft_model(model, config).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.05, weight_decay=0.01)
    by_hand = []
    for batch in order:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        by_hand.append(loss.item())
    assert losses == pytest.approx(by_hand, abs=1e-3)
    assert by_hand[-1] < by_hand[0] - 0.2


def _order_of_the_trainer(run_config, rows, reader):
    """Return the first five batches in the order of the Trainer's sampler."""
    from dataclasses import asdict

    from transformers import Trainer

    from emloc.stages.training.train import arguments

    data = [asdict(row) for row in rows]
    device = torch.device("cpu")
    args = arguments(
        run_config.train,
        run_config.seed,
        Path("unused"),
        torch.float32,
        device,
        lean=False,
        fused=False,
    )
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=data)
    set_seed(run_config.seed)
    loader = DataLoader(
        rows,
        batch_size=4,
        sampler=trainer._get_train_sampler(),
        collate_fn=reader.collate,
    )
    return [batch for batch, _ in zip(loader, range(5), strict=False)]


def test_checkpointing_does_not_change_the_adapter(run_cached):
    plain = adapter_of(run_cached("method=emloc", "train.batch=2", "train.accumulate=2").trained)
    again = adapter_of(
        run_cached(
            "method=emloc", "train.batch=2", "train.accumulate=2", "train.checkpointing=true"
        ).trained
    )
    assert any(tensor.any() for name, tensor in plain.items() if "lora_B" in name)
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-5)


def test_golden_curve(run_uncached):
    """The losses of five steps of EMLoC.

    Who changes the mathematics edits the golden file and gives the reason.
    """
    losses = []
    recipe = ["train.learning_rate=0.05", "train.schedule=constant"]
    recipe.append("emulator.shared=none")
    run_uncached("method=emloc", *recipe, report=lambda step, values: losses.append(values["loss"]))
    golden = json.loads((GOLDEN / "emloc_tiny_llama.json").read_text())
    assert losses == pytest.approx(golden, abs=2e-3)
    assert losses[-1] < losses[0] - 0.2


def interrupt(run_cached, *overrides):
    """Start a run and interrupt it in the third step of its training."""

    def stop(step, _):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cached(*overrides, report=stop)


def test_interrupted_training_resumes_from_its_checkpoint(run_uncached, store):
    whole = []
    run_uncached("method=lora", "train.save_every=2", report=lambda step, _: whole.append(step))
    shutil.rmtree(store.root / "train")
    interrupt(run_uncached, "method=lora", "train.save_every=2")
    steps = []
    result = run_uncached(
        "method=lora", "train.save_every=2", report=lambda step, _: steps.append(step)
    )
    assert (whole, steps) == ([1, 2, 3, 4, 5], [3, 4, 5])
    assert [line["step"] for line in curve_of(result.trained.folder)] == [1, 2, 3, 4, 5]
    assert not (result.trained.folder / "checkpoints").exists()


def test_a_resumed_training_gives_the_same_adapter(run_uncached, store):
    straight = adapter_of(run_uncached("method=lora", "train.save_every=2").trained)
    shutil.rmtree(store.root / "train")
    interrupt(run_uncached, "method=lora", "train.save_every=2")
    resumed = adapter_of(run_uncached("method=lora", "train.save_every=2").trained)
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)


def test_an_interrupted_build_resumes_with_the_next_block(run_uncached, store, monkeypatch):
    """Blocks with a finished file are not factorised again."""
    import emloc.emulators.svd as svd

    factorised = []
    real = svd.factorize

    def factorize(weights, *rest, **options):
        if len(factorised) == 1:
            factorised.append("interrupted")
            raise KeyboardInterrupt
        factorised.append(block_of(next(iter(weights))))
        return real(weights, *rest, **options)

    monkeypatch.setattr(svd, "factorize", factorize)
    with pytest.raises(KeyboardInterrupt):
        run_uncached("method=emloc")
    run_uncached("method=emloc")
    assert factorised == ["model.layers.0", "interrupted", "model.layers.1"]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(run_uncached, monkeypatch):
    from transformers import Trainer

    steps = []

    def poisoned(self, *_):
        steps.append(self.state.global_step)
        return torch.tensor(float("nan"))

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(StageError, match=r"loss is nan at step 1; set train.learning_rate lower"):
        run_uncached("method=lora")
    assert steps == [0]


@pytest.mark.parametrize("method", ["qlora", "emloc_nf4"])
def test_an_emulator_in_four_bits_is_trained_and_its_adapter_recovered(run_cached, tiny, method):
    """The emulator differs from 16 bits, the loss falls, and the original accepts the adapter."""
    recipe = [f"method={method}", "train.learning_rate=0.05", "train.schedule=constant"]
    result = run_cached(*recipe)
    losses = losses_of(result)
    wide = run_cached(*recipe, "compression.bits=16")
    four, sixteen = result.emulated.facts, wide.emulated.facts
    assert (four["bits"], sixteen["bits"]) == (4, 16)
    assert four["parameters"] == sixteen["parameters"]
    assert four["bytes"] < sixteen["bytes"]
    assert result.statistics == wide.statistics
    assert result.trained != wide.trained
    assert losses[-1] < losses[0] - 0.2
    adapter = read_lora(result.recovered.folder / "adapter").pairs
    assert len(adapter) == 14
    run_config = build(compose_cached([*tiny, f"method={method}"]))
    source = run_config.model.open()
    built_emulator = BuiltEmulator(
        run_config.emulator, result.emulated, source, run_config.precision
    )
    for layer in adapter:
        gap = built_emulator.residual(layer)
        assert float(gap.norm()) > 0.05 * float(source.weight(layer).norm())


def test_the_correction_includes_the_error_of_four_bits(run_cached, tiny):
    """W x + s B'A' x = W_e x + s B A x holds for x in the rows of A, with the stored four bits."""
    result = run_cached("method=emloc_nf4", "recovery.clamp=null", "lora.alpha=8")
    run_config = build(compose_cached([*tiny, "method=emloc_nf4"]))
    source = run_config.model.open()
    built_emulator = BuiltEmulator(
        run_config.emulator, result.emulated, source, run_config.precision
    )
    model = built_emulator.open(torch.device("cpu"))
    trained = read_lora(result.trained.folder / "adapter").pairs
    for layer, new in read_lora(result.recovered.folder / "adapter").pairs.items():
        old, emulator_weight = trained[layer], model.get_submodule(layer).product()
        rows = old.a.double().T
        corrected_outputs = (source.weight(layer).double() + new.delta.double()) @ rows
        right = (emulator_weight + old.delta.double()) @ rows
        torch.testing.assert_close(corrected_outputs, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [["emulator.aware=false"], ["emulator.algorithm=whiten"], ["emulator.algorithm=eigen"]],
)
def test_other_factorisations_run(run_cached, settings):
    layers = json.loads(
        (run_cached("method=emloc", *settings).emulated.folder / "layers.json").read_text()
    )
    assert {name.rsplit(".", 1)[1] for name in layers} >= {"q_proj", "down_proj"}
    assert all(0 < layer["kept"] < 1 for layer in layers.values())


def test_aware_factors_keep_more_of_the_outputs_than_plain_ones(run_cached, tiny):
    """Compares the output energy on the calibration tokens, with the stored factors."""
    aware, plain = run_cached("method=emloc"), run_cached("method=emloc", "emulator.aware=false")
    run_config = build(compose_cached(tiny))
    source = run_config.model.open()
    for block, layer in ((0, "self_attn.q_proj"), (1, "mlp.up_proj")):
        name = f"model.layers.{block}.{layer}"
        statistics = Statistics.load(aware.statistics.folder / f"model.layers.{block}.safetensors")
        gram = statistics.of(name)["input_gram"]
        gaps = [
            run_config.emulator.residual(r.emulated.folder, source, name) for r in (aware, plain)
        ]
        lost = [float((gap @ gram * gap).sum()) for gap in gaps]
        assert lost[0] < 0.9 * lost[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["lora.rank=99"],
            "lora.rank=99 is above the 16 x 32 of model.layers.0.self_attn.k_proj",
        ),
        (["model.lora_targets=nothing"], "model.lora_targets='nothing' matches no linear layer"),
        (["model.emulator_targets=no"], "model.emulator_targets='no' matches no linear layer"),
        (["compression.ratio=0.01"], "leaves rank 0"),
        (["calibration.samples=41"], "has only 40 rows to choose from"),
        (["task.train_split=dev"], "has no split dev; "),
        (["task.path=/nowhere"], "no folder /nowhere; set task.path"),
        (["model.source=/nowhere"], "no config.json there; set model.source"),
        (["task.prompt='{{nothing}}'"], "'nothing' is undefined; the columns are question, answer"),
        (["task.lm_eval=gsm9k", "eval.harness=true"], "gsm9k"),
    ],
)
def test_bad_settings_are_refused_before_any_weight_is_read(
    run_uncached, monkeypatch, overrides, message
):
    monkeypatch.setattr(
        "emloc.models.checkpoint.source.Source.read", lambda *_: pytest.fail("a weight was read")
    )
    with pytest.raises(ConfigError) as refused:
        run_uncached("method=emloc", *overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_empty_split_is_refused(run_cached, sums, tmp_path):
    folder = shutil.copytree(sums, tmp_path / "sums")
    (folder / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"train.jsonl is empty; set task.path"):
        run_cached(f"task.path={folder}")


def test_generic_calibration_without_the_hub_is_reported(run_uncached, caplog):
    result = run_uncached("method=emloc", "calibration=generic_64", "calibration.samples=4")
    assert "using docstrings of Python's library" in caplog.text
    assert len(result.statistics.facts["samples"]) == 4


def test_budget_of_the_whole_model(run_cached):
    facts = run_cached(
        "method=emloc", "compression.of=model", "compression.ratio=0.8"
    ).emulated.facts
    assert 0.75 < facts["share_of_model"] <= 0.8
    assert facts["share_of_linears"] < facts["share_of_model"]
    assert facts["bytes"] == 4 * facts["parameters"]


@pytest.mark.parametrize("method", ["qlora", "emloc_nf4"])
def test_training_in_four_bits_computes_in_16_bits_with_the_embedding_on_the_host(
    run_cached, method
):
    """Only the LoRA, in 32 bits, is left in the model then, and must not set the dtype."""
    losses = losses_of(run_cached("model.dtype=bfloat16", f"method={method}", "train.steps=3"))
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_the_reported_error_of_a_layer_is_that_on_the_calibration_tokens(
    run_cached, tiny, tmp_path
):
    """Compares the errors before and after with the full second moments of the layer inputs.

    The model has more than ten blocks, whose names an adapter file sorts as 0, 1, 10, 11, 2.
    """
    deep = f"model.source={save_checkpoint(tmp_path / 'deep', num_hidden_layers=12)}"
    result = run_cached("method=emloc_covariance", deep)
    run_config = build(compose_cached([*tiny, "method=emloc_covariance", deep]))
    source, layers = (
        run_config.model.open(),
        json.loads((result.recovered.folder / "layers.json").read_text()),
    )
    samples = Samples(choose_examples(run_config.task.train(), 6, 0), run_config.model.max_length)
    (tmp_path / "sums").mkdir()
    compressed = run_config.model.compressible_layers(source)
    calibrate(tmp_path / "sums", source, compressed, samples, True, device=CPU)
    trained = read_lora(result.trained.folder / "adapter").pairs
    for layer, new in read_lora(result.recovered.folder / "adapter").pairs.items():
        statistics = Statistics.load(tmp_path / "sums" / f"{block_of(layer)}.safetensors")
        second = statistics.of(layer)["input_gram"] / statistics.tokens
        gap = run_config.emulator.residual(result.emulated.folder, source, layer)
        remaining_error = gap + new.delta.double() - trained[layer].delta.double()
        for name, miss in (("mismatch_before", gap), ("mismatch_after", remaining_error)):
            energy = float(torch.einsum("ij,jk,ik->", miss, second, miss))
            assert layers[layer][name] == pytest.approx(energy, rel=2e-3)
    assert len(layers) == result.recovered.facts["corrected_layers"] == 84
    assert 0 < result.recovered.facts["mismatch_left"] < 1


def test_the_error_of_the_identity_metric_is_that_on_white_inputs(run_cached, tiny):
    result = run_cached("method=emloc")
    run_config = build(compose_cached([*tiny, "method=emloc"]))
    changes = json.loads((result.recovered.folder / "layers.json").read_text())
    for layer, change in changes.items():
        gap = run_config.emulator.residual(result.emulated.folder, run_config.model.open(), layer)
        assert change["mismatch_before"] == pytest.approx(float(gap.square().sum()))
        assert change["mismatch_after"] == pytest.approx(
            change["mismatch_before"] - change["removed"]
        )


def test_a_training_in_four_bits_is_also_scored_as_trained(run_cached, tiny):
    """Compared with the training model, opened by hand."""
    plain, result = run_cached("method=lora"), run_cached("method=qlora")
    assert plain.as_trained is None
    scores = result.as_trained.facts["scores"]
    assert scores["loss"] != result.evaluated.facts["scores"]["loss"]
    run_config = build(compose_cached([*tiny, "method=qlora"]))
    source = run_config.model.open()
    model = BuiltEmulator(run_config.emulator, result.emulated, source, run_config.precision).open(
        CPU
    )
    model = PeftModel.from_pretrained(model, result.trained.folder / "adapter").eval()
    encoded = encode_all(source.reader(), run_config.task.held_out(64), run_config.model.max_length)
    answers = source.objective.score(model, encoded, source.reader(), 4)
    summary = source.objective.summary(answers, run_config.task.held_out(64))
    assert summary["loss"] == pytest.approx(scores["loss"], rel=1e-5)


def test_the_correction_reduces_the_error_of_quantisation(run_cached):
    """The correction removes from a QLoRA adapter what it learnt against rounding errors."""
    plain = run_cached("method=qlora")
    result = run_cached("method=qlora", "recovery=correction_covariance")
    assert result.trained == plain.trained
    assert result.recovered.facts["corrected_layers"] == 14
    assert 0 < result.recovered.facts["mismatch_left"] < 1
    assert result.evaluated.facts["scores"] != plain.evaluated.facts["scores"]


def test_a_training_reports_the_seconds_of_a_step(run_uncached):
    facts = run_uncached("method=lora").trained.facts
    assert 0 < facts["step_seconds"] < facts["seconds"]
