"""The share of a model's blocks in linear layers decides whether an emulator is built of them."""

import logging

import pytest
from torch import nn

from emloc.errors import ConfigError
from emloc.models.coverage import coverage_of, log_share, no_linear_reason, require_linear_blocks


def model(widths: list[int]) -> nn.Module:
    """Return a model with one block per width: a linear layer of 100 weights and an embedding."""
    blocks = [
        nn.ModuleDict({"linear": nn.Linear(10, 10, bias=False), "table": nn.Embedding(10, width)})
        for width in widths
    ]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": nn.Linear(10, 1000)})


@pytest.mark.parametrize(
    ("blocks", "share"),
    [(None, 200 / 270), (["layers.0"], 100 / 120), (["layers.1"], 100 / 150), ([], 1.0)],
)
def test_the_share_is_that_of_the_named_blocks(blocks, share):
    coverage = coverage_of(model([2, 5]), blocks)
    assert coverage.share == pytest.approx(share)
    assert coverage.rest == ("Embedding" if blocks != [] else "")


def test_shared_parameters_count_once():
    tied = model([5, 5])
    tied.layers[1].table.weight = tied.layers[0].table.weight
    assert coverage_of(tied).share == pytest.approx(200 / 250)


def test_less_than_half_is_refused():
    require_linear_blocks(model([10]), ["layers.0"], "emulator=svd", "set model to another")
    message = (
        "emulator=svd works on linear layers, which have 48% of the parameters of the blocks; "
        "most are in Embedding and would stay as they are; set model to another"
    )
    with pytest.raises(ConfigError, match=message):
        require_linear_blocks(model([11]), ["layers.0"], "emulator=svd", "set model to another")


@pytest.mark.parametrize(("width", "lines"), [(1, 0), (2, 1)])
def test_the_share_is_logged_where_it_is_not_nearly_all(caplog, width, lines):
    with caplog.at_level(logging.INFO):
        log_share(model([width]), ["layers.0"], "compression.of=linears counts linear layers")
    assert [record.getMessage() for record in caplog.records] == lines * [
        "compression.of=linears counts linear layers, which have 83% of the parameters of the "
        "blocks; others are in Embedding"
    ]


def test_blocks_without_linear_layers_have_a_reason():
    tables = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"table": nn.Embedding(3, 3)})])})
    reason = "its blocks consist of Embedding and have no nn.Linear layer"
    assert no_linear_reason(tables) == reason
    assert no_linear_reason(model([50])) is None
    assert no_linear_reason(nn.Linear(2, 2)) is None
