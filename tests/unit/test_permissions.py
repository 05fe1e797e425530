"""Written files and folders have the permissions that the umask gives to new ones."""

import ast
import os
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from permitted import new_permissions, permissions

import emloc
from emloc.adapters.saved import SavedLora, copy_adapter
from emloc.runtime.atomic import atomic_file, atomic_folder
from emloc.runtime.manifest import flaw_of, seal
from emloc.runtime.permissions import apply_umask
from emloc.runtime.safetensors_file import write_safetensors
from emloc.tensors.linalg.correct import LoraPair

PACKAGE = Path(emloc.__file__).parent
# Calls that give a file other permissions, and the modules that make up for them.
CALLS = {
    "save_file": {
        "runtime/safetensors_file.py",
        "adapters/fold.py",  # in an atomic folder
        "cost/bench/host.py",  # in a temporary folder
    },
    "copytree": set(),
    "copy": set(),  # of shutil; `copyfile` copies no permissions
    "copy2": set(),
    "NamedTemporaryFile": set(),
    "mkdtemp": set(),
}


def private(path: Path) -> None:
    """Write a file as libraries do that rename a temporary file: only its owner may read it."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def in_a_file(folder: Path) -> None:
    with atomic_file(folder / "a.json") as draft:
        private(draft)


def in_a_folder(folder: Path) -> None:
    with atomic_folder(folder / "merged") as draft:
        (draft / "deep").mkdir(mode=0o700)
        private(draft / "deep/model.safetensors")
        private(draft / "config.json")


def in_a_stage(folder: Path) -> None:
    (folder / "adapter").mkdir(mode=0o700)
    private(folder / "adapter/adapter_model.safetensors")
    private(folder / "read_only.txt")
    (folder / "read_only.txt").chmod(0o400)
    seal(folder)
    assert flaw_of(folder) is None


def as_safetensors(folder: Path) -> None:
    write_safetensors(folder / "model.layers.0.safetensors", {"u": torch.ones(2)}, {})


def as_an_adapter(folder: Path) -> None:
    pair = LoraPair(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    SavedLora({"q_proj": pair}, {"r": 1}, {"method": "none"}).save(folder / "adapter")


def as_a_copied_adapter(folder: Path) -> None:
    source = folder.parent / "source"
    (source / "deep").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "deep/more.bin"):
        private(source / name)
    (source / "deep").chmod(0o700)
    copy_adapter(source, folder / "adapter")


def as_a_lock(folder: Path) -> None:
    with FileLock(folder / "key.lock"):
        pass


WRITERS = [
    *(in_a_file, in_a_folder, in_a_stage),
    *(as_safetensors, as_an_adapter, as_a_copied_adapter, as_a_lock),
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077], ids="{:03o}".format)
def test_written_files_obey_the_umask(tmp_path, set_umask, mask, write):
    set_umask(mask)
    folder = tmp_path / "written"
    folder.mkdir()
    write(folder)
    modes = permissions(folder)
    assert len(modes) > 1
    assert modes == new_permissions(modes)


def test_the_group_of_a_folder_is_handed_on(tmp_path, set_umask):
    set_umask(0o002)
    tmp_path.chmod(0o2775)
    in_a_folder(tmp_path)
    private(tmp_path / "merged/more")
    apply_umask(tmp_path / "merged")
    assert {path: mode for path, mode in permissions(tmp_path).items() if path.endswith("/")} == {
        f"{tmp_path}/": "2775",
        f"{tmp_path}/merged/": "2775",
        f"{tmp_path}/merged/deep/": "2775",
    }


def test_a_linked_file_outside_is_left_as_it_is(tmp_path):
    private(tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to(tmp_path / "elsewhere")
    apply_umask(tmp_path / "folder")
    assert permissions(tmp_path)[f"{tmp_path}/elsewhere"] == "600"


def test_files_of_another_user_are_left_as_they_are(tmp_path, monkeypatch):
    """Two users of a group resume each other's work, and only the owner may change permissions."""
    private(tmp_path / "of_another")
    private(tmp_path / "own")
    chmod = Path.chmod

    def refuse(path, mode, **more):
        if path.name == "of_another":
            raise PermissionError(1, "Operation not permitted", str(path))
        chmod(path, mode, **more)

    monkeypatch.setattr(Path, "chmod", refuse)
    seal(tmp_path)
    modes = permissions(tmp_path)
    expected = new_permissions(modes) | {f"{tmp_path}/of_another": "600", f"{tmp_path}/": "700"}
    assert modes | {f"{tmp_path}/": "700"} == expected


@cache
def callers() -> dict[str, set[str]]:
    """Name of a called function as it is written -> the modules of the package that call it."""
    modules: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                modules[ast.unparse(node.func)].add(path.relative_to(PACKAGE).as_posix())
    return modules


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_give_files_other_permissions_are_in_modules_that_make_up_for_it(name):
    written = (name, f"shutil.{name}", f"tempfile.{name}")
    assert set().union(*(callers()[one] for one in written)) == CALLS[name]
