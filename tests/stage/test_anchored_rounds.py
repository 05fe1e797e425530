"""Rounds of an anchored training: exact at each start, undone if worse, resumed to the bit."""

import json
from dataclasses import replace

import anchored
import pytest
import torch
from safetensors.torch import load_file
from staged import curve_of
from tiny import save_checkpoint

import emloc.anchors.record as record_module
import emloc.stages.training.round_steps as steps_module
import emloc.stages.training.rounds as rounds_module
import emloc.stages.training.trainer as trainer_module
from emloc.anchors.batches import OFFSETS
from emloc.anchors.blocks import Blocks
from emloc.anchors.formats import Floats
from emloc.anchors.guard import Change
from emloc.anchors.logits import Logits
from emloc.anchors.places import Place
from emloc.anchors.recorder import OffsetRecorder
from emloc.anchors.shards import read_rows
from emloc.config.run_folder import Run
from emloc.data.examples import Examples
from emloc.data.prompts import EncodedExample
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.recovery.none import NoRecovery
from emloc.report.tracking.metrics_log import Record, training_line
from emloc.stages.training.round_passes import RoundPasses
from emloc.stages.training.round_steps import RoundSteps
from emloc.stages.training.rounds import ROUNDS_FILE, Rounds
from emloc.stages.training.train import train
from emloc.stages.training.trainer import FiniteTrainer

SVD = Svd(algorithm="eigen", aware=True, multiple=1)
COMMON = {"rounds": 3, "dtype": "float32", "guard": 2}
BLOCKS = Blocks(places=2, **COMMON)
LOGITS = Logits(**COMMON)
# Both paths of training, each with one kind of anchor.
EACH_PATH = pytest.mark.parametrize(
    ("anchor", "lean"), [(BLOCKS, True), (LOGITS, False)], ids=["blocks-lean", "logits-plain"]
)


@pytest.fixture(scope="module")
def built(made_once, tmp_path_factory):
    """An emulator of a model with two blocks."""
    folder = made_once("checkpoint", save_checkpoint)
    source = Source(folder, "tiny", "0", torch.float32)
    return anchored.build_emulator(tmp_path_factory.mktemp("emulator"), source, SVD, 16)


def record_losses(monkeypatch) -> list[dict]:
    """Return a list that gets, of each pass, the losses of all its rows."""
    passes, real = [], RoundPasses._record

    def record(self, folder, *rest):
        facts = real(self, folder, *rest)
        passes.append(facts["losses"])
        return facts

    monkeypatch.setattr(RoundPasses, "_record", record)
    return passes


def loss_of_step(training: Rounds, step: int, losses: dict) -> float:
    """Return the mean loss of a step's answer tokens that a pass has measured."""
    measured = [losses[row.key] for row in training.rows.of_steps(step, step + 1)]
    return sum(loss for loss, _ in measured) / sum(items for _, items in measured)


@EACH_PATH
def test_each_round_begins_with_the_loss_of_the_original(
    tmp_path, built, monkeypatch, anchor, lean
):
    """With the adapter of its start; other steps have other losses."""
    passes = record_losses(monkeypatch)
    training = anchored.rounds(tmp_path / "training", built, anchor, lean=lean, accumulate=2)
    facts = training.run()
    assert facts["passes"] == 4
    curve = curve_of(training.folder)
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    for losses, step in zip(passes, [0, 2, 4], strict=False):
        assert curve[step]["loss"] == pytest.approx(loss_of_step(training, step, losses), abs=2e-5)
        # The adapter has changed since the pass.
        later = loss_of_step(training, step + 1, losses)
        assert abs(curve[step + 1]["loss"] - later) > 1e-3


def test_later_rounds_are_trained_under_autocast_too(tmp_path, made_once, monkeypatch):
    """In 16 bits, with the modules of PEFT, which cast no operands."""
    source = Source(made_once("checkpoint", save_checkpoint), "tiny", "0", torch.bfloat16)
    (tmp_path / "emulator").mkdir()
    built = anchored.build_emulator(tmp_path / "emulator", source, SVD, 16)
    passes = record_losses(monkeypatch)
    training = anchored.rounds(tmp_path / "training", built, BLOCKS, lean=False)
    training.run()
    curve = curve_of(training.folder)
    for losses, step in zip(passes, [0, 2, 4], strict=False):
        assert curve[step]["loss"] == pytest.approx(loss_of_step(training, step, losses), abs=5e-4)


def judge(monkeypatch, *verdicts: bool) -> None:
    """Let the safeguard find each round worse or not, as the verdicts say."""
    answers = iter(verdicts)
    monkeypatch.setattr(
        rounds_module, "change_between", lambda *_: Change(1.0 if next(answers) else -1.0, 0.1)
    )


def rows_trained_on(monkeypatch) -> list[list[str]]:
    """Return a list that gets the keys of each batch whose loss is computed."""
    batches, keys_of = [], {}
    collate, take = steps_module.AnchoredCollator.__call__, trainer_module.take_offsets

    def collate_and_note(self, rows):
        batch = collate(self, rows)
        keys_of[batch[OFFSETS]] = [row.key for row in rows]
        return batch

    def note_and_take(batch, device):
        batches.append(keys_of[batch[OFFSETS]])
        return take(batch, device)

    monkeypatch.setattr(steps_module.AnchoredCollator, "__call__", collate_and_note)
    monkeypatch.setattr(trainer_module, "take_offsets", note_and_take)
    return batches


def test_a_rejected_round_is_undone_and_its_rows_are_used_up(tmp_path, built, monkeypatch):
    """Adapter, optimizer and schedule are those of its start."""
    undisturbed = anchored.rounds(tmp_path / "undisturbed", built, BLOCKS)
    undisturbed.run()
    passes, batches = record_losses(monkeypatch), rows_trained_on(monkeypatch)
    judge(monkeypatch, False, True, False)
    checkpoints = {}
    finish = Rounds._finish

    def keep_checkpoints(self, *rest):
        assert not [*self.folder.glob("pass-*/place-*")]  # each was deleted after its round
        for path in self.folder.glob("round-*/checkpoints/*/optimizer.pt"):
            state = torch.load(path)["state"]
            checkpoints[path.parts[-4], path.parts[-2]] = {
                one["step"].item() for one in state.values()
            }
        return finish(self, *rest)

    monkeypatch.setattr(Rounds, "_finish", keep_checkpoints)
    training = anchored.rounds(tmp_path / "training", built, BLOCKS)
    facts = training.run()
    assert (facts["rejected_rounds"], facts["steps"], facts["passes"]) == (1, 4, 5)
    curve, other = curve_of(training.folder), curve_of(undisturbed.folder)
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    # Rows: each step has those of the undisturbed training, and is used once.
    order = [key for batch in batches for key in batch]
    assert order == [row.key for step in range(6) for row in training.rows.of_steps(step, step + 1)]
    # Adapter: the third round begins with the original's loss with the adapter of step 2.
    assert curve[4]["loss"] == pytest.approx(loss_of_step(training, 4, passes[3]), abs=2e-5)
    assert curve[2]["loss"] == other[2]["loss"]
    assert abs(curve[4]["loss"] - other[4]["loss"]) > 1e-3
    # Schedule: half the rate of steps 3 and 4.
    assert [line["learning_rate"] for line in curve[4:]] == pytest.approx(
        [line["learning_rate"] / 2 for line in other[2:4]]
    )
    assert [line["learning_rate"] for line in curve[:4]] == [
        line["learning_rate"] for line in other[:4]
    ]
    # Optimizer: it has made two steps before the third round.
    assert checkpoints["round-000004-000006", "checkpoint-4"] == {4}
    lines = [json.loads(line) for line in (training.folder / ROUNDS_FILE).open()]
    assert [line["step"] for line in lines] == [0, 2, 4, 4, 6]
    assert [line["schedule_step"] for line in lines] == [0, 2, 4, 2, 4]
    assert [line.get("rejected") for line in lines] == [None, False, True, None, False]
    assert lines[1]["original_loss"] == lines[3]["original_loss"]


@pytest.mark.parametrize("best", [0, 1])
def test_the_third_rejection_ends_with_the_best_adapter(tmp_path, built, monkeypatch, best):
    """The best by its loss on the guard, among the starts of all rounds."""
    judge(monkeypatch, False, True, True, True)
    if best == 0:  # the original's loss falls here, so its negative is least at first
        real = rounds_module.mean_loss
        monkeypatch.setattr(rounds_module, "mean_loss", lambda losses: -real(losses))
    anchor = Blocks(places=2, **(COMMON | {"rounds": 6}))
    training = anchored.rounds(tmp_path / "training", built, anchor, schedule="constant")
    states = [training.trainee._new_state]
    finish_round = RoundSteps.run

    def keep_state(self, *rest):
        result = finish_round(self, *rest)
        states.append(load_file(result.state.checkpoint / "adapter_state.safetensors"))
        return result

    monkeypatch.setattr(RoundSteps, "run", keep_state)
    facts = training.run()
    assert (facts["rejected_rounds"], facts["steps"], len(states)) == (3, best, 5)
    curve = curve_of(training.folder)
    assert [line["learning_rate"] for line in curve] == [0.02, 0.02, 0.01, 0.005]
    assert [line["step"] for line in curve] == [1, 2, 3, 4]
    saved = load_file(training.folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(states[best])
    for name, tensor in states[best].items():
        assert torch.equal(saved[name.replace(".default", "")], tensor)


def break_losses(monkeypatch, *steps: int) -> None:
    """Let the losses of these steps be no number; a step is counted with those of rejected rounds.

    The last pass of a step has it alone.
    """
    real = FiniteTrainer.compute_loss

    def compute(self, model, inputs, *rest, **named):
        loss = real(self, model, inputs, *rest, **named)
        is_last = self.accelerator.gradient_state.sync_gradients
        step = self.state.global_step + self._skipped + 1
        return loss * torch.nan if step in steps and is_last else loss

    monkeypatch.setattr(FiniteTrainer, "compute_loss", compute)


def test_a_loss_that_is_not_finite_rejects_its_round(tmp_path, made_once, monkeypatch, caplog):
    """Training goes on as behind a round that the guard rejects, to the bit, and in autocast."""
    source = Source(made_once("checkpoint", save_checkpoint), "tiny", "0", torch.bfloat16)
    (tmp_path / "emulator").mkdir()
    built = anchored.build_emulator(tmp_path / "emulator", source, SVD, 16)
    recipe = {"lean": False, "accumulate": 2}
    with monkeypatch.context() as patch:
        judge(patch, False, True, False)
        rejected = anchored.rounds(tmp_path / "rejected", built, BLOCKS, **recipe)
        rejected.run()
    break_losses(monkeypatch, 4)
    judge(monkeypatch, False, False)
    training = anchored.rounds(tmp_path / "training", built, BLOCKS, **recipe)
    with caplog.at_level("WARNING"):
        facts = training.run()
    assert (facts["rejected_rounds"], facts["steps"], facts["passes"]) == (1, 4, 4)
    curve = curve_of(rejected.folder)
    assert curve_of(training.folder) == [line for line in curve if line["step"] != 4]
    assert results(training)[0] == results(rejected)[0]
    lines = [json.loads(line) for line in (training.folder / ROUNDS_FILE).open()]
    assert lines[2] == {"step": 4, "schedule_step": 2, "rate": 1.0, "rejected": True}
    assert (
        "train: the loss is nan at step 4, so the round is rejected, and training goes back to "
        "step 2; learning rate x 0.5"
    ) in caplog.messages


def test_a_round_with_a_broken_adapter_is_rejected_before_an_emulator_is_fitted(
    tmp_path, built, monkeypatch
):
    """A gradient that is not finite breaks the adapter after the loss of the round's last step."""
    calls, real = [], steps_module.unshard_parameters

    def unshard(model):
        real(model)
        calls.append(model)
        if len(calls) == 2:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.inf)

    monkeypatch.setattr(steps_module, "unshard_parameters", unshard)
    anchor = replace(BLOCKS, refit=True)
    training = anchored.rounds(tmp_path, built, anchor, calibration=anchored.samples())
    assert training.run()["rejected_rounds"] == 1
    assert len(calls) == 3


def test_a_training_killed_behind_a_broken_round_resumes_to_the_same_bits(
    tmp_path, built, monkeypatch
):
    break_losses(monkeypatch, 4)
    straight = anchored.rounds(tmp_path / "straight", built, BLOCKS)
    straight.run()
    folder, metrics = tmp_path / "training", Metrics(tmp_path / "run")
    with pytest.raises(Killed):
        metrics.record(anchored.rounds(folder, built, BLOCKS), stop=6)
    monkeypatch.undo()  # the broken round is not trained again
    resumed = anchored.rounds(folder, built, BLOCKS)
    metrics.record(resumed)
    assert results(resumed) == results(straight)


def test_the_third_round_that_is_not_finite_ends_with_the_best_adapter(
    tmp_path, built, monkeypatch
):
    break_losses(monkeypatch, 2, 3, 4)
    judge(monkeypatch, False)
    anchor = Blocks(places=2, **(COMMON | {"rounds": 6}))
    training = anchored.rounds(tmp_path, built, anchor)
    facts = training.run()
    assert (facts["rejected_rounds"], facts["steps"]) == (3, 1)
    assert [line["step"] for line in curve_of(training.folder)] == [1]


@pytest.mark.parametrize(("guard", "step"), [(0, 3), (2, 4)])
def test_a_loss_that_is_not_finite_ends_a_training_without_a_round_to_go_back_to(
    tmp_path, built, monkeypatch, guard, step
):
    """At once without a guard, and else when all rounds were tried."""
    break_losses(monkeypatch, 2, step)
    anchor = Blocks(places=2, **(COMMON | {"rounds": 2, "guard": guard}))
    training = anchored.rounds(tmp_path, built, anchor, steps=4)
    step = step if guard else 2
    with pytest.raises(FloatingPointError) as caught:
        training.run()
    assert str(caught.value) == f"the loss is nan at step {step}; set train.learning_rate lower"


def test_rows_of_the_guard_are_never_trained_on(tmp_path, built, monkeypatch):
    """Nor are rows that equal one of them."""
    batches = rows_trained_on(monkeypatch)
    rows = anchored.sums(12).rows
    twins = tuple(replace(row, id=f"{row.id}/again") for row in rows)
    training = anchored.rounds(
        tmp_path / "training", built, BLOCKS, examples=Examples("sums", rows + twins), steps=12
    )
    training.run()
    guard = {row.key for row in training.rows.guard}
    seen = {key for batch in batches for key in batch}
    assert len(guard) == 2
    assert len(seen) == 10
    assert not guard & seen


def test_a_row_that_is_drawn_twice_is_stored_once(tmp_path, built, monkeypatch):
    anchor = Blocks(places=1, **(COMMON | {"rounds": 1}))
    stored, real = [], RoundPasses._record

    def record(self, folder, *rest):
        facts = real(self, folder, *rest)
        stored.extend(row for shard in read_rows(folder) for row in shard)
        return facts

    monkeypatch.setattr(RoundPasses, "_record", record)
    examples = anchored.sums(8)
    training = anchored.rounds(tmp_path / "training", built, anchor, examples=examples, steps=7)
    assert len(training.rows.order.of_steps(0, 7)) == 14
    training.run()
    assert sorted(stored) == sorted({row.key for row in training.rows.rows})
    assert len(stored) == 6


@pytest.mark.parametrize("anchor", [BLOCKS, LOGITS], ids=["blocks", "logits"])
def test_the_disk_has_to_hold_the_tokens_with_an_offset(tmp_path, built, anchor):
    """In front of the head these are the answer tokens alone."""
    training = anchored.rounds(tmp_path / "training", built, anchor)
    keyed = training.rows.of_steps(0, 2)
    batch = anchored.collate_rows([one.row for one in keyed])
    tokens = sum(int(place.tokens(batch).sum()) for place in training.rows.places)
    size = tokens * anchor.stored_as.token_bytes(built.source.config.hidden_size)
    replace(training.rows, disk_gib=size / 2**30)._require_disk(tmp_path, keyed)
    with pytest.raises(ConfigError, match=f"{tokens // len(training.rows.places)} tokens at"):
        replace(training.rows, disk_gib=(size - 1) / 2**30)._require_disk(tmp_path, keyed)


def test_a_first_token_is_predicted_by_none():
    """A row that is an answer from its first token on has an offset less than it has tokens."""
    row = EncodedExample("row", [5, 6, 7], answer_start=0)
    place = Place("lm_head", at_input=True, predicting_only=True)
    assert place.count(row) == place.tokens(anchored.collate_rows([row])).sum() == 2


class Polish(NoRecovery):
    """A recovery that trains the adapter on the original, as plug-ins do."""

    def recover(self, folder, inputs):
        raise AssertionError("the recovery has a stage of its own")


def test_a_recovery_that_trains_is_left_to_its_stage(tmp_path, built):
    training = anchored.rounds(tmp_path / "training", built, replace(BLOCKS, rounds=2), steps=2)
    training.passes.recovery = Polish()
    assert training.run()["passes"] == 3


class Killed(BaseException):
    """What ends a training in a test."""


def results(training: Rounds) -> list:
    """Return all that a finished training has written."""
    folder = training.folder
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return [
        {name: tensor.tolist() for name, tensor in adapter.items()},
        *((folder / name).read_text() for name in ("curve.jsonl", ROUNDS_FILE)),
    ]


class Metrics:
    """The log of a run's numbers in a folder, as the command writes it."""

    def __init__(self, folder) -> None:
        self._run = Run(folder)
        folder.mkdir(exist_ok=True)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self._run.folder / "metrics.jsonl").open()]

    def record(self, training: Rounds, stop: int | None = None) -> None:
        """Run a training and record its numbers, behind those of a stage, until a step."""
        with Record(self._run) as record:

            def report(step, values):
                if step == stop and "loss" in values:
                    raise Killed
                record.add(training_line(step, values))

            if not self._run.folder.joinpath("metrics.jsonl").exists():
                record.add({"emulate/bytes": 1.0})
            training.steps.report = report
            training.run()


@pytest.fixture(scope="module")
def uninterrupted(built, tmp_path_factory):
    """A training that was not interrupted, and its recorded numbers."""
    folder = tmp_path_factory.mktemp("straight")
    training = anchored.rounds(folder / "training", built, BLOCKS)
    metrics = Metrics(folder / "run")
    metrics.record(training)
    return training, metrics.lines()


@pytest.fixture(scope="module")
def straight(uninterrupted):
    """Results and recorded numbers of a training that was not interrupted."""
    training, lines = uninterrupted
    return results(training), lines


def test_metrics_name_no_number_of_a_step_twice(straight):
    """With the original's loss at the end of each round; no line of a stage is lost."""
    _, (stage, *lines) = straight
    assert stage == {"emulate/bytes": 1.0}
    assert [line["train/step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    with_loss, measured = (
        [line["train/step"] for line in lines if name in line]
        for name in ("train/loss", "train/original_loss")
    )
    assert with_loss == [1, 2, 3, 4, 5, 6]
    assert measured == [0, 2, 4, 6]


# At the last step of the first round, in the middle of the second, and at the last step of the
# third with its newest checkpoint damaged.
@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_training_killed_in_a_round_resumes_to_the_same_bits(tmp_path, built, straight, step):
    folder, metrics = tmp_path / "training", Metrics(tmp_path / "run")
    with pytest.raises(Killed):
        metrics.record(anchored.rounds(folder, built, BLOCKS), stop=step)
    if step == 6:
        (folder / "round-000004-000006/checkpoints/checkpoint-5/optimizer.pt").unlink()
    resumed = anchored.rounds(folder, built, BLOCKS)
    metrics.record(resumed)
    assert (results(resumed), metrics.lines()) == straight


@pytest.mark.parametrize(("restart", "averaged"), [(False, [2, 4, 6]), (True, [2, 2, 2])])
def test_a_round_may_begin_without_the_averages_of_gradients(
    tmp_path, built, monkeypatch, restart, averaged
):
    """Killed in the middle of a round, it goes on with those of the round."""
    steps, keep = [], RoundSteps._keep

    def note(self, folder, state, last, skipped):
        file = folder / "checkpoints" / f"checkpoint-{last}" / "optimizer.pt"
        states = torch.load(file, weights_only=True)["state"].values()
        steps.extend({int(one["step"]) for one in states})
        return keep(self, folder, state, last, skipped)

    restarting = replace(BLOCKS, restart=restart)
    whole = anchored.rounds(tmp_path / "whole", built, restarting)
    with monkeypatch.context() as patch:
        patch.setattr(RoundSteps, "_keep", note)
        Metrics(tmp_path / "run").record(whole)
    assert steps == averaged
    killed = anchored.rounds(tmp_path / "killed", built, restarting)
    with pytest.raises(Killed):
        Metrics(tmp_path / "killed_run").record(killed, stop=3)
    resumed = anchored.rounds(tmp_path / "killed", built, restarting)
    Metrics(tmp_path / "killed_run").record(resumed)
    assert results(resumed) == results(whole)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.usefixtures("every_place_marked")
def test_a_training_killed_in_a_pass_resumes_to_the_same_bits(
    tmp_path, built, straight, uninterrupted, monkeypatch, number
):
    """Behind a place of the second and third pass, and in the last one, which only measures.

    The arithmetic of the killed attempt counts. The last pass is not resumed, so that it counts
    more than once.
    """
    folder, metrics = tmp_path / "training", Metrics(tmp_path / "run")
    real = OffsetRecorder.finish_place_behind
    originals, calls = record_module._Pass._originals, []

    def finish(self, block):
        real(self, block)
        if self._folder.name == f"pass-{number:03d}":
            raise Killed

    def one_original(self, *args):
        for block in originals(self, *args):
            yield block
            if number == 3 and self.folder.name == "pass-003":
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OffsetRecorder, "finish_place_behind", finish)
        patch.setattr(record_module._Pass, "_originals", one_original)
        with pytest.raises(Killed):
            metrics.record(anchored.rounds(folder, built, BLOCKS))

    def noted_originals(self, *args):
        for block in originals(self, *args):
            calls.append((self.folder.name, block.name))
            yield block

    monkeypatch.setattr(record_module._Pass, "_originals", noted_originals)
    resumed = anchored.rounds(folder, built, BLOCKS)
    metrics.record(resumed)
    assert (results(resumed), metrics.lines()) == straight
    first = "model.layers.0" if number == 3 else "model.layers.1"
    assert calls[0] == (f"pass-{number:03d}", first)
    forwards = uninterrupted[0].passes.row_forwards
    if number < 3:
        assert resumed.passes.row_forwards == pytest.approx(forwards)
    else:
        assert resumed.passes.row_forwards > forwards


@EACH_PATH
def test_offsets_of_zero_change_no_bit_of_a_training(tmp_path, built, monkeypatch, anchor, lean):
    """Neither in one round nor in several; with accumulation."""
    recipe = {"lean": lean, "accumulate": 2}
    (tmp_path / "plain").mkdir()
    inputs = anchored.training_inputs(built, **recipe)
    train(tmp_path / "plain", built, inputs, device=anchored.CPU, report=lambda _, __: None)
    anchor = replace(anchor, guard=0)
    anchored.rounds(tmp_path / "offsets", built, anchor, **recipe).run()
    encode = Floats.encode
    monkeypatch.setattr(Floats, "encode", lambda self, x: encode(self, torch.zeros_like(x)))
    anchored.rounds(tmp_path / "zeros", built, anchor, **recipe).run()
    plain, offsets, zeros = (
        [
            load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"),
            [line["loss"] for line in curve_of(tmp_path / name)],
        ]
        for name in ("plain", "offsets", "zeros")
    )
    assert zeros[1] == plain[1] != offsets[1]
    assert zeros[0].keys() == plain[0].keys()
    assert all(torch.equal(tensor, zeros[0][name]) for name, tensor in plain[0].items())
