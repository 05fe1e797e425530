"""Convert a GGUF file to a checkpoint in safetensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

log = logging.getLogger(__name__)


def convert_gguf(path: Path, folder: Path) -> None:
    """Convert a GGUF file to a bfloat16 checkpoint with its tokenizer in an empty folder."""
    log.info("model: converting %s to safetensors; the result is cached", path.name)
    with _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # The converter drops the rule of SmolLM2's tokenizer to split numbers into digits.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            # Otherwise transformers treats the model as quantised and refuses to save or train it.
            quantization_config=GgufConfig(dequantize=True),
        )
    model.save_pretrained(folder)


class _Reader(gguf.GGUFReader):
    """Reader that sees the mapped file as a plain array, which numpy slices in half the time."""

    @property
    def data(self) -> np.ndarray:
        """All bytes of the file."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = mapped.view(np.ndarray)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Context in which transformers parses a GGUF file and makes its table of names only once.

    Without it, transformers parses the file three times and makes the table for each module of the
    model: 12 of the 17 seconds that the conversion of SmolLM2-135M takes.
    """
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(_Reader), cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map
