"""The rows of a data set: on the hub, in a copy of a hub folder, or in plain files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from emloc.errors import ConfigError
from emloc.runtime.digest import digest
from emloc.runtime.manifest import lists_all, seal
from emloc.runtime.stage_cache import set_aside_if_damaged

# File name extension -> loader of `datasets`. The order decides when a split has several files.
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the rows of a task are. Errors speak of the task's settings."""

    name: str  # of the task
    id: str | None  # data set on the hub; read unless `path` is set
    config: str | None = None  # its configuration (subset), where it has several
    revision: str | None = None  # commit, tag or branch on the hub; None is the newest
    path: str | None = None  # local copy: a copied hub folder, or a folder of <split>.jsonl files
    splits: Mapping[str, str]  # splits that are read, by the setting that names them
    files: Mapping[str, str] | None = None  # split -> file, of a data set that declares no splits
    aside: Path | None = None  # folder below `path` whose images are told apart one by one
    setting: str = "id"  # which setting `id` is

    @property
    def origin(self) -> dict[str, Any]:
        """What tells the rows apart from any other, for keys. A local copy counts by content."""
        if self.path is not None:
            return {"config": self.config, "files": self.fingerprint}
        named = {"data_files": dict(self.files)} if self.files else {}
        return {"id": self.id, "config": self.config, "revision": self.revision} | named

    def source(self) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset`."""
        if self.path is None:
            hub = {"path": self.id, "name": self.config, "revision": self.revision}
            return hub | ({"data_files": dict(self._named())} if self.files else {})
        files = self._local_files()
        # A folder of plain files has no configurations, so `config` says nothing about it.
        if files and (self.files or not _has_card(self.folder)):
            return self._plain_files(files) | {"cache_dir": self._cache}
        return {"path": str(self.folder), "name": self.config, "cache_dir": self._cache}

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return split in self._loaded

    def of(self, split: str) -> Any:
        """A split as a `datasets.Dataset`.

        Raises:
            ConfigError: the data set cannot be loaded, or has no such split.
        """
        field = next(name for name, one in reversed([*self.splits.items()]) if one == split)
        self._require(field, split, self._loaded)
        return self._loaded[split]

    @property
    def folder(self) -> Path:
        """The folder that `path` is.

        Raises:
            ConfigError: there is none.
        """
        folder = Path(str(self.path)).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"task.path: no folder {folder}; set task.path=/path/to/copy or null")
        return folder

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names and contents of the files below `path`, or of those in `files`."""
        if self.files:
            found = [self.folder / name for name in self._named().values()]
        else:
            found = [file for file in self.folder.rglob("*") if not self._is_aside(file)]
        files = {file.relative_to(self.folder): file for file in found if file.is_file()}
        # Hidden ones are the book-keeping of git and of the hub's downloader.
        return digest(
            [
                (name.as_posix(), _sha256(files[name]))
                for name in sorted(files)
                if not any(part.startswith(".") for part in name.parts)
            ]
        )

    def _is_aside(self, file: Path) -> bool:
        beside = self.aside is not None and file.is_relative_to(self.aside)
        return beside and file.suffix not in LOADERS

    @property
    def _cache(self) -> str:
        """A cache folder of its own for each content.

        `datasets` names the cache of a local folder by its last name and the paths within, so
        that another folder of that name would give the rows of the first.
        """
        import datasets

        return str(Path(datasets.config.HF_DATASETS_CACHE) / "emloc" / self.fingerprint)

    def _named(self) -> dict[str, str]:
        """The files of the splits that are read.

        Raises:
            ConfigError: a split has none.
        """
        files = self.files or {}
        for field, split in self.splits.items():
            if split not in files:
                raise ConfigError(
                    f"task.{field}: task.files names no file of {split}; "
                    f"set task.files.{split}=<file> or correct task.{field}"
                )
        return {split: files[split] for split in self.splits.values()}

    def _local_files(self) -> dict[str, Path]:
        if not self.files:
            return _split_files(self.folder)
        files = {split: self.folder / name for split, name in self._named().items()}
        for split, file in files.items():
            if not file.is_file() or file.suffix not in LOADERS:
                known = ", ".join(LOADERS)
                raise ConfigError(
                    f"task.path: {self.folder} has no file {file.name} in one of {known}; "
                    f"correct task.files.{split} or task.path"
                )
        return files

    def _plain_files(self, files: dict[str, Path]) -> dict[str, Any]:
        for field, split in self.splits.items():
            self._require(field, split, files)
        # Only these: `datasets` would read every split it is told of.
        chosen = {split: files[split] for split in self.splits.values()}
        loaders = {LOADERS[file.suffix] for file in chosen.values()}
        for file in chosen.values():
            if file.stat().st_size == 0:
                raise ConfigError(f"task.path: {file} is empty; set task.path=/path/to/copy")
        if len(loaders) > 1:
            names = " and ".join(file.name for file in chosen.values())
            raise ConfigError(f"task.path: {names} in {self.folder} must be of one format")
        data_files = {split: str(file) for split, file in chosen.items()}
        return {"path": loaders.pop(), "name": None, "data_files": data_files}

    def _require(self, field: str, split: str, available: Mapping[str, Any]) -> None:
        if split not in available:
            raise ConfigError(
                f"task.{field}: {self.name} has no split {split}; there is {', '.join(available)}; "
                f"set task.{field} to one of them"
            )

    @cached_property
    def _loaded(self) -> Mapping[str, Any]:
        import datasets

        source = self.source()
        origin = self.path or self.id
        try:
            with _prepared(source):
                return dict(datasets.load_dataset(**source))
        except ConnectionError as err:
            raise ConfigError(
                f"task.{self.setting}: cannot reach the hub for {origin}; "
                "set task.path=/path/to/copy"
            ) from err
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as err:
            # Of a file that cannot be parsed only the cause tells what is wrong with it.
            generated = isinstance(err, datasets.exceptions.DatasetGenerationError)
            reason = " ".join(str(err.__cause__ if generated else err).split())
            wrong = f"task.{self.setting} or task.revision" if self.path is None else "task.path"
            raise ConfigError(
                f"task {self.name}: cannot load {origin}: {reason}; correct {wrong} or task.config"
            ) from err


@contextmanager
def _prepared(source: Mapping[str, Any]) -> Iterator[None]:
    """Have `datasets` prepare a local copy again where what it prepared before is damaged."""
    if source.get("cache_dir") is None:
        yield
        return
    home = Path(source["cache_dir"])
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        set_aside_if_damaged(home, "task")
        yield
        if not lists_all(home):  # each configuration and choice of splits adds files
            seal(home)


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
