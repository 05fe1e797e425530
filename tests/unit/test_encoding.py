"""What a model sees of a prompt and its answer: tokens as in running text, turns as in its chat."""

import datetime
from dataclasses import replace

import pytest
import torch
from pieces import piece_tokenizer
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from emloc.data.chat_template import Message, pin_date, render_messages
from emloc.data.collate import IGNORE, collate
from emloc.data.examples import Example
from emloc.data.prompts import (
    encode,
    encode_pair,
    encode_prompt,
    render,
)
from emloc.data.reader import TextReader, stop_ids
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

TOWN = Example("row/1", "Which town?", "Paris")
# Chat templates in the manner of well-known families.
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "<|start|>system<|stop|>Today Date: {{ date_string }}<|eot_id|>{% for m in messages %}"
    "<|start|>{{ m['role'] }}<|stop|>{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|eot_id|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = {
    LLAMA_2: (),
    GEMMA: ("<start_of_turn>", "<end_of_turn>"),
    PHI: ("<|user|>", "<|assistant|>", "<|end|>"),
    LLAMA_3: ("<|start|>", "<|stop|>", "<|eot_id|>"),
    THINKING: ("<|start|>", "<|eot_id|>"),
    PARTS: ("<|start|>", "<|eot_id|>"),
}


def chat(template: str) -> PreTrainedTokenizerFast:
    return piece_tokenizer(template, SPECIAL[template])


def answer_tokens(tokenizer, example=TOWN) -> list[str]:
    row = encode(tokenizer, example)
    return tokenizer.convert_ids_to_tokens(row.input_ids[row.answer_start :])


# One text ----------------------------------------------------------------------------------------


def test_an_answer_has_the_pieces_that_running_text_has():
    """Alone, the answer would be read as `▁Paris`, which no text has after a line break."""
    tokenizer = chat(GEMMA)
    assert answer_tokens(tokenizer) == ["Paris", "<end_of_turn>"]
    assert tokenizer.tokenize("Paris") == ["▁Paris"]
    row = encode(tokenizer, TOWN)
    text = render(tokenizer, TOWN.prompt) + "Paris<end_of_turn>"
    assert row.input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_a_plain_answer_has_the_pieces_that_running_text_has():
    tokenizer = piece_tokenizer()
    row = encode(tokenizer, replace(TOWN, prompt="Answer:"))
    assert row.input_ids[:-1] == tokenizer("Answer: Paris").input_ids
    assert answer_tokens(tokenizer, replace(TOWN, prompt="Answer:")) == ["▁Paris", "</s>"]
    assert row.input_ids[: row.answer_start] == tokenizer("Answer:").input_ids


@pytest.mark.parametrize("end", ["?", " ", "\n", "é", " é", "of"])
@pytest.mark.parametrize("answer", ["Paris", " Paris", "\nof", "é", "12"])
def test_the_answer_begins_at_the_first_token_with_one_of_its_characters(end, answer):
    tokenizer, prompt = piece_tokenizer(), f"Which town{end}"
    pair = encode_pair(tokenizer, prompt, answer, special_tokens=True)
    assert pair.input_ids == tokenizer(prompt + answer).input_ids
    pieces = tokenizer.convert_ids_to_tokens(pair.input_ids)[1:]
    lengths = [len(piece) for piece in pieces]
    lengths[0] -= 1  # the space before the text, which the tokenizer adds
    before = sum(lengths[: pair.answer_start - 1])
    assert before <= len(prompt) < before + lengths[pair.answer_start - 1]
    assert pair.prompt_ids + pair.answer_ids == pair.input_ids


def test_a_token_with_characters_of_both_belongs_to_the_answer():
    tokenizer = piece_tokenizer()
    pair = encode_pair(tokenizer, "Answer: ", "Paris", special_tokens=True)
    assert tokenizer.convert_ids_to_tokens(pair.answer_ids) == ["▁Paris"]
    assert pair.prompt_ids == tokenizer("Answer:").input_ids


class Slow:
    """A tokenizer that does not say where its tokens are in the text."""

    is_fast = False

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, *, add_special_tokens: bool):
        return self._tokenizer(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("prompt", ["Answer:", "Answer: ", "Which town\n"])
def test_a_tokenizer_without_positions_finds_the_same_answer(prompt):
    tokenizer = piece_tokenizer()
    fast, slow = (
        encode_pair(one, prompt, " Paris", special_tokens=True)
        for one in (tokenizer, Slow(tokenizer))
    )
    assert (slow.input_ids, slow.answer_start) == (fast.input_ids, fast.answer_start)


def test_a_prompt_for_generation_lacks_the_space_of_the_answers_token():
    tokenizer = piece_tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    prompt = render(tokenizer, "Answer:")
    assert prompt == "Answer: "
    ids = encode_prompt(tokenizer, prompt, special_tokens=False)
    assert ids == tokenizer("Answer:", add_special_tokens=False).input_ids
    for other in (chat(GEMMA), tiny_tokenizer(chat=True)):
        prompt = render(other, "Which?")
        ids = encode_prompt(other, prompt, special_tokens=False)
        assert ids == other(prompt, add_special_tokens=False).input_ids


def test_a_prompt_for_generation_does_not_end_with_the_end_token():
    """Some tokenizers end every text with it. Training puts it after the answer alone."""
    tokenizer = piece_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("Answer:").input_ids[-1] == 2
    assert encode_prompt(tokenizer, "Answer:", special_tokens=True)[-1] != 2
    assert encode(tokenizer, replace(TOWN, prompt="Answer:")).input_ids.count(2) == 1


@pytest.mark.parametrize("target", ["", " ", "\n"])
@pytest.mark.parametrize("prompt", ["Which?", ""])
def test_an_empty_answer_is_refused(prompt, target):
    with pytest.raises(ConfigError, match=r"^row/1: the answer is empty, so that the model would"):
        encode(tiny_tokenizer(chat=True), Example("row/1", prompt, target))


# The end of a turn -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        (LLAMA_2, ["▁Paris", "▁", "</s>"]),
        (GEMMA, ["Paris", "<end_of_turn>"]),
        (PHI, ["Paris", "<|end|>"]),
        (LLAMA_3, ["Paris", "<|eot_id|>"]),
        (THINKING, ["Paris", "<|eot_id|>"]),
        (PARTS, ["Paris", "<|eot_id|>"]),
    ],
    ids=["llama 2", "gemma", "phi", "llama 3", "thinking", "parts"],
)
def test_the_answer_ends_as_its_turn_ends_in_the_template(template, tokens):
    tokenizer = chat(template)
    assert answer_tokens(tokenizer) == tokens
    labels = collate([encode(tokenizer, TOWN)], 0)["labels"][0]
    learnt = tokenizer.convert_ids_to_tokens(labels[labels != IGNORE])
    assert learnt == tokens


def test_a_template_that_ends_no_turn_gets_the_end_token():
    open_ended = piece_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
                                 "{% endfor %}")  # fmt: skip
    assert answer_tokens(open_ended)[-1] == "</s>"
    prompts_only = piece_tokenizer(
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}\n{% endfor %}"
    )
    assert answer_tokens(prompts_only) == ["Paris", "</s>"]


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_a_tokenizer_without_an_end_token_is_refused(template):
    with pytest.raises(ConfigError, match="the tokenizer has no end token"):
        encode(piece_tokenizer(template, end=None), TOWN)


def test_every_end_token_stops_generation():
    """Those of the generation settings, the tokenizer's own, and the one that ends a turn."""
    tokenizer = chat(GEMMA)
    ids = tokenizer.convert_tokens_to_ids(["</s>", "<end_of_turn>", "é"])
    reader = TextReader(tokenizer)
    assert stop_ids(GenerationConfig(eos_token_id=[ids[2]]), reader) == sorted(ids)
    assert stop_ids(GenerationConfig(eos_token_id=ids[2]), reader) == sorted(ids)
    assert stop_ids(None, reader) == sorted(ids[:2])
    plain = tiny_tokenizer(chat=True)
    model = tiny_llama(plain)
    assert stop_ids(model.generation_config, TextReader(plain)) == [plain.eos_token_id]


# The text of the row -----------------------------------------------------------------------------


def test_a_template_that_expects_a_list_gets_the_text():
    tokenizer = chat(PARTS)
    assert "Which town?" in render(tokenizer, "Which town?")
    assert render(tokenizer, "Which town?") == "<|start|>user\nWhich town?<|eot_id|>\n" + (
        "<|start|>assistant\n"
    )


def test_a_template_that_expects_a_text_gets_no_list():
    """A processor's prompts are lists of parts, which such a template would print as Python."""
    tokenizer = chat(GEMMA)
    tokenizer.chat_template = GEMMA.replace(" | trim", "")
    for template in (GEMMA, tokenizer.chat_template):
        tokenizer.chat_template = template
        prompt = render_messages(
            tokenizer, [Message("user", "Which?")], parts_first=True, add_generation_prompt=True
        )
        assert prompt == "<s><start_of_turn>user\nWhich?<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize(
    "template",
    ["{{ bos_token }}Hello", "{{ messages[0]['content'][:3] }}", "{{ messages[0]['text'] }}"],
)
def test_a_template_without_the_text_is_refused_with_its_checkpoint(template):
    tokenizer = piece_tokenizer(template)
    tokenizer.name_or_path = "org/model"
    with pytest.raises(ConfigError) as caught:
        encode(tokenizer, TOWN)
    assert str(caught.value) == (
        "org/model: the chat template cannot be used: its prompt does not contain the text of the "
        "row; set model.source to a checkpoint with another template"
    )


def test_a_template_that_fails_is_refused_with_its_reason():
    tokenizer = piece_tokenizer("{{ raise_exception('only tools') }}")
    with pytest.raises(ConfigError, match=r"cannot be used: only tools; set model\.source"):
        encode(tokenizer, TOWN)


def test_of_several_templates_the_default_is_used():
    tokenizer = piece_tokenizer()
    tokenizer.chat_template = {"default": "A {{ messages[0]['content'] }}", "tool_use": "B"}
    assert render(tokenizer, "Which?") == "A Which?"
    tokenizer.chat_template = {"tool_use": "B"}
    with pytest.raises(ConfigError, match="none of several is the default"):
        render(tokenizer, "Which?")


# The date ----------------------------------------------------------------------------------------


class Tomorrow(datetime.datetime):
    """A clock that another day has come on."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 3, 4)


def test_the_date_in_a_prompt_is_always_the_same(monkeypatch):
    tokenizer = chat(LLAMA_3)
    before = encode(tokenizer, TOWN)
    assert "Today Date: 26 Jul 2024<|eot_id|>" in render(tokenizer, "Which?")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    rendered = tokenizer.apply_chat_template([TOWN_TURN], tokenize=False)
    assert "04 Mar 2031" in rendered  # the clock of templates is that of the test
    assert encode(tokenizer, TOWN) == before


TOWN_TURN = {"role": "user", "content": TOWN.prompt}


def test_a_date_in_any_written_format_is_replaced():
    template = "{{ strftime_now('%Y-%m-%d') }}{{ strftime_now( \"%B %d, %Y\" ) }}"
    assert pin_date(template, "org/model") == "{{ ('2024-07-26') }}{{ (\"July 26, 2024\") }}"
    with pytest.raises(ConfigError, match=r"^org/model: the chat template writes today"):
        pin_date("{{ strftime_now(format) }}", "org/model")


def test_a_text_with_the_words_of_a_call_stays_as_it_is():
    text = (
        "{{ '<|system|>strftime_now(' }} strftime_now('%d') {# strftime_now( #}\n{%- set a = 1 %}"
    )
    assert pin_date(text, "org/model") == text
    template = text + "{{ strftime_now('%d') if strftime_now is defined }}"
    pinned = pin_date(template, "org/model")
    assert "{{ '<|system|>strftime_now(' }} strftime_now('%d')" in pinned
    assert pinned.endswith("{{ ('26') if strftime_now is defined }}")


@pytest.mark.parametrize("argument", ["form", "'%d' ~ form", "'\\x25d'", "'%d', 1", ""])
def test_a_date_in_a_computed_format_is_refused(argument):
    with pytest.raises(ConfigError, match="writes today's date in a format that it computes"):
        pin_date(f"{{{{ strftime_now({argument}) }}}}", "org/model")


def test_the_key_of_a_model_contains_the_date_of_its_prompts(monkeypatch):
    source = Source(None, "model", "identity", torch.float32)
    before = source.key
    assert "2024-07-26" in before
    monkeypatch.setattr("emloc.models.checkpoint.source.PROMPT_DATE", datetime.date(2024, 7, 27))
    assert "2024-07-27" in source.key != before
