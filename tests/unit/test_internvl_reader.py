"""An InternVL's reader: what it says around images, and batches of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
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

PLACES = 4  # tokens a tile takes


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


def asked(*images: LazyImage, answer: str = "yes", name: str = "row/3") -> Example:
    return Example(name, "Is it?", answer, images=images)


# Text --------------------------------------------------------------------------------------------


def shown(tiles: int) -> str:
    return f"<img>{PLACE * PLACES * tiles}</img>\n"


@pytest.mark.parametrize("begins", [True, False], ids=["begins", "does not begin"])
@pytest.mark.parametrize("system", [None, "You are {{ a }} 'model'.\nBe \"brief\"\\. 好"])
@pytest.mark.parametrize(
    ("sizes", "images"),
    [
        ([], ""),
        ([(28, 28)], shown(1)),
        ([(84, 28)], shown(3 + 1)),
        ([(28, 28), (28, 56)], f"Image-1: {shown(1)}Image-2: {shown(2 + 1)}"),
    ],
)
def test_a_prompt_shows_its_images_first_in_the_users_turn(folder, begins, system, sizes, images):
    found = opened(folder)
    if not begins:
        found.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    found.tokenizer.eos_token = "</s>"  # a base model's; a turn ends otherwise
    reader = InternVLReaderSettings(system, 6).reader(found)
    one = reader.encode(asked(*(noise(*size) for size in sizes)))
    said = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    prompt = f"{said}<|im_start|>user\n{images}Is it?<|im_end|>\n<|im_start|>assistant\n"
    text = reader.tokenizer.decode(one.input_ids, skip_special_tokens=False)
    assert text == f"{'<s>' if begins else ''}{prompt}yes<|im_end|>"
    answer = one.input_ids[one.answer_start :]
    assert reader.tokenizer.decode(answer, skip_special_tokens=False) == "yes<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(system=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_system_message_is_said_letter_by_letter(folder, system):
    said = render(read_by(folder, system).tokenizer, "q")
    assert said.startswith(f"<s><|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nq<")


@pytest.mark.parametrize("field", ["prompt", "target"])
@pytest.mark.parametrize("count", [0, 1])
def test_a_text_that_holds_an_images_place_is_refused(reader, field, count):
    row = replace(asked(*[noise(28, 28)] * count), **{field: f"a {PLACE} b"})
    with pytest.raises(ConfigError, match=r"^row/3: .* the text holds <IMG_CONTEXT> itself; "):
        reader.encode(row)


@pytest.mark.parametrize("token", ["<img>", "</img>", PLACE, "<|im_end|>"])
def test_a_tokenizer_without_an_internvls_tokens_is_refused(folder, token):
    found, core = opened(folder), (folder / "tokenizer.json").read_text()
    other = type(found.tokenizer.backend_tokenizer).from_str(core.replace(token, "<other>"))
    tokenizer = type(found.tokenizer)(tokenizer_object=other, bos_token="<s>", pad_token="<pad>")
    with pytest.raises(ConfigError) as caught:
        InternVLReaderSettings(None, 6).reader(replace(found, open_tokenizer=lambda: tokenizer))
    assert f"its tokenizer has no {token}, so" in str(caught.value)


def test_a_model_that_means_another_token_is_refused(folder):
    found = opened(folder)
    found.config.image_token_id += 1
    with pytest.raises(ConfigError, match=r"<IMG_CONTEXT> is token (\d+) to the tokenizer and \d+"):
        InternVLReaderSettings(None, 6).reader(found)


def test_what_is_said_first_and_how_finely_is_cut_are_in_the_key(folder):
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
    """Of one tile, of two images and five tiles, of none."""
    pair = (noise(84, 28, 2), noise(28, 28, 3))
    return [
        asked(noise(28, 28, 1), name="one"),
        asked(*pair, answer="neither of them", name="two"),
        asked(answer="no", name="none"),
    ]


def test_answers_and_their_end_are_learnt_and_nothing_else(reader, rows):
    batch = reader.collate([reader.encode(row) for row in rows])
    for row, labels in zip(rows, batch["labels"], strict=True):
        learnt = reader.tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=False)
        assert learnt == f"{row.target}<|im_end|>"


def test_a_row_in_a_padded_batch_is_read_as_it_is_alone(folder, reader, rows):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    every = [reader.encode(row) for row in rows]
    with torch.no_grad():
        together = model(**reader.collate(every, answers_only=False)).logits
        for one, logits in zip(every, together, strict=True):
            alone = model(**reader.collate([one], answers_only=False)).logits[0]
            torch.testing.assert_close(logits[-len(alone) :], alone, atol=1e-5, rtol=0)
        other = replace(every[0], images=(noise(28, 28, 9),))
        unlike = model(**reader.collate([other], answers_only=False)).logits[0]
    assert (together[0, -1] - unlike[-1]).abs().max() > 1e-4  # the image is looked at
