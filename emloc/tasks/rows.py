"""Load the rows of a data set from the hub, from a copy of a hub folder, or from plain files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from emloc.errors import ConfigError, one_line
from emloc.runtime.digest import digest
from emloc.runtime.manifest import has_complete_manifest, seal
from emloc.runtime.stage_cache import set_aside_if_damaged
from emloc.tasks.columns import integer_cells, refuse_duplicate_columns, written_cells
from emloc.tasks.marked_rows import RowMarks, class_columns

# File name extension -> loader of `datasets`. If a split has several files, the first one counts.
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The stored rows of a task's data set; errors name the task's settings."""

    name: str  # name of the task
    id: str | None  # data set on the hub; not used if `path` is set
    config: str | None = None  # configuration (subset) of the data set; None if it has only one
    revision: str | None = None  # commit, tag or branch on the hub; None: the newest
    path: str | None = None  # local copy: a copied hub folder, or a folder of <split>.jsonl files
    splits: Mapping[str, str]  # name of the setting, such as train_split -> split to read
    files: Mapping[str, str] | None = None  # split -> file, if the data set declares no splits
    image_folder: Path | None = None  # folder below `path`; its images have cache keys of their own
    setting: str = "id"  # name of the setting in `task` that has the value `id`
    # Split -> column -> its cells as they are written; see `written_cells`.
    _written_by_split: dict[str, dict[str, list[str]]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    @property
    def origin(self) -> dict[str, Any]:
        """Origin of the rows for cache keys: hub id and revision, or the digest of a local copy."""
        if self.path is not None:
            return {"config": self.config, "files": self.fingerprint}
        data_files = {"data_files": dict(self.files)} if self.files else {}
        return {"id": self.id, "config": self.config, "revision": self.revision} | data_files

    def source(self) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset` that load the rows."""
        if self.path is None:
            hub = {"path": self.id, "name": self.config, "revision": self.revision}
            return hub | ({"data_files": dict(self._file_names())} if self.files else {})
        files = self._local_files()
        # A folder of plain files has no configurations, so `config` is ignored.
        if files and (self.files or not _has_card(self.folder)):
            return self._plain_files(files) | {"cache_dir": self._cache}
        return {"path": str(self.folder), "name": self.config, "cache_dir": self._cache}

    def has(self, split: str) -> bool:
        """Whether the data set has the split."""
        return split in self._loaded

    def of(self, split: str) -> Any:
        """The rows of a split, as a `datasets.Dataset`.

        Raises:
            ConfigError: the data set cannot be loaded, or it does not have the split.
        """
        field = next(name for name, value in reversed([*self.splits.items()]) if value == split)
        self._require(field, split, self._loaded)
        return self._loaded[split]

    def marks(self, split: str) -> RowMarks:
        """What templates must know of the rows of a split beside their values."""
        rows = self.of(split)
        return RowMarks(class_columns(rows), self._written(split))

    def written_columns(self) -> list[str]:
        """Names of columns of local CSV files that templates write as the files do."""
        splits = [split for split in self.splits.values() if self._csv_file(split)]
        return sorted({name for split in splits for name in self._written(split)})

    def _written(self, split: str) -> dict[str, list[str]]:
        """Column -> its cells as texts; see `written_cells` and `integer_cells`."""
        if split not in self._written_by_split:
            rows, file = self.of(split), self._csv_file(split)
            cells = written_cells(rows, file) if file else integer_cells(rows)
            self._written_by_split[split] = cells
        return self._written_by_split[split]

    def _csv_file(self, split: str) -> Path | None:
        """The local CSV file of a split; None for other data."""
        source = self.source() if self.path is not None else {}
        return Path(source["data_files"][split]) if source.get("path") == "csv" else None

    @property
    def folder(self) -> Path:
        """The folder of the local copy.

        Raises:
            ConfigError: `path` is no folder.
        """
        folder = Path(str(self.path)).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"task.path: no folder {folder}; set task.path=/path/to/copy or null")
        return folder

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names and contents of the files in `files`, or of all files below `path`."""
        if self.files:
            paths = [self.folder / name for name in self._file_names().values()]
        else:
            paths = [file for file in self.folder.rglob("*") if not self._is_image(file)]
        files = {file.relative_to(self.folder): file for file in paths if file.is_file()}
        # Hidden files are skipped: git and the hub's downloader write them for themselves.
        return digest(
            [
                (name.as_posix(), _sha256(files[name]))
                for name in sorted(files)
                if not any(part.startswith(".") for part in name.parts)
            ]
        )

    def _is_image(self, file: Path) -> bool:
        """Whether the file lies in the image folder and is no data file."""
        in_folder = self.image_folder is not None and file.is_relative_to(self.image_folder)
        return in_folder and file.suffix not in LOADERS

    @property
    def _cache(self) -> str:
        """Cache folder of `datasets` for this content of the local copy.

        `datasets` itself names the cache of a local folder after the folder's last name and the
        paths in it. A second folder with the same name would therefore return the first's rows.
        """
        import datasets

        return str(Path(datasets.config.HF_DATASETS_CACHE) / "emloc" / self.fingerprint)

    def _file_names(self) -> dict[str, str]:
        """Split -> file name in `files`, for the splits to read.

        Raises:
            ConfigError: `files` has no entry for a split.
        """
        files = self.files or {}
        for field, split in self.splits.items():
            if split not in files:
                raise ConfigError(
                    f"task.{field}: task.files names no file of the split {split}; "
                    f"set task.files.{split}=<file> or correct task.{field}"
                )
        return {split: files[split] for split in self.splits.values()}

    def _local_files(self) -> dict[str, Path]:
        """Split -> file in the local copy.

        Raises:
            ConfigError: a file in `files` is missing or has an unknown format.
        """
        if not self.files:
            return _split_files(self.folder)
        files = {split: self.folder / name for split, name in self._file_names().items()}
        for split, file in files.items():
            if not file.is_file() or file.suffix not in LOADERS:
                formats = ", ".join(LOADERS)
                raise ConfigError(
                    f"task.path: {self.folder} has no file {file.name} with one of the formats "
                    f"{formats}; correct task.files.{split} or task.path"
                )
        return files

    def _plain_files(self, files: dict[str, Path]) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset` for data files without a dataset card.

        Raises:
            ConfigError: a split has no file, a file is empty, or the files differ in format.
        """
        for field, split in self.splits.items():
            self._require(field, split, files)
        # The other splits are left out, because `datasets` reads every split in its arguments.
        split_files = {split: files[split] for split in self.splits.values()}
        loaders = {LOADERS[file.suffix] for file in split_files.values()}
        for file in split_files.values():
            if file.stat().st_size == 0:
                raise ConfigError(f"task.path: {file} is empty; set task.path=/path/to/copy")
        if len(loaders) > 1:
            names = " and ".join(file.name for file in split_files.values())
            raise ConfigError(
                f"task.path: {names} in {self.folder} must have the same format; "
                "set task.path to a folder with files of one format"
            )
        data_files = {split: str(file) for split, file in split_files.items()}
        loader = loaders.pop()
        # Only an empty cell is missing. The words None and NA can be labels.
        words = {"keep_default_na": False, "na_values": [""]} if loader == "csv" else {}
        return {"path": loader, "name": None, "data_files": data_files} | words

    def _require(self, field: str, split: str, available: Mapping[str, Any]) -> None:
        """Raise `ConfigError` if the split that the setting `field` names is not available."""
        if split not in available:
            raise ConfigError(
                f"task.{field}: {self.name} has no split {split}; "
                f"set task.{field} to one of: {', '.join(available)}"
            )

    @cached_property
    def _loaded(self) -> Mapping[str, Any]:
        """Split -> its rows as a `datasets.Dataset`, loaded once."""
        import datasets

        source = self.source()
        origin = self.path or self.id
        for file in source.get("data_files", {}).values() if self.path is not None else ():
            refuse_duplicate_columns(Path(file))
        try:
            with _prepared(source):
                return dict(datasets.load_dataset(**source))
        except ConnectionError as err:
            raise ConfigError(
                f"task.{self.setting}: cannot reach the hub for {origin}; "
                "set task.path=/path/to/copy"
            ) from err
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as err:
            # For a file that cannot be parsed, only the cause of the error has the reason.
            is_parse_error = isinstance(err, datasets.exceptions.DatasetGenerationError)
            reason = one_line(err.__cause__ if is_parse_error else err)
            on_hub = self.path is None
            settings = f"task.{self.setting} or task.revision" if on_hub else "task.path"
            raise ConfigError(
                f"task {self.name}: cannot load {origin}: {reason}; "
                f"correct {settings} or task.config"
            ) from err


@contextmanager
def _prepared(source: Mapping[str, Any]) -> Iterator[None]:
    """Context that guards the cache folder of a local copy while `datasets` reads or fills it.

    A damaged cache folder is moved away, so that `datasets` prepares the data again.
    """
    if source.get("cache_dir") is None:
        yield
        return
    cache = Path(source["cache_dir"])
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):
        set_aside_if_damaged(cache, "task")
        yield
        if not has_complete_manifest(cache):  # other configurations and splits have added files
            seal(cache)


def _sha256(file: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _split_files(folder: Path) -> dict[str, Path]:
    """Split -> file, for the files `<split>.<extension>` directly in `folder`."""
    files: dict[str, Path] = {}
    for extension in LOADERS:
        for file in sorted(folder.glob(f"*{extension}")):
            files.setdefault(file.stem, file)
    return files


def _has_card(folder: Path) -> bool:
    """Whether the folder has a dataset card: a README.md whose header declares the data files."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = card.read_text(encoding="utf-8").split("\n---")[0]
    return header.startswith("---") and "\nconfigs:" in header
