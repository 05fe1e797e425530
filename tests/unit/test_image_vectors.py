"""Vectors of the tokens of a batch with images, put together without the model's forward pass."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import WITH_IMAGES, batch_of, tiny_model
from torch import nn

from emloc.models.embedded import VECTORS, decoder_inputs
from emloc.models.image_vectors import (
    features_of,
    image_positions,
    image_token,
    token_vectors,
)

# Families whose batches have pixels alone, and whose decoder reads nothing else.
PLAIN = ["internvl", "llava"]


def positions_of(model, batch):
    return image_positions(batch["input_ids"], image_token(model))


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_the_vectors_are_those_of_the_model(family):
    model, batch = tiny_model(family), batch_of(family)
    expected = decoder_inputs(model, model, batch)[VECTORS]
    positions, tower = positions_of(model, batch), partial(features_of, model)
    assert torch.equal(token_vectors(model, batch, None, positions, tower), expected)
    ahead = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(token_vectors(model, batch, ahead, positions, tower), expected)
    assert torch.equal(ahead, model.get_input_embeddings()(batch["input_ids"]))  # not overwritten


@torch.no_grad()
def test_text_alone_has_the_vectors_of_the_table():
    model = tiny_model("internvl")
    batch = {"input_ids": torch.arange(5, 12)[None]}
    vectors = token_vectors(model, batch, None, positions_of(model, batch), pytest.fail)
    assert torch.equal(vectors, model.get_input_embeddings()(batch["input_ids"]))


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_an_image_token_has_a_row_in_the_table(family):
    model = tiny_model(family)
    token = image_token(model)
    assert token is None or token < len(model.get_input_embeddings().weight)


def test_a_token_beyond_the_table_is_none():
    table = nn.Embedding(4, 2)
    model = SimpleNamespace(
        config=SimpleNamespace(image_token_id=4),
        get_image_features=None,
        get_input_embeddings=lambda: table,
    )
    assert image_token(model) is None
    assert image_token(nn.Module.__new__(type("M", (), {"config": SimpleNamespace()}))) is None


def test_features_of_several_images_follow_each_other():
    images = [torch.ones(2, 3), torch.zeros(1, 3)]
    for output in (images, SimpleNamespace(pooler_output=images)):
        model = SimpleNamespace(get_image_features=lambda pixel_values, one=output: one)
        assert torch.equal(features_of(model, torch.ones(1)), torch.cat(images))
    model = SimpleNamespace(get_image_features=lambda pixel_values: {"a": 1})
    with pytest.raises(RuntimeError, match="no features"):
        features_of(model, torch.ones(1))
