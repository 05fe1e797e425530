"""The one rendering of an example: calibration, training, loss and lm-eval all see these tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emloc.data.examples import Example
from emloc.data.image import LazyImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Between a plain prompt and its answer. A chat template puts its own end of turn there.
DELIMITER = " "


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example; the answer, end token included, starts at `answer_start`."""

    id: str
    input_ids: list[int]
    answer_start: int
    images: tuple[LazyImage, ...] = ()  # in the order of their places
    prompt: str = ""  # rendered, where whoever makes pixels of the images needs it

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as the model reads it: through its chat template if it has one, else plain."""
    if tokenizer.chat_template is None:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """Tokens of prompt, answer and end token.

    A chat template writes its own special tokens, so none are added to it. Without a prompt the
    example is running text, and nobody's turn.
    """
    if not example.prompt:
        return EncodedExample(example.id, tokenizer(example.target).input_ids, 0)
    chat = tokenizer.chat_template is not None
    prompt = tokenizer(render(tokenizer, example.prompt), add_special_tokens=not chat).input_ids
    answer = example.target if chat else DELIMITER + example.target
    target = tokenizer(answer, add_special_tokens=False).input_ids
    ids = [*prompt, *target, tokenizer.eos_token_id]
    return EncodedExample(example.id, ids, len(prompt))
