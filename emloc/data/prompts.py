"""Encode an example as tokens; calibration, training, scoring and lm-eval share this encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emloc.data.examples import Example
from emloc.data.image import LazyImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Separates a plain prompt from its answer. A chat template puts its own end of turn there.
DELIMITER = " "


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example: the prompt, the answer and the end token."""

    id: str
    input_ids: list[int]
    answer_start: int  # position of the first answer token
    images: tuple[LazyImage, ...] = ()  # in the order of their image tokens
    prompt: str = ""  # rendered prompt, for processors that compute pixels from prompt and images

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Render a prompt with the chat template, or return it unchanged if there is no template."""
    if tokenizer.chat_template is None:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """Encode prompt, answer and end token.

    A chat template writes special tokens itself, so the tokenizer adds none to it. An example
    without a prompt is plain text: no chat template is applied to it.
    """
    if not example.prompt:
        return EncodedExample(example.id, tokenizer(example.target).input_ids, 0)
    chat = tokenizer.chat_template is not None
    prompt = render(tokenizer, example.prompt)
    prompt_ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
    answer = example.target if chat else DELIMITER + example.target
    answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
    ids = [*prompt_ids, *answer_ids, tokenizer.eos_token_id]
    return EncodedExample(example.id, ids, len(prompt_ids))
