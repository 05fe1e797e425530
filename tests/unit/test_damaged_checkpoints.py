"""A damaged file or tensor of a checkpoint is named, before any stage starts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from composed import compose_cached
from safetensors.torch import load_file, save_file

from emloc.errors import ConfigError
from emloc.pipeline import checked
from emloc.stages.run_config import build

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 42\n"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def broken(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


@pytest.fixture
def refusal(tiny, store, broken):
    """Function that returns the line which refuses a run with this checkpoint."""

    def refused(*overrides: str) -> str:
        words = [*tiny, f"model.source={broken}", "method=lora", *overrides]
        with pytest.raises(ConfigError) as caught:
            checked(build(compose_cached(words)), store, lambda step, values: None)
        message = str(caught.value)
        assert "\n" not in message
        assert "model.source" in message
        return message

    return refused


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "pointer", "binary", "empty"])
def test_a_damaged_json_file_is_named(refusal, broken, name, damage):
    path = broken / name
    if damage == "cut":
        cut(path, path.stat().st_size // 2)
    else:
        path.write_bytes(
            {"pointer": POINTER.encode(), "binary": b"\xff\xfe\x00", "empty": b""}[damage]
        )
    message = refusal()
    assert message.startswith(f"{path}: ")
    assert ("run `git lfs pull`" in message) == (damage == "pointer")


def test_a_tokenizer_that_the_library_cannot_read_is_named(refusal, broken):
    content = json.loads((broken / "tokenizer.json").read_text())
    (broken / "tokenizer.json").write_text(json.dumps(content | {"model": {"type": "Alien"}}))
    assert refusal().startswith(f"{broken}: the tokenizer cannot be read: ")


@pytest.mark.parametrize(
    ("size", "flaw"),
    [
        (-1, "it has 123"),
        (100, "it has 100 bytes, fewer than its header"),
        (4, "it has 4 bytes, fewer"),
    ],
)
def test_weights_that_are_cut_off_are_named_with_their_sizes(refusal, broken, size, flaw):
    path = broken / "model.safetensors"
    whole = path.stat().st_size
    cut(path, size)
    flaw = f"it has {whole - 1} of {whole} bytes" if size < 0 else flaw
    assert refusal().startswith(f"{path}: the file is damaged: {flaw}")


@pytest.mark.parametrize(
    ("content", "flaw"),
    [
        (POINTER.encode(), "git has a pointer in place of this file; run `git lfs pull` in"),
        (b"<!DOCTYPE html><html>Not found</html>", "the file is damaged: it has 37 bytes, fewer"),
        (b"\x04" + bytes(7) + b"{{{{", "the file is damaged: its header cannot be read"),
        (b"\x08" + bytes(7) + b'{"a": 1}', "the file is damaged: its header cannot be read"),
    ],
)
def test_a_file_that_holds_no_weights_is_named(refusal, broken, content, flaw):
    (broken / "model.safetensors").write_bytes(content)
    assert refusal().startswith(f"{broken / 'model.safetensors'}: {flaw}")


@pytest.mark.parametrize("number", [1, 2])
def test_the_damaged_one_of_several_files_is_named(refusal, broken, number):
    shards = split(broken)
    cut(shards[number - 1], shards[number - 1].stat().st_size - 8)
    assert refusal().startswith(f"{shards[number - 1]}: the file is damaged: it has ")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[1]"]
)
def test_an_index_without_files_is_named(refusal, broken, content):
    split(broken)
    index = broken / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal().startswith(f"{index}: the file is damaged: it has no weight_map")


def test_an_unfinished_download_is_said(refusal, broken):
    (broken / "model.safetensors").unlink()
    downloads = broken / ".cache/huggingface/download"
    downloads.mkdir(parents=True)
    (downloads / "model.safetensors.abc.incomplete").write_bytes(b"")
    assert refusal() == (
        f"{broken}: no model.safetensors (the download of 1 of its files was not finished); "
        "set model.source to a checkpoint folder"
    )


def test_a_link_to_a_missing_file_is_named(refusal, broken):
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer.json").symlink_to(broken / "blobs" / "gone")
    assert refusal().startswith(
        f"{broken / 'tokenizer.json'}: the file is damaged: No such file or directory"
    )


def split(folder: Path) -> list[Path]:
    """Put the weights into two files with an index; return the files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    homes = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in tensors}
    for file in set(homes.values()):
        save_file({name: t for name, t in tensors.items() if homes[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return [folder / "model-1.safetensors", folder / "model-2.safetensors"]


# Values ------------------------------------------------------------------------------------------


def change(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_parameter_with_values_that_are_not_finite_is_named(tiny, broken, name, value):
    change(broken, name, value)
    dtype = "float16" if value == 1e6 else "float32"
    words = [*tiny, f"model.source={broken}", f"model.dtype={dtype}"]
    source = build(compose_cached(words)).model.open()
    with pytest.raises(ConfigError) as caught:
        source.load(torch.device("cpu"))
    assert str(caught.value).startswith(
        f"{broken}: {name} has NaN or infinite values in {dtype} (1 of "
    )


def test_large_values_of_both_signs_are_no_flaw(tiny, broken):
    change(broken, "lm_head.weight", 3e38)
    change(broken, "model.norm.weight", -3e38)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"].view(-1)[:4] = 3e38  # their sum is infinite
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    words = [*tiny, f"model.source={broken}"]
    build(compose_cached(words)).model.open().load(torch.device("cpu"))
