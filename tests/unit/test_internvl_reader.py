"""The reader of InternVL: the text around images, and its batches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pictured import PLACE, image_bytes, lazy_image, save_internvl
from tokenizers import processors
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from emloc.data.collate import IGNORE
from emloc.data.examples import Example
from emloc.data.image import LazyImage
from emloc.data.prompts import render
from emloc.data.reader import OpenCheckpoint
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.internvl import InternVLReader, InternVLReaderSettings

PLACES = 4  # tokens of one tile


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_internvl(tmp_path_factory.mktemp("internvl"))


def opened(folder: Path) -> OpenCheckpoint:
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    return OpenCheckpoint(folder, lambda: tokenizer, config, torch.float32)


def read_by(folder: Path, system: str | None = None) -> InternVLReader:
    return InternVLReaderSettings(system, 6).reader(opened(folder))


@pytest.fixture(scope="module")
def reader(folder) -> InternVLReader:
    return read_by(folder)


def noise(width: int, height: int, seed: int = 0) -> LazyImage:
    return lazy_image(f"{width} x {height}", image_bytes(width, height, seed))


def question_about(*images: LazyImage, answer: str = "yes", name: str = "row/3") -> Example:
    return Example(name, "Is it?", answer, images=images)


# Text --------------------------------------------------------------------------------------------


def image_text(tiles: int) -> str:
    return f"<img>{PLACE * PLACES * tiles}</img>\n"


@pytest.mark.parametrize("begins", [True, False], ids=["begins", "does not begin"])
@pytest.mark.parametrize("system", [None, "You are {{ a }} 'model'.\nBe \"brief\"\\. 好"])
@pytest.mark.parametrize(
    ("sizes", "images"),
    [
        ([], ""),
        ([(28, 28)], image_text(1)),
        ([(84, 28)], image_text(3 + 1)),
        ([(28, 28), (28, 56)], f"Image-1: {image_text(1)}Image-2: {image_text(2 + 1)}"),
    ],
)
def test_images_come_first_in_the_turn_of_the_user(folder, begins, system, sizes, images):
    checkpoint = opened(folder)
    if not begins:
        checkpoint.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(
            trim_offsets=False
        )
    # The end token of a base model; a turn ends with another token.
    checkpoint.tokenizer.eos_token = "</s>"
    reader = InternVLReaderSettings(system, 6).reader(checkpoint)
    one = reader.encode(question_about(*(noise(*size) for size in sizes)))
    system_turn = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    prompt = f"{system_turn}<|im_start|>user\n{images}Is it?<|im_end|>\n<|im_start|>assistant\n"
    text = reader.tokenizer.decode(one.input_ids, skip_special_tokens=False)
    assert text == f"{'<s>' if begins else ''}{prompt}yes<|im_end|>"
    answer = one.input_ids[one.answer_start :]
    assert reader.tokenizer.decode(answer, skip_special_tokens=False) == "yes<|im_end|>"


@settings(max_examples=60)
@given(system=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@example(system="'type': 'text'")  # as a list of parts would look
def test_a_system_message_is_copied_exactly(folder, system):
    system_turn = render(read_by(folder, system).tokenizer, "q")
    assert system_turn.startswith(
        f"<s><|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nq<"
    )


@pytest.mark.parametrize("field", ["prompt", "target"])
@pytest.mark.parametrize("count", [0, 1])
def test_a_text_that_contains_an_image_token_is_refused(reader, field, count):
    row = replace(question_about(*[noise(28, 28)] * count), **{field: f"a {PLACE} b"})
    with pytest.raises(ConfigError, match=r"^row/3: .* the text holds <IMG_CONTEXT> itself; "):
        reader.encode(row)


@pytest.mark.parametrize("token", ["<img>", "</img>", PLACE, "<|im_end|>"])
def test_a_tokenizer_without_the_tokens_of_internvl_is_refused(folder, token):
    checkpoint, core = opened(folder), (folder / "tokenizer.json").read_text()
    other = type(checkpoint.tokenizer.backend_tokenizer).from_str(core.replace(token, "<other>"))
    tokenizer = type(checkpoint.tokenizer)(
        tokenizer_object=other, bos_token="<s>", pad_token="<pad>"
    )
    with pytest.raises(ConfigError) as caught:
        InternVLReaderSettings(None, 6).reader(
            replace(checkpoint, open_tokenizer=lambda: tokenizer)
        )
    assert f"the tokenizer has no token {token}, which" in str(caught.value)


def test_a_model_with_another_image_token_is_refused(folder):
    checkpoint = opened(folder)
    checkpoint.config.image_token_id += 1
    with pytest.raises(ConfigError, match=r"<IMG_CONTEXT> has id (\d+) in the tokenizer, but \d+"):
        InternVLReaderSettings(None, 6).reader(checkpoint)


def test_system_message_and_number_of_tiles_are_in_the_key(folder):
    def key(*reader_settings) -> tuple:
        auto = AutoModelForImageTextToText
        how = InternVLReaderSettings(*reader_settings)
        return tuple(Source(folder, "x", "x", torch.float32, auto, reader_settings=how).key)

    settings = [(None, 6), ("", 6), ("Be brief.", 6), (None, 12)]
    assert len({key(*one) for one in settings}) == len(settings)
    assert key(None, 6) == key(None, 6)


# Batches -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Rows with one tile, with two images and five tiles, and without an image."""
    pair = (noise(84, 28, 2), noise(28, 28, 3))
    return [
        question_about(noise(28, 28, 1), name="one"),
        question_about(*pair, answer="neither of them", name="two"),
        question_about(answer="no", name="none"),
    ]


def test_only_answers_and_their_end_tokens_are_labels(reader, rows):
    batch = reader.collate([reader.encode(row) for row in rows])
    for row, labels in zip(rows, batch["labels"], strict=True):
        learnt = reader.tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=False)
        assert learnt == f"{row.target}<|im_end|>"


def test_a_row_gives_equal_logits_alone_and_in_a_padded_batch(folder, reader, rows):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    every = [reader.encode(row) for row in rows]
    with torch.no_grad():
        together = model(**reader.collate(every, answers_only=False)).logits
        for one, logits in zip(every, together, strict=True):
            alone = model(**reader.collate([one], answers_only=False)).logits[0]
            torch.testing.assert_close(logits[-len(alone) :], alone, atol=1e-5, rtol=0)
        other = replace(every[0], images=(noise(28, 28, 9),))
        unlike = model(**reader.collate([other], answers_only=False)).logits[0]
    assert (together[0, -1] - unlike[-1]).abs().max() > 1e-4  # another image changes the logits
