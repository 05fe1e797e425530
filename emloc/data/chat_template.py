"""Render messages with a chat template, and find what the template writes around an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from emloc.errors import ConfigError, one_line

# The date that a template gets in place of today's, so that a prompt has the same tokens every day.
# Templates of Llama fall back to this date themselves.
PROMPT_DATE = date(2024, 7, 26)
_TODAY = "strftime_now"  # function of templates that returns today's date in a format

# Errors of a template that adds, slices or loops over a content of another form than it expects.
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
# A question and an answer that show what a template writes around an answer.
_QUESTION, _ANSWER = "Which town is it?", "Harrogate"


@dataclass(frozen=True)
class Message:
    """One turn of a chat; the images precede the text."""

    role: str  # user, assistant or system
    text: str
    images: int = 0  # number of images

    def as_text(self) -> dict[str, Any]:
        """The message for templates that expect the content as a text."""
        return {"role": self.role, "content": self.text}

    def as_parts(self) -> dict[str, Any]:
        """The message for templates that expect the content as a list of parts."""
        parts = [{"type": "image"} for _ in range(self.images)]
        return {"role": self.role, "content": [*parts, {"type": "text", "text": self.text}]}


@dataclass(frozen=True)
class AnswerFrame:
    """The text that a chat template writes around an answer."""

    lead: str  # white space between the prompt and the answer
    end: str  # text after the answer, through the token that ends the turn
    end_token: str  # this token

    def around(self, answer: str) -> str:
        """The answer with the text around it, without the end token.

        The end token is appended by its id, as not every tokenizer reads it in a text.
        """
        return self.lead + answer + self.end.removesuffix(self.end_token)


def render_messages(
    renderer: Any, messages: Sequence[Message], *, parts_first: bool = False, **options: Any
) -> str:
    """Render messages with the chat template of a tokenizer or processor.

    Some templates expect the content of a message as a text, others as a list of parts. The form
    that `parts_first` names is tried first, then the other one.

    Args:
        renderer: a tokenizer or a processor.
        messages: the turns of the chat.
        parts_first: whether the list of parts is tried first.
        options: arguments of `apply_chat_template`, such as `add_generation_prompt`.

    Raises:
        ConfigError: the rendered prompt contains the messages' text in neither form.
    """
    template = pinned_template(renderer)
    forms = [Message.as_text, Message.as_parts] if not _has_images(messages) else [Message.as_parts]
    reason = "its prompt does not contain the text of the row"
    for form in reversed(forms) if parts_first else forms:
        turns = [form(message) for message in messages]
        try:
            rendered = str(
                renderer.apply_chat_template(
                    turns, chat_template=template, tokenize=False, **options
                )
            )
        except RENDER_ERRORS as error:
            reason = one_line(error, 160)
            continue
        # Only a list of parts can be written as Python or JSON. A template may have such words of
        # its own, for instance in its system message.
        is_written = form is Message.as_parts and _writes_parts(rendered, messages)
        if _contains(rendered, messages) and not is_written:
            return rendered
    raise ConfigError(
        f"{_name(renderer)}: the chat template cannot be used: {reason}; set model.source to a "
        "checkpoint with another template"
    )


def answer_frame(tokenizer: PreTrainedTokenizerBase) -> AnswerFrame:
    """The text around an answer in the chat template of a tokenizer.

    Raises:
        ConfigError: the template does not render the text, or no token ends the turn.
    """
    return _answer_frame(tokenizer, chat_template(tokenizer), tokenizer.eos_token)


@lru_cache(maxsize=8)
def _answer_frame(
    tokenizer: PreTrainedTokenizerBase, template: str, end: str | None
) -> AnswerFrame:
    """`answer_frame`, cached by everything that it depends on."""

    def render(messages: Sequence[Message], **options: Any) -> str:
        return render_messages(tokenizer, messages, **options)

    return find_answer_frame(render, end_tokens(tokenizer), end, _name(tokenizer))


def find_answer_frame(
    render: Callable[..., str], tokens: Iterable[str], end_token: str | None, name: str
) -> AnswerFrame:
    """Render a question with and without an answer, and return the text around the answer.

    The turn ends with the first of `tokens` after the answer. If the template writes none of them,
    or does not render the answer, the turn ends with `end_token`, the end token of the tokenizer.

    Args:
        render: renders messages, with the option `add_generation_prompt`.
        tokens: tokens that can end a turn.
        end_token: the end token of the tokenizer, if it has one.
        name: name of the checkpoint for error messages.

    Raises:
        ConfigError: no token ends the turn.
    """
    question = Message("user", _QUESTION)
    prompt = render([question], add_generation_prompt=True)
    try:
        chat = render([question, Message("assistant", _ANSWER)], add_generation_prompt=False)
    except ConfigError:  # a template for prompts only
        chat = ""
    before, _, after = chat.rpartition(_ANSWER)
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    lead = lead if lead.isspace() else ""  # for instance, no empty stretch of thoughts
    ends = [(after.index(token), -len(token), token) for token in tokens if token in after]
    if ends:
        start, _, token = min(ends)
        return AnswerFrame(lead, after[:start] + token, token)
    return AnswerFrame(lead, require_end_token(end_token, name), str(end_token))


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that can end a turn: special tokens, and the end token of the tokenizer."""
    tokens = {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    } | {tokenizer.eos_token}
    return {token for token in tokens if token}


def require_end_token(token: str | None, name: str) -> str:
    """The end token of a tokenizer.

    Raises:
        ConfigError: there is none, so that no answer could end.
    """
    if not token:
        raise ConfigError(
            f"{name}: the tokenizer has no end token (eos_token in tokenizer_config.json); "
            "set model.source to a checkpoint with one"
        )
    return token


def has_template(renderer: Any) -> bool:
    """Whether the tokenizer or processor has a chat template."""
    return bool(renderer.chat_template)


def chat_template(renderer: Any) -> str:
    """The chat template of a tokenizer or processor; of several ones, the one named `default`.

    Raises:
        ConfigError: there is no template, or none of several is the default.
    """
    template = renderer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            f"{_name(renderer)}: there is no chat template, or none of several is the default; "
            "set model.source to a checkpoint with one"
        )
    return str(template)


def pinned_template(renderer: Any) -> str:
    """The chat template of a tokenizer or processor with `PROMPT_DATE` as today's date.

    Raises:
        ConfigError: there is no template, or its date cannot be replaced.
    """
    return pin_date(chat_template(renderer), _name(renderer))


@lru_cache(maxsize=8)
def pin_date(template: str, name: str) -> str:
    """The template of the checkpoint `name` with `PROMPT_DATE` in place of today's date.

    Raises:
        ConfigError: the template computes the format of the date, so that it cannot be replaced.
    """
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template)]
    except TemplateError:
        return template  # it is refused where it is rendered
    pieces: list[str] = []
    position, is_changed = 0, False
    while position < len(tokens):
        kind, text = tokens[position]
        position += 1
        # Only code calls the function: a text, such as a system message, may have the same words.
        if kind == "name" and text == _TODAY:
            behind = [
                index for index in range(position, len(tokens)) if tokens[index][0] != "whitespace"
            ][:3]
            call = [tokens[index] for index in behind]
            if call[:1] == [("operator", "(")]:
                text, is_changed = _date_text(call, name), True
                position = behind[-1] + 1
        pieces.append(text)
    return "".join(pieces) if is_changed else template


def _date_text(call: Sequence[tuple[str, str]], name: str) -> str:
    """The date as a text in parentheses, in the format of a call `("...")`.

    Args:
        call: kind and text of the first three tokens behind the name of the function.
        name: of the checkpoint.

    Raises:
        ConfigError: the call computes the format.
    """
    is_written = len(call) == 3 and call[1][0] == "string" and call[2] == ("operator", ")")
    if not is_written or "\\" in call[1][1]:
        raise ConfigError(
            f"{name}: the chat template writes today's date in a format that it computes, so that "
            "prompts would change from day to day; set model.source to a checkpoint with another "
            "template"
        )
    quote, form = call[1][1][0], call[1][1][1:-1]
    return f"({quote}{PROMPT_DATE.strftime(form)}{quote})"


def _has_images(messages: Sequence[Message]) -> bool:
    """Whether a message has an image, which only a list of parts can hold."""
    return any(message.images for message in messages)


def _contains(rendered: str, messages: Sequence[Message]) -> bool:
    """Whether a rendered prompt contains the text of all messages.

    White space may differ, as templates trim texts.
    """
    texts = [message.text for message in messages]
    return all(text in rendered for text in texts) or all(
        " ".join(text.split()) in " ".join(rendered.split()) for text in texts
    )


def _writes_parts(rendered: str, messages: Sequence[Message]) -> bool:
    """Whether a template that was given lists of parts has written one as Python or JSON."""
    marks = ("'type': 'text'", '"type": "text"')
    return any(
        mark in rendered and not any(mark in message.text for message in messages) for mark in marks
    )


def _name(renderer: Any) -> str:
    """Folder of the checkpoint that a tokenizer or processor was read from."""
    tokenizer = getattr(renderer, "tokenizer", renderer)
    return str(getattr(tokenizer, "name_or_path", "") or "the checkpoint")
