"""Encode an example as tokens; calibration, training, scoring and lm-eval share this encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emloc.data.chat_template import (
    AnswerFrame,
    Message,
    answer_frame,
    has_template,
    render_messages,
    require_end_token,
)
from emloc.data.examples import Example
from emloc.data.image import LazyImage
from emloc.errors import ConfigError
from emloc.runtime.digest import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Separates a plain prompt from its answer. A chat template puts its own end of turn there.
DELIMITER = " "
# An answer that shows which tokens a prompt has in front of one.
_PROBE = "Paris"


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

    @property
    def key(self) -> str:
        """Digest of what the model reads: tokens, the place of the answer, and images."""
        return digest([self.input_ids, self.answer_start, [image.key for image in self.images]])


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt and its answer, which were encoded as one text."""

    input_ids: list[int]
    answer_start: int  # position of the first token with a character of the answer

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids before the answer."""
        return self.input_ids[: self.answer_start]

    @property
    def answer_ids(self) -> list[int]:
        """Token ids of the answer."""
        return self.input_ids[self.answer_start :]


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Render a prompt with the chat template, or return it unchanged if there is no template.

    Raises:
        ConfigError: the rendered prompt would not contain the prompt.
    """
    if not has_template(tokenizer):
        return prompt
    return render_messages(tokenizer, [Message("user", prompt)], add_generation_prompt=True)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> AnswerFrame:
    """The text before and after an answer: the chat template's, or a space and the end token.

    Raises:
        ConfigError: no token ends an answer.
    """
    if has_template(tokenizer):
        return answer_frame(tokenizer)
    end = require_end_token(tokenizer.eos_token, str(tokenizer.name_or_path or "the checkpoint"))
    return AnswerFrame(DELIMITER, end, end)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """Encode prompt, answer and end token.

    A chat template writes special tokens itself, so the tokenizer adds none to it. An example
    without a prompt is plain text: no chat template is applied to it.

    Raises:
        ConfigError: the answer is empty, or the chat template does not render the prompt.
    """
    if not example.prompt:
        ids = tokenizer(example.target).input_ids
        if not example.target.strip() or not ids:
            raise _empty_answer_error(example)
        return EncodedExample(example.id, ids, 0)
    prompt = render(tokenizer, example.prompt)
    pair = encode_answer(tokenizer, prompt, example, frame_of(tokenizer))
    return EncodedExample(example.id, pair.input_ids, pair.answer_start)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    example: Example,
    frame: AnswerFrame,
    *,
    special_tokens: bool | None = None,
) -> EncodedPair:
    """Encode a rendered prompt with the answer of an example and the end of its turn.

    Args:
        tokenizer: the tokenizer.
        prompt: the rendered prompt.
        example: the example with the answer.
        frame: text before and after the answer.
        special_tokens: whether the tokenizer adds special tokens; None: without a chat template.

    Raises:
        ConfigError: the answer is empty.
    """
    if not example.target.strip():
        raise _empty_answer_error(example)
    if special_tokens is None:
        special_tokens = not has_template(tokenizer)
    text = frame.around(example.target)
    pair = encode_pair(tokenizer, prompt, text, special_tokens=special_tokens)
    if pair.answer_start >= len(pair.input_ids):
        raise _empty_answer_error(example)
    end_id = tokenizer.convert_tokens_to_ids(frame.end_token)
    ids = pair.input_ids if pair.input_ids[-1] == end_id else [*pair.input_ids, end_id]
    return EncodedPair(ids, pair.answer_start)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, special_tokens: bool
) -> EncodedPair:
    """Encode a prompt and its answer as one text.

    The answer begins at the first token that holds a character of it. A token with characters of
    both therefore belongs to the answer. A tokenizer without positions of its tokens is asked for
    the prompt alone: the answer begins where the two encodings differ.
    """
    text = prompt + answer
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
        ids, ends = encoding.input_ids, [end for _, end in encoding.offset_mapping]
        start = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
        return EncodedPair(ids, start)
    ids = tokenizer(text, add_special_tokens=special_tokens).input_ids
    prompt_ids = tokenizer(prompt, add_special_tokens=special_tokens).input_ids
    pairs = zip(ids, prompt_ids, strict=False)
    same = min(len(ids), len(prompt_ids))
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), same)
    return EncodedPair(ids, start)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, special_tokens: bool
) -> list[int]:
    """Token ids of a rendered prompt for generation, as a model sees them before an answer.

    A model that was trained on `Answer: Paris` has seen the tokens `Answer`, `:` and ` Paris`. The
    prompt `Answer: ` therefore ends with `:`.
    """
    answer = frame_of(tokenizer).lead + _PROBE
    return encode_pair(tokenizer, prompt, answer, special_tokens=special_tokens).prompt_ids


def _empty_answer_error(example: Example) -> ConfigError:
    """The error for an example whose answer has no token."""
    return ConfigError(
        f"{example.id}: the answer is empty, so that the model would learn to say nothing; "
        "correct the row or task.target"
    )
