"""The tokenizer in a checkpoint's folder, built without any code that lies there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
)
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import import_protobuf

from emloc.errors import ConfigError

# The class that InternLM2's folders name, which is code of theirs around a SentencePiece model.
INTERNLM2 = "InternLM2Tokenizer"
SPACE = "▁"  # as SentencePiece writes it
# Kinds of pieces, and of models, in sentencepiece_model.proto.
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_of(folder: Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, where config.json is of `config` or transformers can read it.

    Raises:
        ConfigError: it is InternLM2's, and its files do not make one.
    """
    if _settings(folder).get("tokenizer_class") == INTERNLM2:
        return _internlm2(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, config=config, trust_remote_code=False
    )
    return tokenizer


def added_tokens(folder: Path) -> dict[str, int]:
    """Token -> id of what the tokenizer's files add to its vocabulary; nothing is built for it."""
    return {token.content: index for index, token in _added(folder).items()}


def _added(folder: Path) -> dict[int, AddedToken]:
    """By id; where several files speak of one, it is as tokenizer_config.json says."""
    stored = [
        *_read(folder / "tokenizer.json").get("added_tokens", []),
        *(
            {"content": content, "id": index, "special": True}
            for content, index in _read(folder / "added_tokens.json").items()
        ),
        *(
            entry | {"id": int(index)}
            for index, entry in _settings(folder).get("added_tokens_decoder", {}).items()
        ),
    ]
    return {
        entry["id"]: AddedToken(
            entry["content"],
            **({"normalized": False} | {key: entry[key] for key in _FLAGS if key in entry}),
        )
        for entry in sorted(stored, key=lambda entry: entry["id"])
    }


def _internlm2(folder: Path) -> PreTrainedTokenizerBase:
    """InternLM2's tokenizer out of its SentencePiece model and its tokenizer_config.json.

    As its own class does, every stretch of text between added tokens is a text to SentencePiece,
    the added tokens' names stand in for those of the pieces with their ids, and `<s>` is put first.

    Raises:
        ConfigError: there is no such model, it is no BPE, or the ids of added tokens leave a gap.
    """
    path = folder / "tokenizer.model"
    if not path.exists():
        raise ConfigError(f"{folder}: no tokenizer.model there; set model.source to one with it")
    proto = import_protobuf().ModelProto.FromString(path.read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise ConfigError(f"{path}: its model is no BPE; set model.source to one with it")
    settings, added = _settings(folder), _added(folder)
    core = _byte_pairs(proto, added)
    astray = [token.content for i, token in added.items() if core.token_to_id(token.content) != i]
    if astray:
        raise ConfigError(
            f"{folder}: the token {astray[0]} cannot have the id that its files give it; "
            "set model.source to another checkpoint"
        )
    named = {f"{key}_token": settings.get(f"{key}_token") for key in ("bos", "eos", "unk", "pad")}
    special = {key: _content(token) for key, token in named.items() if token is not None}
    before = [special["bos_token"]] if settings.get("add_bos_token", True) else []
    after = [special["eos_token"]] if settings.get("add_eos_token", False) else []
    core.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *before, "$B", *after],
        special_tokens=[(name, core.token_to_id(name)) for name in {*before, *after}],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=settings.get("chat_template"),
        model_max_length=settings.get("model_max_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_pairs(proto: Any, added: dict[int, AddedToken]) -> Tokenizer:
    """The BPE of a SentencePiece model, with `added` by id in place of pieces or behind them.

    Of two neighbours the pair goes first whose union scores best; bytes stand in for what no piece
    has. Pieces that SentencePiece itself never builds out of others have no pairs here. Pieces that
    a user defined end a stretch of text as added tokens do: were there a model with such pieces and
    a space put before every text, what follows one would get that space too.
    """
    pieces = [added[i].content if i in added else one.piece for i, one in enumerate(proto.pieces)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    built = [one for i, one in enumerate(proto.pieces) if one.type == _NORMAL and i not in added]
    known = {one.piece for one in built}
    pairs = [
        (one.piece[:cut], one.piece[cut:])
        for one in sorted(built, key=lambda one: -one.score)
        for cut in range(1, len(one.piece))
        if one.piece[:cut] in known and one.piece[cut:] in known
    ]
    unknown = pieces[proto.trainer_spec.unk_id]
    core = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spec = proto.normalizer_spec
    core.normalizer = _normalizer(spec)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else steps
    )
    core.add_tokens(
        [
            AddedToken(one.piece, normalized=False)
            for i, one in enumerate(proto.pieces)
            if one.type == _USER_DEFINED and i not in added
        ]
    )
    core.add_tokens(list(added.values()))
    return core


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """What SentencePiece does to a text before it looks for pieces."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _content(token: str | dict[str, Any]) -> str:
    """A special token as tokenizer_config.json has it: its text, or that with its flags."""
    return str(token["content"]) if isinstance(token, dict) else token


def _settings(folder: Path) -> dict[str, Any]:
    return _read(folder / "tokenizer_config.json")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
