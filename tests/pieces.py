"""Build tokenizers like SentencePiece's, where a space belongs to the word that follows it."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("Paris", "Answer", "Which", "town", "of", "So")
SPACE = "▁"


def piece_tokenizer(
    template: str | None = None, special: tuple[str, ...] = (), end: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a piece for each word, alone and after a space.

    Args:
        template: chat template.
        special: special tokens beside `<s>` and `</s>`.
        end: the tokenizer's end token.
    """
    letters = [*string.ascii_letters, *string.digits, *string.punctuation, "\n", "é"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), (SPACE, -3.0)]
    pieces += [(letter, -4.0) for letter in letters]
    pieces += [(start + word, -1.0) for word in WORDS for start in ("", SPACE)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(SPACE, prepend_scheme="first", split=False)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **names,
        **({} if end is None else {"eos_token": end}),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer
