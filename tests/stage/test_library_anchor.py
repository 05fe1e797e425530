"""`emloc.anchor` in a user's own loop: the emulator computes the original, or it is refused."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IMAGE_TOKEN, tiny_internvl, tiny_llama, tiny_tokenizer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import emloc
from emloc import ConfigError
from emloc.anchors.formats import FORMATS, Floats
from emloc.library.anchored_forward import AnchoredForward
from emloc.library.anchored_original import adapted_original
from emloc.library.anchored_rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")

LENGTHS = (9, 14, 5, 11, 20, 8, 7, 13)
EXACT = {"rtol": 0, "atol": 1e-9}


def make_rows(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"name": str(n), "input_ids": torch.randint(5, 240, (n,), generator=generator)}
        for n in LENGTHS
    ]


def on_the_right(rows):
    """Pad as a user's own collator does; the loss is on all tokens but the first three."""
    for row in rows:
        row.pop("name", None)  # some collators of transformers change the rows, too
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = row["input_ids"]
        mask[index, : len(row["input_ids"])] = 1
    labels = torch.where((mask.cumsum(-1) > 3) & (mask > 0), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def on_the_left(rows):
    batch = on_the_right(rows)
    shifts = [int(length) for length in (batch["attention_mask"] == 0).sum(-1)]
    batch = {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for name, value in batch.items()
    }
    return batch | {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(
        tiny_tokenizer(chat=False), num_hidden_layers=3, tie_word_embeddings=True
    ).double()


@pytest.fixture(scope="module")
def built(model):
    return emloc.build_emulator(model, [on_the_right(make_rows(seed=9))], 0.5)


@pytest.fixture
def emulator(built):
    return copy.deepcopy(built)


@pytest.fixture(autouse=True)
def _offsets_in_float64(monkeypatch):
    """Let `float32` store all digits, so that tests of exactness have a tight bar."""
    monkeypatch.setitem(FORMATS, "float32", Floats(torch.float64))


def attach(emulator, seed: int | None = 0, **settings):
    """A PEFT model in evaluation mode; with a seed its LoRA is no zero update."""
    values = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    tuned = get_peft_model(emulator, LoraConfig(**(values | settings)))
    if seed is not None:
        change(tuned, seed)
    return tuned.eval()


def change(tuned, seed: int) -> None:
    """Change the adapter, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(tuned):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(0.1 * noise)


def trained(tuned):
    return [parameter for parameter in tuned.parameters() if parameter.requires_grad]


def with_adapter(model, tuned, folder):
    """The original with the adapter of an emulator, as a user loads it after a training."""
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def anchored(model, tuned, rows, collate=on_the_right, **settings):
    return emloc.anchor(model, tuned, rows, collate, **({"dtype": "float32"} | settings))


def loader(anchors, rows, size: int = 2, **settings):
    values = {"sampler": anchors.sampler, "collate_fn": anchors.collate}
    return DataLoader(rows, size, **(values | settings))


def assert_exact(tuned, original, batch):
    """Loss and logits of an anchored batch are the original's, and only of an anchored one."""
    plain = {name: value for name, value in batch.items() if name != ROWS}
    with torch.no_grad():
        apart, target = tuned(**plain), original(**plain)
    output = tuned(**batch)
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(output.logits[tokens], target.logits[tokens], **EXACT)
    assert abs(output.loss - target.loss) < 2e-6  # transformers computes the loss in float32
    assert (apart.logits - target.logits)[tokens].abs().max() > 1e-2


def refusal(call, *arguments, **settings) -> str:
    with pytest.raises(ConfigError) as refused:
        call(*arguments, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collate", "settings", "workers"),
    [
        (on_the_right, {"batch_tokens": 40}, 0),
        (on_the_left, {"places": 2}, 1),
        (on_the_right, {"places": [0]}, 0),
    ],
)
def test_every_batch_of_a_plain_loop_is_the_original_s(
    model, emulator, tmp_path, collate, settings, workers
):
    rows, tuned = make_rows(), attach(emulator)
    original = with_adapter(model, tuned, tmp_path)
    with anchored(model, tuned, rows, collate, **settings) as anchors:
        for batch in loader(anchors, rows, 3, num_workers=workers):
            assert_exact(tuned, original, batch)
        with torch.no_grad():
            loss = original(**collate(rows)).loss
        assert anchors.loss == pytest.approx(float(loss), rel=1e-5)


def test_the_second_round_is_exact_with_the_adapter_of_its_start(model, emulator, tmp_path):
    rows, tuned = make_rows(), attach(emulator, None, modules_to_save=["lm_head"])
    with anchored(model, tuned, rows, round_rows=4) as anchors:
        batches = iter(loader(anchors, rows))
        assert_exact(tuned, model, next(batches))
        assert not anchors.is_round_over
        change(tuned, 1)
        tuned(**next(batches)).loss.backward()
        assert anchors.is_round_over
        batch = next(batches)  # read ahead, as loaders do
        assert "row 4 is not in this round, which has the rows 0 to 3" in refusal(tuned, **batch)
        first_loss = anchors.loss
        anchors.renew()
        assert anchors.loss != first_loss
        assert not anchors.is_round_over
        original = with_adapter(model, tuned, tmp_path)
        again = DataLoader(rows[4:], 2, collate_fn=anchors.collate)
        for one in again:
            assert_exact(tuned, original, one)
        assert anchors.is_round_over
        anchors.renew()  # the next epoch
        assert_exact(tuned, original, next(iter(loader(anchors, rows))))


def pictured():
    """A model with a vision tower, rows with an image at different places, and their collation."""
    torch.manual_seed(0)
    rows = [
        {"input_ids": torch.randint(10, 200, (9,)), "pixel_values": torch.randn(3, 28, 28).double()}
        for _ in range(4)
    ]
    for index, row in enumerate(rows):
        row["input_ids"][1 + index : 5 + index] = IMAGE_TOKEN

    def collate(some):
        batch = {name: torch.stack([row[name] for row in some]) for name in some[0]}
        return batch | {"labels": batch["input_ids"]}

    return tiny_internvl().double(), rows, collate


def test_a_model_with_images_is_exact(tmp_path):
    """Its tower is emulated, too, so the emulator is also put back in front of the decoder."""
    model, rows, collate = pictured()
    tuned = attach(emloc.build_emulator(model, [collate(rows)], 0.5))
    original = with_adapter(model, tuned, tmp_path)
    with anchored(model, tuned, rows, collate) as anchors:
        for batch in loader(anchors, rows):
            assert_exact(tuned, original, batch | {"attention_mask": batch[ROWS].mask.long()})


@pytest.mark.parametrize("kind", ["transformers", "reentrant", "images"])
def test_recomputed_blocks_find_the_offsets_of_their_batch(model, emulator, kind):
    """Also if two batches are computed before one backward pass, with an evaluation in between."""
    rows, collate = make_rows(), on_the_right
    if kind == "images":
        model, rows, collate = pictured()
        emulator = emloc.build_emulator(model, [collate(rows)], 0.5)
    tuned = attach(emulator).train()
    gradients = []
    with anchored(model, tuned, rows, collate) as anchors:
        for recomputes in (False, True):
            if recomputes:
                recompute(tuned, kind)
            one, two = list(loader(anchors, rows, len(rows) // 2))
            loss = tuned(**one).loss + tuned(**two).loss
            if kind != "reentrant":
                with torch.no_grad():
                    tuned(**collate(copy.deepcopy(rows)))
            loss.backward()
            gradients.append([parameter.grad for parameter in trained(tuned)])
            tuned.zero_grad()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, **EXACT)


def recompute(tuned, kind: str) -> None:
    """Let the backward pass compute blocks anew: transformers without their hooks, torch with."""
    tuned.enable_input_require_grads()
    tuned.config.get_text_config().use_cache = False
    if kind == "transformers":
        tuned.gradient_checkpointing_enable()
    else:
        how = CheckpointImpl.REENTRANT if kind == "reentrant" else CheckpointImpl.NO_REENTRANT
        layers = tuned.base_model.model.get_decoder().layers
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer, how)


class Renewal(TrainerCallback):
    """Begins the next round of anchors in a Trainer."""

    def __init__(self, anchors):
        self.anchors = anchors

    def on_step_begin(self, *_, **__):
        if self.anchors.is_round_over:
            self.anchors.renew()


def test_the_trainer_does_what_a_plain_loop_does(model, built, tmp_path):
    """With rounds, accumulation, recomputation, and an evaluation of other rows after each step."""
    rows, others, adapters, losses = make_rows(), make_rows(1)[:2], [], []
    for by_trainer in (True, False):
        tuned = attach(copy.deepcopy(built), None)
        change(tuned, 0)
        with anchored(model, tuned, rows, round_rows=4) as anchors:
            if by_trainer:
                arguments = TrainingArguments(
                    str(tmp_path), max_steps=2, per_device_train_batch_size=2, max_grad_norm=0,
                    gradient_accumulation_steps=2, learning_rate=0.01, lr_scheduler_type="constant",
                    gradient_checkpointing=True, remove_unused_columns=False, report_to=[],
                    train_sampling_strategy="sequential", eval_strategy="steps", eval_steps=1,
                    use_cpu=True, disable_tqdm=True, save_strategy="no", optim="adamw_torch",
                )  # fmt: skip
                trainer = Trainer(
                    tuned, arguments, anchors.collate, rows, others, callbacks=[Renewal(anchors)]
                )
                trainer.train()
                assert anchors.is_round_over
            else:
                optimizer = torch.optim.AdamW(trained(tuned), lr=0.01, weight_decay=0)
                for batches in zip(*[iter(loader(anchors, rows))] * 2, strict=True):
                    if anchors.is_round_over:
                        anchors.renew()
                    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
                    for batch in batches:
                        tuned(**batch, num_items_in_batch=count).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(anchors.loss)
        adapters.append([parameter.detach() for parameter in trained(tuned)])
    for one, other in zip(*adapters, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("dtype", "bar"), [("bfloat16", 1e-3), ("int8", 1e-3)])
def test_rounded_offsets_are_nearly_exact(model, emulator, tmp_path, dtype, bar):
    rows, tuned = make_rows(), attach(emulator)
    original = with_adapter(model, tuned, tmp_path)
    with anchored(model, tuned, rows, dtype=dtype) as anchors:
        batch = anchors.collate(rows)
        output, target = tuned(**batch), original(**on_the_right(rows))
        error = (output.logits - target.logits)[batch["attention_mask"].bool()].abs().max()
        assert 1e-7 < error < bar


def test_a_cast_emulator_is_compared_with_the_original_as_it_is(model, emulator, tmp_path):
    tuned = attach(emulator.bfloat16(), modules_to_save=["lm_head"])
    target = with_adapter(model, tuned, tmp_path)(**on_the_right(make_rows()))
    adapted = adapted_original(model, emulator)
    assert adapted.weights is not None
    names = [name for name, _ in adapted.model.named_parameters()]
    adapted.weights.fill(adapted.model, names, torch.device("cpu"))
    assert adapted.model.lm_head.original_module.weight is adapted.model.model.embed_tokens.weight
    output = adapted.model(**on_the_right(make_rows()))
    torch.testing.assert_close(output.logits, target.logits, rtol=0, atol=1e-5)
    assert emulator.model.embed_tokens.weight.dtype == torch.bfloat16


# Rows ---------------------------------------------------------------------------------------------


def test_another_order_is_refused_in_training(model, emulator):
    rows, tuned = make_rows(), attach(emulator, None)
    with anchored(model, tuned, rows) as anchors:
        backwards = [[7, 6], [5, 4]]
        batch = next(iter(DataLoader(rows, batch_sampler=backwards, collate_fn=anchors.collate)))
        assert "given: 7, 6; draw them with anchors.sampler" in refusal(tuned, **batch)
        first, second, third, *_ = loader(anchors, rows, drop_last=True)
        tuned(**first)
        assert "given behind row 1: 4, 5; draw them" in refusal(tuned, **third)
        tuned(**second)
        tuned(**first)  # a loader may end an epoch early
        with torch.no_grad():
            tuned(**third)  # no training


def test_rows_that_come_twice_are_stored_once(model, emulator, tmp_path):
    rows, tuned = make_rows(), attach(emulator)
    drawn = [rows[index] for index in (0, 1, 0, 0, 2, 1)]
    original = with_adapter(model, tuned, tmp_path / "adapter")
    with anchored(model, tuned, drawn, folder=tmp_path / "offsets") as anchors:
        for batch in loader(anchors, drawn):
            assert_exact(tuned, original, batch)
    (listed,) = (tmp_path / "offsets").glob("*/rows.json")
    assert listed.read_text().count('"') == 2 * 3


def test_other_rows_and_batches_are_refused_in_training(model, built):
    rows, others = make_rows(), make_rows(1)
    one, two = (attach(copy.deepcopy(built), None) for _ in range(2))
    with anchored(model, one, rows) as anchors, anchored(model, two, rows) as other_anchors:
        mixed = anchors.collate([rows[0], others[1]])
        assert "a row that emloc.anchor was not given; pass all rows" in refusal(one, **mixed)
        plain = on_the_right(rows[:2])
        assert "collate with anchors.collate, or call anchors.close()" in refusal(one, **plain)
        crossed = other_anchors.collate(rows[:2])
        assert "collated for the anchors of another emulator" in refusal(one, **crossed)
        with torch.no_grad():
            loss = one(**plain).loss
            foreign = one(**anchors.collate(others)).loss
        assert loss == pytest.approx(float(built(**plain).loss))
        assert foreign == pytest.approx(float(built(**on_the_right(others)).loss))
        one.base_model.model._is_replica = True
        message = refusal(one, **anchors.collate(rows[:2]))
        assert "DataParallel; use DistributedDataParallel" in message


def test_a_collation_that_changes_rows_is_refused(model, built):
    rows = make_rows()

    def packed(some):
        return {"input_ids": torch.cat([row["input_ids"] for row in some])[None]}

    def cut(some):
        return {n: v[:, : 12 if len(some) == 1 else 10] for n, v in on_the_right(some).items()}

    expected = {
        packed: "1 sequences of 2 rows; pass one that makes one sequence of each row",
        cut: "10 tokens of a row that has 12 alone; pass one that changes no row",
        default_data_collator: "rows with 5 and 20 tokens (stack expects each tensor to be equal",
    }
    for collate, message in expected.items():
        assert message in refusal(anchored, model, built, rows, collate)


def test_an_adapter_may_be_attached_later(model, emulator):
    rows = make_rows()
    with anchored(model, emulator, rows) as anchors:
        tuned = attach(emulator, None)
        assert_exact(tuned, model, next(iter(loader(anchors, rows))))


def test_a_thread_reads_the_next_offsets_ahead(model, emulator, monkeypatch):
    rows, tuned, threads = make_rows(), attach(emulator, None), []
    read = AnchoredForward._tokens

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return read(*arguments)

    monkeypatch.setattr(AnchoredForward, "_tokens", noted)
    with anchored(model, tuned, rows) as anchors:
        for batch in loader(anchors, rows):
            tuned(**batch)
    assert threads == ["MainThread", *["offsets_0"] * 3]


# Hooks and files ----------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_close_removes_hooks_and_files(model, emulator, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows, tuned = make_rows(), attach(emulator, None).train()
    modes = [module.training for module in tuned.modules()]
    before = hooks_of(tuned)
    with anchored(model, tuned, rows) as anchors:
        assert hooks_of(tuned) > before
        assert hooks_of(model) == 0
        assert [module.training for module in tuned.modules()] == modes
        assert len(list(tmp_path.glob("emloc-anchors-*/*/place-*"))) == 3
        copy.deepcopy(tuned)
        anchors.renew()
        assert len(list(tmp_path.glob("emloc-anchors-*"))) == 1
    assert hooks_of(tuned) == before
    assert [*tmp_path.iterdir()] == []
    assert "these anchors are closed" in refusal(anchors.collate, rows)
    assert "these anchors are closed" in refusal(anchors.renew)
    tuned(**on_the_right(rows)).loss.backward()
    anchors.close()


def test_a_folder_serves_the_next_training_with_another_new_adapter(model, built, tmp_path):
    rows, files = make_rows(), []
    for rank in (3, 2):
        tuned = attach(copy.deepcopy(built), None, r=rank)
        with anchored(model, tuned, rows, folder=tmp_path) as anchors:
            assert_exact(tuned, model, next(iter(loader(anchors, rows))))
            files.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")})
    assert files[0] == files[1] != {}
    change(tuned, 0)
    with anchored(model, tuned, rows, folder=tmp_path):
        assert len([*tmp_path.iterdir()]) == 2


def test_a_pass_that_fails_leaves_nothing_behind(model, emulator, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows, tuned = make_rows(), attach(emulator)
    before = hooks_of(tuned)
    with anchored(model, tuned, rows) as anchors:
        tuned.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data.fill_(
            float("nan")
        )
        assert "up_proj.lora_B.default.weight is not finite" in refusal(anchors.renew)
        assert hooks_of(tuned) == before
        assert "these anchors are closed" in refusal(anchors.collate, rows)
    assert [*tmp_path.iterdir()] == []


def test_an_anchored_adapter_is_copied_and_not_corrected(model, emulator):
    rows, tuned = make_rows(), attach(emulator)
    with anchored(model, tuned, rows) as anchors:
        emloc.correct(tuned, model, emulator)  # no step was trained
        tuned(**next(iter(loader(anchors, rows)))).loss.backward()
    assert "pass clamp=0, which copies it" in refusal(emloc.correct, tuned, model, emulator)
    copied = emloc.correct(tuned, model, emulator, clamp=0)
    name, pair = next(iter(copied.pairs.items()))
    torch.testing.assert_close(pair.delta, emulator.get_submodule(name).get_delta_weight("default"))


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"places": 9}, "anchor.places=9: the model has only 3 blocks"),
        ({"places": [0, 3]}, "block 3 is behind the last block"),
        ({"dtype": "float16"}, "dtype='float16' is none of bfloat16, float32, int8; pass dtype="),
        ({"places": "all"}, "anchor.places=all is neither a number of blocks"),
        ({"round_rows": 0}, "round_rows=0: a round has rows"),
        ({"rows": []}, "rows is empty"),
        ({"rows": iter([])}, "rows must be a list or a data set with a length, got list_iterator"),
        ({"rows": [{"input_ids": object}]}, "an item of the type"),
        ({"collate": lambda rows: [rows]}, "collate must return a dictionary"),
        ({"collate": lambda rows: {"ids": rows}}, "tensors input_ids and attention_mask"),
        (
            {"collate": lambda rows: on_the_right(rows) | {"attention_mask": torch.zeros(1, 9)}},
            "collate([rows[0]]) has nothing but padding",
        ),
    ],
    ids=lambda value: str([*value]) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_in_one_line(model, built, settings, message):
    arguments = {"rows": make_rows(), "collate": on_the_right} | settings
    assert message in refusal(emloc.anchor, model, built, **arguments)


def test_wrong_models_are_refused_in_one_line(model, emulator, tmp_path, monkeypatch):
    rows = make_rows()
    assert "emulator is no emulator but a Llama" in refusal(anchored, model, model, rows)
    assert "call anchor(model, emulator, rows)" in refusal(anchored, emulator, model, rows)
    assert "model is an emulator; pass the original" in refusal(anchored, emulator, emulator, rows)
    other = copy.deepcopy(model)
    other.model.norm.weight.data[0] += 1
    assert "model.norm.weight differs; pass that model" in refusal(anchored, other, emulator, rows)
    adapted = attach(copy.deepcopy(model))
    assert "pass the original without one" in refusal(anchored, adapted, emulator, rows)
    tuned = get_peft_model(emulator, LoraConfig(r=2, bias="all", target_modules="all-linear"))
    message = refusal(anchored, model, tuned, rows)
    assert "a LoRA with bias='all' cannot be recovered for the original model" in message
    tuned.unload()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    message = refusal(anchored, model, attach(emulator), rows, folder=tmp_path / "new")
    assert f"GiB of disk, and {Path(tmp_path)} has" in message
