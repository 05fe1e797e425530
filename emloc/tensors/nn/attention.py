"""Attention whose gradients can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn() -> Iterator[None]:
    """No attention by cuDNN inside, for the whole process; what was set before comes back.

    Under a mask, at lengths of 64 beyond a multiple of 128, its backward pass on Hopper chips makes
    NaN of a row whose scores are all very low, padding for one (from torch 2.11 on, pytorch issue
    196678). The other kernels do not, at the same speed for what masks are used for.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
