"""Open a checkpoint's tokenizer without running code from the checkpoint."""

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
from emloc.models.checkpoint.damaged import naming

# Tokenizer class of InternLM2: Python code in the checkpoint that wraps a SentencePiece model.
INTERNLM2 = "InternLM2Tokenizer"
SPACE = "▁"  # SentencePiece's character for a space
# Types of pieces (normal, user-defined) and of models (BPE) in sentencepiece_model.proto.
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2
# Properties of an added token in tokenizer_config.json.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_of(folder: Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Open the tokenizer in `folder`.

    `config` is the model's configuration, for folders whose config.json transformers cannot read.

    Raises:
        ConfigError: the files of an InternLM2 tokenizer are missing or inconsistent, or
            transformers cannot read the files.
    """
    if _read_settings(folder).get("tokenizer_class") == INTERNLM2:
        return _internlm2(folder)
    with naming(folder, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False
        )
    return tokenizer


def added_tokens(folder: Path) -> dict[str, int]:
    """Added token -> id, read from the tokenizer's files without opening the tokenizer."""
    return {token.content: token_id for token_id, token in _read_added_tokens(folder).items()}


def _read_added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Id -> added token; tokenizer_config.json overrides the other files."""
    stored = [
        *_read_json(folder / "tokenizer.json").get("added_tokens", []),
        *(
            {"content": content, "id": token_id, "special": True}
            for content, token_id in _read_json(folder / "added_tokens.json").items()
        ),
        *(
            entry | {"id": int(token_id)}
            for token_id, entry in _read_settings(folder).get("added_tokens_decoder", {}).items()
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
    """Build InternLM2's tokenizer from its SentencePiece model and tokenizer_config.json.

    The result equals that of InternLM2's own class: SentencePiece encodes each stretch of text
    between added tokens separately, an added token replaces the piece with its id, and `<s>` is
    put before the text.

    Raises:
        ConfigError: the SentencePiece model is missing or no BPE model, or the ids of the added
            tokens leave a gap.
    """
    path = folder / "tokenizer.model"
    if not path.exists():
        raise ConfigError(
            f"{folder}: no tokenizer.model there; set model.source to a folder with this file"
        )
    proto = import_protobuf().ModelProto.FromString(path.read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise ConfigError(f"{path}: no BPE model; set model.source to a checkpoint with one")
    settings, added = _read_settings(folder), _read_added_tokens(folder)
    tokenizer = _bpe_tokenizer(proto, added)
    misplaced = [
        token.content
        for token_id, token in added.items()
        if tokenizer.token_to_id(token.content) != token_id
    ]
    if misplaced:
        raise ConfigError(
            f"{folder}: the token {misplaced[0]} cannot have the id that the tokenizer's "
            "files assign; set model.source to another checkpoint"
        )
    named = {f"{key}_token": settings.get(f"{key}_token") for key in ("bos", "eos", "unk", "pad")}
    special = {key: _token_text(token) for key, token in named.items() if token is not None}
    before = [special["bos_token"]] if settings.get("add_bos_token", True) else []
    after = [special["eos_token"]] if settings.get("add_eos_token", False) else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *before, "$B", *after],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in {*before, *after}],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=settings.get("chat_template"),
        model_max_length=settings.get("model_max_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _bpe_tokenizer(proto: Any, added: dict[int, AddedToken]) -> Tokenizer:
    """Convert a SentencePiece BPE model; `added` tokens replace pieces by id or follow them.

    A merge has the priority of the merged piece's score, and characters without a piece are encoded
    as bytes. Only normal pieces take part in merges, as in SentencePiece. User-defined pieces end a
    stretch of text as added tokens do. A model that has such pieces and puts a space before every
    text would differ from SentencePiece: the text after such a piece would get this space too.
    """
    pieces = [
        added[token_id].content if token_id in added else piece.piece
        for token_id, piece in enumerate(proto.pieces)
    ]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    normal_pieces = [
        piece
        for token_id, piece in enumerate(proto.pieces)
        if piece.type == _NORMAL and token_id not in added
    ]
    normal_texts = {piece.piece for piece in normal_pieces}
    merges = [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in sorted(normal_pieces, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in normal_texts and piece.piece[cut:] in normal_texts
    ]
    unknown = pieces[proto.trainer_spec.unk_id]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spec = proto.normalizer_spec
    tokenizer.normalizer = _normalizer(spec)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else steps
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False)
            for token_id, piece in enumerate(proto.pieces)
            if piece.type == _USER_DEFINED and token_id not in added
        ]
    )
    tokenizer.add_tokens(list(added.values()))
    return tokenizer


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """The normalisation that SentencePiece applies to a text before it splits it into pieces."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _token_text(token: str | dict[str, Any]) -> str:
    """Text of a special token in tokenizer_config.json: a string, or a dictionary with flags."""
    return str(token["content"]) if isinstance(token, dict) else token


def _read_settings(folder: Path) -> dict[str, Any]:
    """Content of tokenizer_config.json in the folder."""
    return _read_json(folder / "tokenizer_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if the file does not exist."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content
