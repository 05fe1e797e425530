"""The reader that uses the checkpoint's own processor, and the answers that it appends."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictured import CHAT_TEMPLATE_WITH_IMAGES, image_bytes, lazy_image, save_gemma
from pieces import piece_tokenizer
from tiny import CHAT_TEMPLATE, save_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from emloc.data.collate import IGNORE
from emloc.data.examples import Example
from emloc.data.reader import OpenCheckpoint, stop_ids
from emloc.errors import ConfigError
from emloc.models.vision_language import ProcessorReader, ProcessorReaderSettings

END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_gemma(tmp_path_factory.mktemp("gemma"))


def read_by(folder: Path, dtype: torch.dtype = torch.float32) -> ProcessorReader:
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    return ProcessorReaderSettings().reader(
        OpenCheckpoint(folder, lambda: tokenizer, config, dtype)
    )


@pytest.fixture(scope="module")
def reader(folder) -> ProcessorReader:
    return read_by(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def row(question: str, answer: str, *seeds: int, size: tuple[int, int] = (28, 28)) -> Example:
    images = tuple(lazy_image(f"{seed}", image_bytes(*size, seed)) for seed in seeds)
    return Example("row/3", question, answer, images=images)


ROWS = [
    row("Is it?", "yes", 1),
    row("Are these two of a kind, and why so?", "neither of them", 2, 3, size=(50, 31)),
    row("Is 3 a prime?", "no"),
    row("What?", "a", 4),
]
SHOWN = [one for one in ROWS if one.images]


@pytest.fixture(scope="module")
def rows(reader):
    return [reader.encode(one) for one in ROWS]


def own(folder: Path, examples: list[Example]) -> dict[str, torch.Tensor]:
    """Return the batch that the processor makes.

    The start token occurs once, although template and tokenizer both add it.
    """
    talks = []
    for one in examples:
        images = [{"type": "image", "image": image.open()} for image in one.images]
        content = [*images, {"type": "text", "text": one.prompt}]
        talks.append([{"role": "user", "content": content}])
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return dict(
        AutoProcessor.from_pretrained(folder).apply_chat_template(
            talks, tokenize=True, return_dict=True, add_generation_prompt=True, **how
        )
    )


def cut(one):
    """Return the prompt alone, as for generation in lm-eval."""
    return replace(one, input_ids=one.input_ids[: one.answer_start])


# Prompts -----------------------------------------------------------------------------------------


def test_a_batch_of_prompts_equals_that_of_the_processor(folder, reader, rows):
    expected = own(folder, SHOWN)
    actual = reader.collate([cut(one) for one in rows if one.images], answers_only=False)
    assert set(actual) == set(expected)
    assert {"input_ids", "attention_mask", "token_type_ids", "pixel_values"} <= set(actual)
    for name, values in expected.items():
        assert torch.equal(actual[name], values), name


def test_prompts_without_images_or_without_text_equal_those_of_the_processor(folder, reader):
    for example in (ROWS[2], replace(ROWS[0], prompt="")):
        one = reader.encode(example)
        assert cut(one).input_ids == own(folder, [example])["input_ids"][0].tolist()
        assert one.images == example.images


def test_prompt_and_answer_as_text(reader, rows):
    places = f"\n\n<boi>{'<image>' * 4}<eoi>\n\n"
    texts = [reader.tokenizer.decode(one.input_ids, skip_special_tokens=False) for one in rows]
    for example, text in zip(ROWS, texts, strict=True):
        prompt = f"{places * len(example.images)}{example.prompt}"
        turns = f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"
        assert text == f"<s>{turns}{example.target}{END}"


def with_template(folder: Path, home: Path, old: str, new: str) -> ProcessorReader:
    """Return a reader whose chat template contains `new` instead of `old`."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = processor.chat_template.replace(old, new)
    processor.save_pretrained(home)
    AutoConfig.from_pretrained(folder).save_pretrained(home)
    return read_by(home)


def test_the_tokenizer_adds_the_start_token_if_the_template_does_not(folder, tmp_path):
    reader = with_template(folder, tmp_path, "{{ bos_token }}", "")
    for example in (ROWS[0], ROWS[2]):
        ids = reader.encode(example).input_ids
        assert (ids[0], ids.count(ids[0])) == (reader.tokenizer.bos_token_id, 1)


# Answers -----------------------------------------------------------------------------------------


def test_token_types_equal_those_of_the_processor_and_are_zero_in_answers(folder, reader, rows):
    batch = reader.collate(rows)
    length = batch["input_ids"].shape[1]
    assert batch["token_type_ids"].shape == (len(rows), length)
    for example, one, kinds in zip(ROWS, rows, batch["token_type_ids"], strict=True):
        start = length - len(one.input_ids)
        expected = torch.zeros(length, dtype=torch.long)
        if example.images:
            token_types = own(folder, [example])["token_type_ids"][0]
            assert token_types.sum() == 4 * len(example.images)
            expected[start : start + one.answer_start] = token_types
        assert torch.equal(kinds, expected)


def test_only_answers_and_their_end_tokens_are_labels(reader, rows):
    for example, labels in zip(ROWS, reader.collate(rows)["labels"], strict=True):
        learnt = reader.tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=False)
        assert learnt == f"{example.target}{END}"


def test_a_row_gives_equal_logits_alone_and_in_a_padded_batch(reader, model, rows):
    with torch.no_grad():
        together = model(**reader.collate(rows, answers_only=False)).logits
        for one, logits in zip(rows, together, strict=True):
            alone = model(**reader.collate([one], answers_only=False)).logits[0]
            torch.testing.assert_close(logits[-len(alone) :], alone, atol=1e-5, rtol=0)


def test_pixels_have_the_dtype_of_the_model_and_the_order_of_the_images(folder, reader, rows):
    expected = own(folder, SHOWN)["pixel_values"]
    assert expected.shape == (4, 3, 28, 28)
    assert torch.equal(reader.collate(rows)["pixel_values"], expected)
    half = read_by(folder, torch.bfloat16).collate(rows)
    assert torch.equal(half["pixel_values"], expected.to(torch.bfloat16))
    assert half["input_ids"].dtype == half["token_type_ids"].dtype == torch.int64


# Tokenizers with pieces, and other templates ------------------------------------------------------

PIECES_TEMPLATE = CHAT_TEMPLATE_WITH_IMAGES.replace("<|im_end|>", "<|turn|>")


@pytest.fixture(scope="module")
def pieces(folder, tmp_path_factory) -> Path:
    """A processor with SentencePiece's pieces, whose turns do not end with the end token."""
    marks = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    special = (*marks.values(), "<|im_start|>", "<|turn|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=piece_tokenizer(special=special).backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=marks,
    )
    home = tmp_path_factory.mktemp("pieces")
    processor = AutoProcessor.from_pretrained(folder)
    Gemma3Processor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        chat_template=PIECES_TEMPLATE,
        image_seq_length=4,
    ).save_pretrained(home)
    config = AutoConfig.from_pretrained(folder)
    config.image_token_id = tokenizer.image_token_id
    config.save_pretrained(home)
    return home


TOWN = row("Which town?", "Paris", 1)


def tokens_of(reader: ProcessorReader, one) -> tuple[list[str], list[str]]:
    names = reader.tokenizer.convert_ids_to_tokens(one.input_ids)
    return names[: one.answer_start], names[one.answer_start :]


def test_an_answer_after_images_has_the_pieces_of_running_text_and_ends_its_turn(pieces):
    reader = read_by(pieces)
    for example in (TOWN, replace(TOWN, images=())):
        before, answer = tokens_of(reader, reader.encode(example))
        assert answer == ["Paris", "<|turn|>"]
        assert before.count("<image>") == 4 * len(example.images)
        assert "▁Which" in before or "Which" in before
    assert reader.end_token == "<|turn|>"
    ids = reader.tokenizer.convert_tokens_to_ids(["</s>", "<|turn|>"])
    assert stop_ids(None, reader) == sorted(ids)


def test_a_token_that_prompt_and_answer_share_belongs_to_the_answer(pieces, tmp_path):
    """The prompt for generation then lacks it, and token types still fit the row."""
    reader = with_template(pieces, tmp_path, "<|im_start|>assistant\n", "<|im_start|>assistant: ")
    one = reader.encode(TOWN)
    before, answer = tokens_of(reader, one)
    assert (before[-1], answer) == (":", ["▁Paris", "<|turn|>"])
    types = reader.collate([cut(one)], answers_only=False)["token_type_ids"][0].tolist()
    assert types == [int(name == "<image>") for name in before]


def test_a_processor_whose_template_expects_a_text_gets_one(folder, tmp_path):
    reader = with_template(folder, tmp_path, CHAT_TEMPLATE_WITH_IMAGES, CHAT_TEMPLATE)
    text = reader.tokenizer.decode(reader.encode(ROWS[2]).input_ids)
    assert text == f"<s><|im_start|>user\nIs 3 a prime?{END}\n<|im_start|>assistant\nno{END}"
    with pytest.raises(ConfigError, match="the chat template cannot be used"):
        reader.encode(ROWS[0])


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["prompt", "target"])
@pytest.mark.parametrize("token", ["<boi>", "<image>"])
@pytest.mark.parametrize("example", [ROWS[0], ROWS[2]], ids=["shown", "text alone"])
def test_a_text_that_contains_an_image_token_is_refused(reader, example, token, field):
    changed_example = replace(example, **{field: f"a {token} b"})
    with pytest.raises(ConfigError, match=rf"^row/3: the text holds {token}, which stands for an "):
        reader.encode(changed_example)


def test_a_template_without_images_is_refused(folder, tmp_path):
    reader = with_template(folder, tmp_path, "<boi>", "")
    with pytest.raises(ConfigError, match=r"^row/3: 1 images do not fit their places") as caught:
        reader.encode(ROWS[0])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_an_image_processor_is_refused(tmp_path):
    """The error is raised before any row is encoded."""
    save_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"has no processor of images \(preprocessor_config.json"):
        read_by(tmp_path)


def test_a_processor_that_cannot_be_built_is_refused(folder, tmp_path):
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Gemma3Processor", "x":')
    with pytest.raises(ConfigError, match="its processor cannot be used here: ") as caught:
        read_by(tmp_path)
    assert "\n" not in str(caught.value)
