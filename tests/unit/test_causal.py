"""Models whose attention needs no mask for padding behind the text."""

from inspect import signature

import pytest
import torch
from families import TEXT, batch_of, tiny_model
from tiny import tiny_llama, tiny_tokenizer
from transformers import BertConfig, BertModel, masking_utils
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from emloc.models.causal import is_causal, unmasked
from emloc.models.decoder import decoder_of


@pytest.fixture
def masks(monkeypatch):
    """The mask that each attention module gets while transformers believes that it is recorded."""
    given = []
    forward = sdpa_attention.sdpa_attention_forward

    def note(module, query, key, value, attention_mask, **options):
        given.append(attention_mask)
        return forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", note)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    return given


def test_a_recorded_model_gets_no_mask(masks):
    model = tiny_llama(tiny_tokenizer(chat=False))
    ids = torch.arange(12).view(2, 6)
    masked = model(input_ids=ids, use_cache=False).logits
    assert all(mask is not None for mask in masks)
    masks.clear()
    before = masking_utils.is_tracing
    with unmasked():
        plain = model(input_ids=ids, use_cache=False).logits
    assert masks == [None] * model.config.num_hidden_layers
    torch.testing.assert_close(plain, masked)
    assert masking_utils.is_tracing is before


@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_padding_behind_the_text_changes_no_logits(family):
    model, left = tiny_model(family), batch_of(family)
    mask = left["attention_mask"]
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    accepted = positions if "position_ids" in signature(model.forward).parameters else {}
    expected = model(**left, **accepted, use_cache=False).logits
    right = torch.stack(
        [
            ids.roll(-int((real == 0).sum()))
            for ids, real in zip(left["input_ids"], mask, strict=True)
        ]
    )
    with unmasked():
        logits = model(input_ids=right, use_cache=False).logits
    for own, other, real in zip(logits, expected, mask.bool(), strict=True):
        torch.testing.assert_close(own[: int(real.sum())], other[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "internvl"])
def test_decoders_are_causal(family):
    assert is_causal(decoder_of(tiny_model(family)))


def test_a_prefix_that_sees_itself_is_not_causal():
    assert not is_causal(decoder_of(tiny_model("paligemma")))


def test_an_encoder_is_not_causal():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    assert not is_causal(BertModel(BertConfig(num_hidden_layers=1, vocab_size=8, **sizes)))


def test_what_has_no_attention_is_not_known_to_be_causal():
    assert not is_causal(torch.nn.Linear(2, 2))
