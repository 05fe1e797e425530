"""What the log says of a training that saves memory."""

from emloc.stages.training.lean_setup import savings


def test_each_saving_is_named_with_its_size():
    assert savings(True, ["LlamaMLP", "LlamaRMSNorm"], 113_000_000, True) == (
        "train: less memory and time by train.lean=true: each layer and its adapter are one "
        "operation; fused LlamaMLP, LlamaRMSNorm; the embedding table is in host memory "
        "(0.11 GB less on the GPU); the loss is computed in chunks"
    )


def test_what_does_not_apply_is_not_named():
    assert savings(False, [], 0, True) == (
        "train: less memory and time by train.lean=true: the loss is computed in chunks"
    )
    assert savings(False, [], 0, False).endswith(": nothing applies")
