"""Avoid an attention kernel where it can return NaN gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Disable cuDNN attention inside the context, for the whole process; restore it afterwards.

    On Hopper GPUs, the backward pass of cuDNN attention returns NaN for rows whose scores are all
    very low, such as padding. It does so with a mask, at lengths of 64 beyond a multiple of 128
    (torch 2.11 and later, pytorch issue 196678). Other kernels are correct, and as fast with a
    mask.
    """
    with _cudnn(enabled=False):
        yield


@contextmanager
def with_cudnn() -> Iterator[None]:
    """Allow cuDNN attention inside the context, for causal attention without a mask.

    There it has no NaN gradients, and is the fastest kernel on Hopper GPUs.
    """
    with _cudnn(enabled=True):
        yield


@contextmanager
def _cudnn(*, enabled: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
