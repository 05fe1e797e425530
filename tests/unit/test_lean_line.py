"""The log line about the memory-saving training path."""

from emloc.stages.training.lean_setup import savings


def test_each_saving_is_named_with_its_size():
    assert savings(True, ["LlamaMLP", "LlamaRMSNorm"], 113_000_000, True) == (
        "train: train.lean=true saves memory and time: each layer and its adapter run as one "
        "operation, LlamaMLP and LlamaRMSNorm are fused, the embedding table stays in host memory "
        "(0.11 GB less on the GPU), the loss is computed in chunks"
    )


def test_savings_that_do_not_apply_are_not_named():
    assert savings(False, [], 0, True) == (
        "train: train.lean=true saves memory and time: the loss is computed in chunks"
    )
    assert savings(False, [], 0, False) == (
        "train: train.lean=true saves no memory with this model and adapter"
    )
