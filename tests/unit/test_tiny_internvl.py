"""The script that pretrains the tiny InternVL, and the reader of the model it saves."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import compose_cached
from PIL import Image
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from emloc.data.examples import Example
from emloc.data.image import LazyImage
from emloc.stages.run_config import build

MODELS = Path(__file__).parents[2] / "experiments" / "models"

QUESTIONS = {
    "what is the blue shape?": "rectangle",
    "is there a red shape in the image?": "no",
    "what color is the circle?": "teal",
    "does the image not contain a gray shape?": "yes",
}
GROUPS = {"rectangle": "shape", "teal": "color"}


@pytest.fixture(scope="module")
def script():
    """The pretraining script, imported as a module."""
    file = MODELS / "pretrain_tiny_internvl.py"
    spec = importlib.util.spec_from_file_location("pretrain_tiny_internvl", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look up their module here
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    home = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    rows = []
    for index, (question, answer) in enumerate(QUESTIONS.items()):
        file = home / f"{index}.png"
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        picture = LazyImage(f"image {index}", f"{index}", file.read_bytes)
        group = GROUPS.get(answer, "yes/no")
        row = Example(f"{index}", question, answer, (picture,), (answer,), group=group)
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def saved_model(script, examples, tmp_path_factory):
    """A random model of the script, its tokenizer, and the folder with both."""
    folder = tmp_path_factory.mktemp("tiny_internvl")
    tokenizer = script.train_tokenizer(examples * 50)
    torch.manual_seed(0)
    model = script.build(script.configuration(tokenizer, script.SIZES["whole"])).eval()
    script.save(model, tokenizer, folder)
    return model, tokenizer, folder


def reader_of(folder: Path):
    return (
        build(compose_cached(["model=tiny_internvl", f"model.source={folder}"]))
        .model.open()
        .reader()
    )


def test_the_model_stays_within_its_limits(saved_model):
    model, tokenizer, folder = saved_model
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_400_000
    assert len(tokenizer) <= 400
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5_000_000


def test_an_answer_is_one_token_and_the_end_token(saved_model, script):
    _, tokenizer, _ = saved_model
    for answer in QUESTIONS.values():
        ids = tokenizer(script.render("?", answer)[1]).input_ids
        assert len(ids) == 2
        assert ids[1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:1]) == answer


def test_saved_weights_are_bfloat16_with_exact_rotary_frequencies(saved_model):
    model, _, folder = saved_model
    saved = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    pairs = zip(model.parameters(), saved.parameters(), strict=True)
    assert all(torch.equal(own.bfloat16(), other) for own, other in pairs)
    rotary = [one.model.language_model.rotary_emb.inv_freq for one in (model, saved)]
    assert rotary[1].dtype == torch.float32
    assert torch.equal(*rotary)


def test_the_saved_tokenizer_keeps_its_end_and_padding_tokens(saved_model, script):
    _, tokenizer, folder = saved_model
    again = AutoTokenizer.from_pretrained(folder)
    text = "".join(script.render("what is the blue shape?", "teal"))
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.eos_token, again.pad_token) == ("<|im_end|>", "<|pad|>")


def test_the_image_processor_has_the_size_of_the_vision_tower(saved_model):
    config = json.loads((saved_model[2] / "preprocessor_config.json").read_text())
    assert config["size"] == {"height": 64, "width": 64}
    assert config["image_mean"] == [0.485, 0.456, 0.406]
    assert config["image_std"] == [0.229, 0.224, 0.225]


def test_script_and_reader_render_equal_prompts(saved_model, script, examples):
    _, tokenizer, folder = saved_model
    reader = reader_of(folder)
    for row in examples:
        prompt, answer = script.render(row.prompt, row.target)
        encoded = reader.encode(row)
        assert encoded.input_ids == tokenizer(prompt + answer).input_ids
        assert encoded.answer_start == len(tokenizer(prompt).input_ids)


def test_script_and_model_predict_equal_logits(saved_model, script, examples):
    """The script pads on the right without a mask, the reader on the left with a mask."""
    model, tokenizer, folder = saved_model
    rows = script.rows_on_device(examples, tokenizer, torch.device("cpu"))
    pixels = rows.images[rows.image_index].float()
    reader = reader_of(folder)
    batch = reader.collate([reader.encode(row) for row in examples])
    labels = batch.pop("labels")
    assert batch["attention_mask"].min() == 0
    with torch.inference_mode():
        actual = script.answer_logits(model, rows, torch.arange(4), pixels)
        expected = model(**batch).logits[:, :-1]
    assert torch.equal(labels[:, 1:], rows.answers)
    # The reader rounds pixels to the model's bfloat16; all else is equal.
    assert (actual - expected).abs().max() < 0.02 * expected.std()


def test_rows_refer_to_their_images_and_groups_are_drawn_equally_often(
    saved_model, script, examples
):
    twice = [*examples, examples[0]]
    rows = script.rows_on_device(twice, saved_model[1], torch.device("cpu"))
    assert rows.image_index.tolist() == [0, 1, 2, 3, 0]
    assert rows.images.shape == (4, 3, 64, 64)
    assert rows.weights.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2])


def test_augmented_images_are_shifted_mirrored_and_noised(script):
    torch.manual_seed(0)
    images = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    images[:, :, 20:40, 20:40] = 0
    actual = script.augment(images, torch.zeros(300, dtype=torch.long))
    assert actual.min() == 0
    assert actual.max() == 255
    dark = (actual.mean(1) < 128).float()
    assert dark.sum((1, 2)).sub(400).abs().max() <= 8  # the shape keeps its size
    heights, widths = dark.amax(2).argmax(1), dark.amax(1).argmax(1)
    assert {*range(16, 25)} >= {*heights.tolist()} > {17, 20, 23}
    # A mirrored image has 24 instead of 20.
    assert {*range(16, 29)} >= {*widths.tolist()} > {17, 20, 27}
    plain = actual[:, :, 50:60, 50:60].std((1, 2, 3))
    assert plain.max() < 26


def test_the_learning_rate_rises_and_falls_to_zero(script):
    assert script.learning_rate(0) == 0
    assert script.learning_rate(script.WARMUP / 2) == pytest.approx(script.PEAK / 2)
    assert script.learning_rate(script.WARMUP) == script.PEAK
    assert script.learning_rate(1) == pytest.approx(0, abs=1e-12)


def test_training_memorises_four_rows(saved_model, script, examples, monkeypatch):
    _, tokenizer, _ = saved_model
    monkeypatch.setattr(script, "BATCH", 4)
    torch.manual_seed(0)
    model = script.build(script.configuration(tokenizer, script.SIZES["whole"]))
    rows = script.rows_on_device(examples, tokenizer, torch.device("cpu"))
    assert script.accuracy(model, rows).startswith("all 0.000")
    script.train(model, rows, rows, lambda step: step / 25)
    assert script.accuracy(model, rows) == "all 1.000  yes/no 1.000  shape 1.000  color 1.000"


def test_the_pretrained_model_answers_the_plain_part_but_not_the_recoloured_part(script):
    cell = build(compose_cached(["task=easy_vqa", "model=tiny_internvl"]))
    folder = cell.model.open().folder
    assert folder == MODELS / "tiny_internvl"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5_000_000
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_400_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shares = {}
    for part in ("plain", "recoloured"):
        task = replace(cell.task, part=part)
        rows = script.rows_on_device(task.held_out(256), tokenizer, torch.device("cpu"))
        words = script.accuracy(model, rows).split()
        shares[part] = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    assert min(shares["plain"].values()) >= 0.97
    assert shares["recoloured"]["color"] < 0.4
    assert shares["recoloured"]["shape"] < 0.7


def test_the_demo_has_six_cells_with_this_model_and_task():
    names = [
        "zero_shot",
        "lora",
        *(f"emloc_r{r}{c}" for r in (75, 50) for c in ("", "_uncorrected")),
    ]
    for name in names:
        words = ["experiments=demo_vqa", f"cell=demo_vqa/{name}"]
        cell = build(compose_cached(words))
        assert (cell.model.name, cell.task.name) == ("tiny_internvl", "easy_vqa")
