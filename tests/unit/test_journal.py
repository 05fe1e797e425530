"""The journal of finished blocks, also after a kill."""

import json

import pytest
import xxhash

from emloc.runtime.journal import Journal


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def finish_blocks(folder, *blocks: str) -> None:
    journal = Journal(folder)
    for size, block in enumerate(blocks, 3):
        journal.file(block).write_bytes(bytes(size))
        journal.add(block, tokens=7)


def test_each_block_has_a_line_with_the_size_of_its_file(tmp_path):
    finish_blocks(tmp_path, "h.0", "h.1")
    lines = written(tmp_path)
    hashes = [line.pop("xxh3") for line in lines]
    assert lines == [
        {"block": "h.0", "tokens": 7, "bytes": 3},
        {"block": "h.1", "tokens": 7, "bytes": 4},
    ]
    assert hashes == [xxhash.xxh3_128_hexdigest(bytes(size)) for size in (3, 4)]
    assert list(Journal(tmp_path).lines) == ["h.0", "h.1"]


def test_a_file_without_a_line_is_not_finished(tmp_path):
    finish_blocks(tmp_path, "h.0")
    (tmp_path / "h.1.safetensors").write_bytes(b"12")
    assert list(Journal(tmp_path).lines) == ["h.0"]


def test_a_line_with_a_missing_file_is_dropped(tmp_path):
    finish_blocks(tmp_path, "h.0", "h.1")
    (tmp_path / "h.0.safetensors").unlink()
    assert list(Journal(tmp_path).lines) == ["h.1"]
    assert [line["block"] for line in written(tmp_path)] == ["h.1"]


def test_an_incomplete_line_is_dropped_and_the_next_line_is_separate(tmp_path):
    finish_blocks(tmp_path, "h.0", "h.1")
    path = tmp_path / "journal.jsonl"
    path.write_text(path.read_text()[:-9])
    journal = Journal(tmp_path)
    assert list(journal.lines) == ["h.0"]
    journal.add("h.1", tokens=8)
    assert [(line["block"], line["tokens"]) for line in written(tmp_path)] == [
        ("h.0", 7),
        ("h.1", 8),
    ]


def test_a_complete_last_line_without_a_newline_is_kept_once(tmp_path):
    finish_blocks(tmp_path, "h.0")
    path = tmp_path / "journal.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    journal = Journal(tmp_path)
    journal.file("h.1").write_bytes(b"")
    journal.add("h.1")
    assert [line["block"] for line in written(tmp_path)] == ["h.0", "h.1"]


@pytest.mark.parametrize("content", [b"12", b"1234"], ids=["cut off", "changed"])
def test_a_block_with_a_changed_file_is_not_finished(tmp_path, caplog, content):
    finish_blocks(tmp_path, "h.0", "h.1")
    (tmp_path / "h.1.safetensors").write_bytes(content)
    journal = Journal(tmp_path)
    assert list(journal.lines) == ["h.0"]
    assert not journal.file("h.1").exists()
    assert "h.1.safetensors is damaged" in caplog.text
