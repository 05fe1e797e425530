"""Atomic writes: a reader finds the whole file or folder, or nothing."""

import json
import os

import pytest

from emloc.runtime.atomic import (
    atomic_file,
    atomic_folder,
    publish,
    write_bytes,
    write_json,
    write_text,
)


@pytest.fixture
def order(monkeypatch):
    """The flushed inodes and the new names of renames, in order."""
    events: list[int | str] = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        flush(descriptor)

    def replace(old, new):
        events.append(os.fspath(new))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return events


def inode(path):
    return path.stat().st_ino


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def half_a_file(path):
    with atomic_file(path) as draft:
        draft.write_text("seco")
        raise RuntimeError("disk")


def half_a_folder(path):
    with atomic_folder(path) as draft:
        (draft / "config.json").write_text("{}")
        raise RuntimeError("disk")


@pytest.mark.parametrize(
    ("write", "value", "content"),
    [
        (write_bytes, b"\x00\xff", b"\x00\xff"),
        (write_text, "±1\n", b"\xc2\xb11\n"),
        (write_json, {"a": [1, None]}, b'{\n "a": [\n  1,\n  null\n ]\n}'),
    ],
    ids=["bytes", "text", "json"],
)
def test_a_file_has_the_new_content_and_no_draft_remains(tmp_path, write, value, content):
    path = tmp_path / "file.txt"
    path.write_bytes(b"old and longer than the new one" * 9)
    write(path, value)
    assert path.read_bytes() == content
    assert names(tmp_path) == ["file.txt"]


def test_a_file_is_flushed_before_it_is_renamed(tmp_path, order):
    path = tmp_path / "status.json"
    write_json(path, {"state": "done"})
    assert order == [inode(path), str(path), inode(tmp_path)]


def test_a_file_is_unchanged_if_the_writer_fails(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("first\n")
    with pytest.raises(RuntimeError, match="disk"):
        half_a_file(path)
    assert path.read_text() == "first\n"
    assert names(tmp_path) == ["metrics.jsonl"]


def test_a_value_that_json_cannot_represent_leaves_the_old_file(tmp_path):
    path = tmp_path / "status.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {1, 2})
    assert json.loads(path.read_text()) == 1
    assert names(tmp_path) == ["status.json"]


def test_the_draft_of_a_killed_process_is_overwritten(tmp_path):
    (tmp_path / "a.json.draft").write_text("cut o")
    write_json(tmp_path / "a.json", 7)
    assert names(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == 7


def test_files_with_one_stem_have_separate_drafts(tmp_path):
    with atomic_file(tmp_path / "a.json") as one, atomic_file(tmp_path / "a.safetensors") as two:
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "a.json").read_text() == "1"
    assert (tmp_path / "a.safetensors").read_text() == "2"


def test_a_folder_is_flushed_before_it_is_renamed(tmp_path, order):
    path = tmp_path / "merged"
    with atomic_folder(path) as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "model.safetensors").write_bytes(b"1")
        (draft / "config.json").write_bytes(b"2")
        assert not path.exists()
    flushed = [path / "deep", path / "deep" / "model.safetensors", path / "config.json"]
    assert set(order[:3]) == {inode(item) for item in flushed}
    assert order[3:] == [inode(path), str(path), inode(tmp_path)]
    assert names(tmp_path) == ["merged"]


def test_nothing_remains_of_a_folder_whose_writer_fails(tmp_path):
    with pytest.raises(RuntimeError, match="disk"):
        half_a_folder(tmp_path / "deep" / "merged")
    assert names(tmp_path / "deep") == []


def test_the_draft_folder_of_a_killed_process_is_removed(tmp_path):
    left = tmp_path / "merged.partial"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"1")
    with atomic_folder(tmp_path / "merged") as draft:
        assert names(draft) == []
        (draft / "config.json").write_text("{}")
    assert names(tmp_path) == ["merged"]
    assert names(tmp_path / "merged") == ["config.json"]


@pytest.mark.parametrize("started", [True, False], ids=["new", "kept for another attempt"])
def test_an_existing_folder_is_not_overwritten(tmp_path, started):
    path = tmp_path / "merged"
    path.mkdir()
    (path / "mine.txt").write_text("keep")
    if started:
        with pytest.raises(OSError, match="merged"), atomic_folder(path) as draft:
            (draft / "config.json").write_text("{}")
    else:
        draft = tmp_path / "draft"
        draft.mkdir()
        with pytest.raises(OSError, match="merged"):
            publish(draft, path)
    assert names(path) == ["mine.txt"]
