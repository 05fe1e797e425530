"""Scores from logits of a few tokens at a time equal those from the logits of all tokens."""

from contextlib import closing

import pytest
import torch
from families import batch_of, tiny_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from emloc.calibration.blockwise import iterate_blocks
from emloc.calibration.offload import StateLimits
from emloc.data.collate import IGNORE
from emloc.models.objectives.answer_logits import TRIAL_TOKENS, forward_logits, without_labels
from emloc.models.objectives.token_scores import score_tokens
from emloc.tensors.lean import loss

FAMILIES = [
    *("llama", "gpt2", "bloom", "opt", "mixtral", "gemma4_text"),
    *("gemma2", "cohere", "granite"),  # a cap on the logits, a scale, a divisor
    *("internvl", "gemma3", "qwen2_vl", "mllama", "paligemma"),
]
CHUNK = 5  # tokens
# Logits of a tiny model in two chunks of different sizes have other rounding errors.
CLOSE = {"rtol": 1e-6, "atol": 2e-6}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Let a chunk of logits have `CHUNK` tokens of the tiny vocabularies."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 268 * CHUNK)


class RecordedHead(nn.Linear):
    """A linear layer that counts the tokens of each call in the list `token_counts`."""

    def forward(self, hidden):
        logits = super().forward(hidden)
        self.token_counts.append(logits.shape[:-1].numel())
        return logits


def record_head(model):
    """Count the tokens of each call of the model's head; return the list."""
    head = model.get_output_embeddings()
    head.__class__, head.token_counts = RecordedHead, []
    return head.token_counts


def labelled(batch, kept=None):
    """Return the batch with labels of unequal answers, at the last `kept` positions."""
    labels = batch["input_ids"].clone()
    labels[0, :-9] = labels[1, :-13] = IGNORE
    if kept is None:
        return {**batch, "labels": labels}
    keep = torch.arange(labels.shape[1])[-kept:]
    return {**batch, "labels": labels[:, -kept:], "logits_to_keep": keep}


def answers(seed=0):
    torch.manual_seed(seed)
    return labelled({"input_ids": torch.randint(5, 200, (2, 20))}, 15)


def whole_scores(model, batch):
    """Return likelihoods and hits by the logits of all positions."""
    logits = model(**without_labels(batch)).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    nll = functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
    )
    return nll, (logits.argmax(-1) == labels) & (labels != IGNORE)


def scores(model, batch):
    return score_tokens(forward_logits(model, batch), batch["labels"])


def assert_same_scores(model, batch):
    with torch.inference_mode():
        nll, is_right = whole_scores(model, batch)
        actual = scores(model, batch)
    torch.testing.assert_close(actual.nll, nll, **CLOSE)
    assert torch.equal(actual.is_right, is_right)
    assert actual.is_answer.sum() == (batch["labels"][:, 1:] != IGNORE).sum()


@pytest.mark.parametrize("kept", [16, None], ids=["last-positions", "all-positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_scores_from_few_logits_at_once(family, kept):
    model, batch = tiny_model(family), labelled(batch_of(family), kept)
    head = model.get_output_embeddings()
    assert_same_scores(model, batch)
    token_counts = record_head(model)
    with torch.inference_mode():
        scores(model, batch)
    assert max(token_counts) <= max(CHUNK, TRIAL_TOKENS)
    assert sum(token_counts[1:]) == 9 + 13
    assert model.get_output_embeddings() is head
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_trained_adapter_on_body_and_head_is_scored():
    model = tiny_llama(tiny_tokenizer(False))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert_same_scores(tuned.eval(), answers())


class Smoothed(LlamaForCausalLM):
    """Adds to the logits of a token those of the tokens before it."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.cumsum(1)
        return output


class Copying(LlamaForCausalLM):
    """Adds to the logits of each position a bonus for the token there."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        kept = input_ids[:, -output.logits.shape[1] :]
        output.logits = output.logits + 2.0 * functional.one_hot(kept, output.logits.shape[-1])
        return output


class Reranked(LlamaForCausalLM):
    """Has a weight behind the head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits @ self.mixing
        return output


def of_class(cls):
    torch.manual_seed(0)
    model = cls(tiny_llama(tiny_tokenizer(False)).config).eval()
    width = model.config.vocab_size
    if cls is Reranked:
        model.mixing = nn.Parameter(torch.eye(width) + 0.1 * torch.randn(width, width))
    return model


@pytest.mark.parametrize("cls", [Smoothed, Copying, Reranked])
def test_a_model_with_unusual_logits_has_the_same_scores_from_one_run_of_its_body(cls):
    model, batch = of_class(cls), answers()
    assert_same_scores(model, batch)
    runs = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    with torch.inference_mode():
        scores(model, batch)
    assert len(runs) == 1


def test_a_hook_on_the_logits_sees_those_of_all_positions():
    model, batch = tiny_llama(tiny_tokenizer(False)), answers()
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + logits.mean(1, True))
    assert_same_scores(model, batch)


def test_a_hook_in_front_of_the_head_sees_all_positions_once():
    model, batch = tiny_llama(tiny_tokenizer(False)), answers()
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.inference_mode():
        scores(model, batch)
    assert shapes == [(2, 15, model.config.hidden_size)]


def test_keys_and_values_are_not_cached():
    model, batch = tiny_llama(tiny_tokenizer(False)), answers()
    caches = []
    model.model.register_forward_hook(lambda _, __, output: caches.append(output.past_key_values))
    with torch.inference_mode():
        scores(model, batch)
    assert set(caches) == {None}


def test_rows_without_answer_tokens_have_no_scores():
    model, batch = tiny_llama(tiny_tokenizer(False)), answers()
    batch["labels"].fill_(IGNORE)
    with torch.inference_mode():
        actual = scores(model, batch)
    for tensor in (actual.nll, actual.is_answer, actual.is_right):
        assert not tensor.any()


def test_an_error_in_the_body_is_raised_and_leaves_the_model_as_it_was():
    model, batch = tiny_llama(tiny_tokenizer(False)), answers()
    batch["input_ids"][0, 0] = 10**6
    with pytest.raises(IndexError):
        scores(model, batch)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "internvl"])
def test_passes_that_wait_for_each_other_have_the_same_scores(family, tmp_path):
    """All passes are suspended at each block, with their hidden states in files."""
    model = tiny_model(family)
    batches = [labelled(batch_of(family), kept) for kept in (16, None, 14)]
    expected = [whole_scores(model, batch)[0].detach() for batch in batches]
    actual = {}

    def call(index):
        def run(inputs):
            actual[index] = scores(model, inputs)

        return run

    blocks = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[0].endswith(("layers", "layer")) and name[-1].isdigit()
    ]
    assert len(blocks) >= 2
    token_counts = record_head(model)
    passes = iterate_blocks(
        model,
        batches,
        blocks,
        torch.device("cpu"),
        limits=StateLimits(host=0),
        folder=tmp_path,
        calls=[call(index) for index in range(3)],
        end=lambda: None,
    )
    with closing(passes):
        for block in passes:
            block.run(lambda _: None)
    assert max(token_counts) <= max(CHUNK, TRIAL_TOKENS)
    for index, nll in enumerate(expected):
        torch.testing.assert_close(actual[index].nll, nll, **CLOSE)
    assert not any("forward" in vars(module) for module in model.modules())
