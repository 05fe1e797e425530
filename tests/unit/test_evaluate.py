"""Scores from one forward pass: the match with greedy decoding, and likelihoods."""

import math

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from emloc.data.examples import Examples
from emloc.data.prompts import EncodedExample
from emloc.data.reader import TextReader
from emloc.models.objectives.tokens import TokenAnswer, Tokens

NONE = Examples("rows", ())
READER = TextReader(tiny_tokenizer(chat=False))
PROMPTS = ([1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65, 66])


@pytest.fixture(scope="module")
def model():
    return tiny_llama(tiny_tokenizer(chat=False))


def greedy(model, prompt, length):
    """Return the tokens that greedy generation writes."""
    ids = torch.tensor([prompt])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
    )
    return written[0, len(prompt) :].tolist()


def test_an_answer_is_exact_if_greedy_decoding_writes_it(model):
    """Tested in one padded batch of prompts and answers of different lengths."""
    answers = [greedy(model, prompt, 2 + index) for index, prompt in enumerate(PROMPTS)]
    same = [
        EncodedExample(str(i), [*prompt, *answer], len(prompt))
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    scored = Tokens().score(model, same, READER, 3)
    assert [answer.id for answer in scored] == ["0", "1", "2"]
    assert [(answer.right, answer.tokens) for answer in scored] == [(2, 2), (3, 3), (4, 4)]
    assert all(answer.exact for answer in scored)

    other = [
        EncodedExample(one.id, [*one.input_ids[:-1], one.input_ids[-1] ^ 1], one.answer_start)
        for one in same
    ]
    scored = Tokens().score(model, other, READER, 3)
    assert [(answer.right, answer.tokens) for answer in scored] == [(1, 2), (2, 3), (3, 4)]
    assert not any(answer.exact for answer in scored)


def test_likelihoods_do_not_depend_on_the_batch(model):
    rows = [
        EncodedExample(str(i), [*prompt, 70, 71, 72], len(prompt))
        for i, prompt in enumerate(PROMPTS)
    ]
    alone, together = (Tokens().score(model, rows, READER, size) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-4)
        ids = torch.tensor([rows[int(one.id)].input_ids])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        true = -logs[-4:-1].gather(1, ids[0, -3:, None]).sum()
        assert one.nll == pytest.approx(float(true), abs=1e-4)


def test_the_loss_is_a_mean_over_tokens_and_the_match_a_mean_over_rows():
    answers = [
        TokenAnswer("a", nll=6.0, tokens=3, right=3),
        TokenAnswer("b", nll=1.0, tokens=1, right=0),
    ]
    scores = Tokens().summary(answers, NONE)
    assert scores == {"loss": 7 / 4, "token_accuracy": 3 / 4, "exact_match": 1 / 2}
    assert tuple(scores) == Tokens.score_names
    assert math.isclose(Tokens().summary(answers[:1], NONE)["loss"], 2.0)
