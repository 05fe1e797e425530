"""Examples as tokens and batches; only the answer and its end token are labels."""

import logging

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from torch.nn import functional

from emloc.calibration.samples import BATCH, Samples, choose_examples
from emloc.data.collate import IGNORE, collate, group_by_length
from emloc.data.examples import Example, Examples
from emloc.data.prompts import EncodedExample, encode, render
from emloc.data.reader import TextReader, batches, encode_all
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

ROWS = (
    Example("0", "1 + 1?", "2"),
    Example("1", "Which colour has the sky on a clear day?", "blue, mostly"),
    Example("2", "Say it.", "a rather long answer, longer than its question"),
    Example("3", "é?", "ü"),
)


@pytest.fixture(params=["plain", "chat"])
def tokenizer(request):
    return tiny_tokenizer(chat=request.param == "chat")


@pytest.fixture(params=["own padding", "padding is the end token"])
def padded(request, tokenizer):
    """A tokenizer with a padding token, or one that pads with the end token."""
    if request.param != "own padding":
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def all_of(tokenizer) -> list[EncodedExample]:
    return encode_all(TextReader(tokenizer), Examples("rows", ROWS), 4096)


def words(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# One example -------------------------------------------------------------------------------------


def test_a_plain_prompt_and_its_answer():
    one = encode(tiny_tokenizer(chat=False), Example("7", "a?", "b"))
    assert one.id == "7"
    assert words(tiny_tokenizer(chat=False), one.input_ids) == "<s>a? b</s>"
    assert words(tiny_tokenizer(chat=False), one.input_ids[one.answer_start :]) == " b</s>"


def test_a_chat_prompt_and_its_answer():
    tokenizer = tiny_tokenizer(chat=True)
    one = encode(tokenizer, Example("7", "a?", "b"))
    assert words(tokenizer, one.input_ids) == (
        "<s><|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    )
    assert words(tokenizer, one.input_ids[one.answer_start :]) == "b<|im_end|>"
    assert one.input_ids.count(tokenizer.bos_token_id) == 1


def test_the_answer_begins_after_the_prompt_used_for_generation(tokenizer):
    chat = tokenizer.chat_template is not None
    for row in ROWS:
        prompt_ids = tokenizer(render(tokenizer, row.prompt), add_special_tokens=not chat).input_ids
        one = encode(tokenizer, row)
        assert one.input_ids[: one.answer_start] == prompt_ids


def test_running_text_has_no_chat_turns(tokenizer):
    one = encode(tokenizer, Example("7", "", "just text"))
    assert one == EncodedExample("7", tokenizer("just text").input_ids, 0)
    assert words(tokenizer, one.input_ids) == "<s>just text"


def test_too_long_examples_are_skipped_and_counted(tokenizer, caplog):
    lengths = [len(one.input_ids) for one in all_of(tokenizer)]
    longest = max(lengths)
    with caplog.at_level(logging.WARNING):
        assert [
            one.id for one in encode_all(TextReader(tokenizer), Examples("rows", ROWS), longest)
        ] == [row.id for row in ROWS]
        assert caplog.messages == []
        encoded = encode_all(TextReader(tokenizer), Examples("rows", ROWS), longest - 1)
    assert [one.id for one in encoded] == [
        row.id for row, n in zip(ROWS, lengths, strict=True) if n < longest
    ]
    assert caplog.messages == [
        f"rows: left out 1 of 4 examples longer than {longest - 1} tokens (model.max_length)"
    ]


def test_no_examples_left_is_refused(tokenizer):
    with pytest.raises(ConfigError) as caught:
        encode_all(TextReader(tokenizer), Examples("rows", ROWS), 3)
    assert str(caught.value) == "rows: no example within 3 tokens; set model.max_length"


# A batch -----------------------------------------------------------------------------------------


def test_labels_are_the_answer_and_its_end(padded):
    encoded = all_of(padded)
    labels = collate(encoded, padded.pad_token_id)["labels"]
    for row, one in zip(labels, ROWS, strict=True):
        space = "" if padded.chat_template else " "
        assert words(padded, row[row != IGNORE]) == f"{space}{one.target}{padded.eos_token}"
        assert row[-1] == padded.eos_token_id


def test_answers_are_aligned_at_the_end_and_only_their_logits_are_computed(padded):
    encoded = all_of(padded)
    batch = collate(encoded, padded.pad_token_id)
    length = max(len(one.input_ids) for one in encoded)
    answer = max(len(one.input_ids) - one.answer_start for one in encoded)
    # The position before the longest answer predicts the first token of this answer.
    assert batch["logits_to_keep"].tolist() == list(range(length - answer - 1, length))
    assert batch["labels"].shape == (len(encoded), answer + 1)
    assert (batch["labels"][:, 0] == IGNORE).all()
    for ids, mask, places, one in zip(
        batch["input_ids"], batch["attention_mask"], batch["position_ids"], encoded, strict=True
    ):
        real = len(one.input_ids)
        assert ids.tolist() == [padded.pad_token_id] * (length - real) + one.input_ids
        assert mask.tolist() == [0] * (length - real) + [1] * real
        assert places.tolist() == [0] * (length - real) + list(range(real))


def plain_loss(model, encoded: list[EncodedExample]) -> float:
    """Return the mean loss over all answer tokens, from all logits of right-padded batches."""
    length = max(len(one.input_ids) for one in encoded)
    ids = torch.zeros(len(encoded), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, one in enumerate(encoded):
        real = len(one.input_ids)
        ids[row, :real] = torch.tensor(one.input_ids)
        mask[row, :real] = 1
        labels[row, one.answer_start : real] = ids[row, one.answer_start : real]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return float(
        functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
        )
    )


def test_the_loss_equals_that_of_a_plain_forward_pass(padded):
    model, encoded = tiny_llama(padded), all_of(padded)
    with torch.no_grad():
        batch = collate(encoded, padded.pad_token_id)
        loss = float(model(**batch).loss)
        alone = [float(model(**collate([one], padded.pad_token_id)).loss) for one in encoded]
    assert loss == pytest.approx(plain_loss(model, encoded), abs=1e-5)
    tokens = [len(one.input_ids) - one.answer_start for one in encoded]
    mean = sum(a * n for a, n in zip(alone, tokens, strict=True)) / sum(tokens)
    assert loss == pytest.approx(mean, abs=1e-5)
    assert batch["input_ids"].shape[1] > batch["labels"].shape[1]


def test_the_loss_of_running_text_covers_all_tokens_but_the_first(tokenizer):
    model = tiny_llama(tokenizer)
    texts = Examples("t", (Example("0", "", "some running text"), Example("1", "", "more")))
    encoded = encode_all(TextReader(tokenizer), texts, 4096)
    batch = collate(encoded, tokenizer.pad_token_id)
    assert batch["labels"].shape == batch["input_ids"].shape
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert loss == pytest.approx(plain_loss(model, encoded), abs=1e-5)


def test_a_batch_without_answers_has_only_the_inputs_of_a_forward_pass(tokenizer):
    batch = collate(all_of(tokenizer), tokenizer.pad_token_id, answers_only=False)
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_batches_contain_each_row_once_sorted_by_length(tokenizer, size):
    encoded = all_of(tokenizer)
    made_batches = batches(
        TextReader(tokenizer), encoded, group_by_length(encoded, size), answers_only=False
    )
    assert [len(one["input_ids"]) for one in made_batches] == [
        min(size, len(encoded) - start) for start in range(0, len(encoded), size)
    ]
    rows = [
        ids[mask.bool()].tolist()
        for one in made_batches
        for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True)
    ]
    assert rows == sorted((one.input_ids for one in encoded), key=len)


# Calibration samples -----------------------------------------------------------------------------


def test_calibration_samples_contain_the_answers(checkpoint):
    source = Source(checkpoint, "tiny", "tiny", torch.float32)
    samples = Samples(Examples("rows", ROWS * 3), 4096)
    made_batches = samples.batches(source)
    assert [len(one["input_ids"]) for one in made_batches] == [BATCH, 12 - BATCH]
    tokens = sum(int(one["attention_mask"].sum()) for one in made_batches)
    assert tokens == 3 * sum(len(one.input_ids) for one in all_of(source.tokenizer()))
    assert samples.ids == [row.id for row in ROWS] * 3
    assert samples.key != Samples(samples.examples, 100).key


def test_drawn_samples_depend_only_on_the_seed_and_are_distinct():
    pool = Examples("pool", tuple(Example(str(i), f"{i}?", str(i)) for i in range(50)))
    first, again, other = (choose_examples(pool, 20, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({row.id for row in first}) == 20
    assert len(choose_examples(pool, 50, 3)) == 50
    with pytest.raises(ConfigError) as caught:
        choose_examples(pool, 51, 0)
    assert str(caught.value) == (
        "calibration.samples=51: pool has only 50 rows to choose from; "
        "set calibration.samples=50 or less"
    )
