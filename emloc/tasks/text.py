"""Any text data set of the hub, or a local copy of one, as prompts and answers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateSyntaxError, UndefinedError

from emloc.digest import digest
from emloc.errors import ConfigError
from emloc.examples import Example, Examples

log = logging.getLogger(__name__)

# File name extension -> loader of `datasets`. The order decides when a split has several files.
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}

# lm-eval's own settings, so that a template means the same text in both places.
_JINJA = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


def compile_template(field: str, source: str) -> Template:
    """The template of `field`; a syntax error becomes a ConfigError that names the field."""
    try:
        return _JINJA.from_string(source)
    except TemplateSyntaxError as err:
        raise ConfigError(
            f"task.{field}: {err.message} in {source!r}; correct task.{field}"
        ) from err


def render_template(field: str, template: Template, row: Mapping[str, Any]) -> str:
    """One row through a template; an unknown column is refused, never rendered as nothing."""
    try:
        return template.render(row)
    except UndefinedError as err:
        raise ConfigError(
            f"task.{field}: {err.message}; the columns are {', '.join(row)}; correct task.{field}"
        ) from err


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """A data set with a prompt and an answer in every row."""

    name: str  # word for run folders and reports; the stem of the YAML file
    id: str | None = None  # data set on the hub; read unless `path` is set
    config: str | None = None  # its configuration (subset), where it has several
    revision: str | None = None  # commit, tag or branch on the hub; null is the newest
    path: str | None = None  # local copy: a copied hub folder, or a folder of <split>.jsonl files
    train_split: str  # split to calibrate and train on
    eval_split: str  # split to evaluate on
    prompt: str  # Jinja template over the columns of a row
    target: str  # Jinja template of the answer to learn
    metric: str  # headline score: exact_match (our greedy match), or lm-eval's "metric,filter"
    lm_eval: str | None = None  # task of lm-eval to score with; null: our greedy match alone
    shots: int = 0  # solved examples lm-eval puts before each question
    limit: int | None = None  # at most this many training rows, the first ones; null is all

    def __post_init__(self) -> None:
        """Refuse what can be seen to be wrong without reading data."""
        if self.id is None and self.path is None:
            raise ConfigError("task.id and task.path are both null; set task.path=/path/to/copy")
        if self.train_split == self.eval_split:
            raise ConfigError(
                f"task.train_split and task.eval_split are both {self.eval_split}: evaluation rows "
                "would be trained on; set task.train_split=train"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"task.limit must be at least 1 or null, got {self.limit}; set task.limit=null"
            )
        if self.shots < 0:
            raise ConfigError(f"task.shots must be at least 0, got {self.shots}; set task.shots=0")
        if self.shots and self.lm_eval is None:
            raise ConfigError(
                f"task.shots={self.shots} needs lm-eval, but task.lm_eval is null; set task.shots=0"
            )
        compile_template("prompt", self.prompt)
        compile_template("target", self.target)

    @property
    def key(self) -> dict[str, Any]:
        """Where the rows come from and what is made of them. A local copy counts by content."""
        origin = {"id": self.id, "config": self.config, "revision": self.revision}
        if self.path is not None:
            origin = {"config": self.config, "files": self._fingerprint}
        names = ("train_split", "eval_split", "prompt", "target", "lm_eval", "shots")
        return origin | {name: getattr(self, name) for name in names}

    def train(self) -> Examples:
        """The first `limit` training rows whose prompt is not also an evaluation prompt."""
        return Examples(self.name, self._train_rows[: self.limit])

    @cached_property
    def _train_rows(self) -> tuple[Example, ...]:
        asked = {row.prompt for row in self._eval_rows}
        rows = self._examples(self.train_split)
        kept = tuple(row for row in rows if row.prompt not in asked)
        if len(kept) < len(rows):
            log.warning(
                "task %s: dropped %d of %d training rows whose prompt is also an evaluation prompt",
                self.name,
                len(rows) - len(kept),
                len(rows),
            )
        if not kept:
            raise ConfigError(
                f"task {self.name}: every row of task.train_split={self.train_split} is also in "
                f"task.eval_split={self.eval_split}; set task.train_split to another split"
            )
        return kept

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` rows of the evaluation split in file order, or all of them."""
        return Examples(self.name, self._eval_rows[:limit])

    def derived(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Further columns for `target`; None leaves a row out that has no answer to learn."""
        return {}

    def lm_eval_templates(self) -> dict[str, str]:
        """What replaces lm-eval's own templates, so that task.prompt holds there as well."""
        return {"doc_to_text": self.prompt, "doc_to_target": self.target}

    def source(self) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset`; lm-eval gets the same and reads the same rows."""
        if self.path is None:
            return {"path": self.id, "name": self.config, "revision": self.revision}
        files = _split_files(self._folder)
        # A folder of plain files has no configurations, so `config` says nothing about it.
        if files and not _has_card(self._folder):
            return self._plain_files(files) | {"cache_dir": self._cache}
        return {"path": str(self._folder), "name": self.config, "cache_dir": self._cache}

    @property
    def _folder(self) -> Path:
        folder = Path(str(self.path)).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"task.path: no folder {folder}; set task.path=/path/to/copy or null")
        return folder

    @cached_property
    def _fingerprint(self) -> str:
        """Digest of names and contents of the files below `path`."""
        files = {
            file.relative_to(self._folder): file
            for file in self._folder.rglob("*")
            if file.is_file()
        }
        # Hidden ones are the book-keeping of git and of the hub's downloader.
        return digest(
            [
                (name.as_posix(), _sha256(files[name]))
                for name in sorted(files)
                if not any(part.startswith(".") for part in name.parts)
            ]
        )

    @property
    def _cache(self) -> str:
        """A cache folder of its own for each content.

        `datasets` names the cache of a local folder by its last name and the paths within, so
        that another folder of that name would give the rows of the first.
        """
        import datasets

        return str(Path(datasets.config.HF_DATASETS_CACHE) / "emloc" / self._fingerprint)

    def _plain_files(self, files: dict[str, Path]) -> dict[str, Any]:
        splits = {"train_split": self.train_split, "eval_split": self.eval_split}
        for field, split in splits.items():
            self._require(field, split, files)
        # Only these two: `datasets` would read every split it is told of.
        chosen = {split: files[split] for split in splits.values()}
        loaders = {LOADERS[file.suffix] for file in chosen.values()}
        for file in chosen.values():
            if file.stat().st_size == 0:
                raise ConfigError(f"task.path: {file} is empty; set task.path=/path/to/copy")
        if len(loaders) > 1:
            names = " and ".join(file.name for file in chosen.values())
            raise ConfigError(f"task.path: {names} in {self._folder} must be of one format")
        data_files = {split: str(file) for split, file in chosen.items()}
        return {"path": loaders.pop(), "name": None, "data_files": data_files}

    def _require(self, field: str, split: str, available: Mapping[str, Any]) -> None:
        if split not in available:
            raise ConfigError(
                f"task.{field}: {self.name} has no split {split}; there is {', '.join(available)}; "
                f"set task.{field} to one of them"
            )

    @cached_property
    def _splits(self) -> Mapping[str, Any]:
        import datasets

        source = self.source()
        origin = self.path or self.id
        try:
            return dict(datasets.load_dataset(**source))
        except ConnectionError as err:
            raise ConfigError(
                f"task.id: cannot reach the hub for {origin}; set task.path=/path/to/copy"
            ) from err
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as err:
            # Of a file that cannot be parsed only the cause tells what is wrong with it.
            generated = isinstance(err, datasets.exceptions.DatasetGenerationError)
            reason = " ".join(str(err.__cause__ if generated else err).split())
            wrong = "task.id or task.revision" if self.path is None else "task.path"
            raise ConfigError(
                f"task {self.name}: cannot load {origin}: {reason}; correct {wrong} or task.config"
            ) from err

    @cached_property
    def _eval_rows(self) -> tuple[Example, ...]:
        return self._examples(self.eval_split)

    def _examples(self, split: str) -> tuple[Example, ...]:
        field = "eval_split" if split == self.eval_split else "train_split"
        self._require(field, split, self._splits)
        prompt = compile_template("prompt", self.prompt)
        target = compile_template("target", self.target)
        kept = []
        for index, row in enumerate(self._splits[split]):
            # Only `target` sees derived columns: lm-eval renders the prompt and has none of them.
            question = render_template("prompt", prompt, row)
            further = self.derived(row)
            if further is not None:
                answer = render_template("target", target, row | further)
                kept.append(Example(f"{split}/{index}", question, answer))
        total = len(self._splits[split])
        if len(kept) < total:
            log.warning("task %s: left out %d of %d rows of %s that have no usable answer",
                        self.name, total - len(kept), total, split)  # fmt: skip
        if not kept:
            raise ConfigError(
                f"task.{field}: split {split} of {self.name} has no rows; set task.{field}"
            )
        return tuple(kept)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _split_files(folder: Path) -> dict[str, Path]:
    """The files `<split>.<extension>` directly in `folder`, by split."""
    found: dict[str, Path] = {}
    for extension in LOADERS:
        for file in sorted(folder.glob(f"*{extension}")):
            found.setdefault(file.stem, file)
    return found


def _has_card(folder: Path) -> bool:
    """Whether a README declares the data files, as in a copy of a hub repository."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = card.read_text(encoding="utf-8").split("\n---")[0]
    return header.startswith("---") and "\nconfigs:" in header
