"""Batches of a training whose images threads still prepare."""

import threading
from concurrent.futures import Future

import pytest
import torch
from accelerate.utils import send_to_device
from pictured import image_bytes, save_gemma, save_internvl
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer

from emloc.data.examples import Example
from emloc.data.fixed_shapes import BatchShape, with_shape
from emloc.data.image import LazyImage
from emloc.data.pending import PendingBatch, changed_batch, image_threads
from emloc.data.reader import OpenCheckpoint, training_collate
from emloc.errors import ConfigError
from emloc.models.internvl import InternVLReaderSettings
from emloc.models.vision_language import ProcessorReaderSettings

CPU, META = torch.device("cpu"), torch.device("meta")
READERS = {
    "internvl": (save_internvl, InternVLReaderSettings(None, 6)),
    "gemma": (save_gemma, ProcessorReaderSettings()),
}


@pytest.fixture(scope="module", params=list(READERS))
def reader(request, tmp_path_factory):
    save, reader_settings = READERS[request.param]
    folder = save(tmp_path_factory.mktemp(request.param))
    config = AutoConfig.from_pretrained(folder)
    return reader_settings.reader(
        OpenCheckpoint(
            folder, lambda: AutoTokenizer.from_pretrained(folder), config, torch.bfloat16
        )
    )


class SlowImages:
    """Images that are only read when the test allows it."""

    def __init__(self):
        self.is_allowed = threading.Event()

    def read(self, width: int, seed: int) -> bytes:
        assert self.is_allowed.wait(timeout=10)
        return image_bytes(width, 28, seed)

    def rows(self, reader):
        self.is_allowed.set()
        shapes = [(28,), (84, 28), (), (56,)]
        rows = []
        for index, widths in enumerate(shapes):
            images = tuple(
                LazyImage(f"{index}-{w}", f"{w}", lambda w=w, index=index: self.read(w, index))
                for w in widths
            )
            rows.append(reader.encode(Example(f"{index}", "Is it?", f"yes {index}", images=images)))
        self.is_allowed.clear()
        return rows


@pytest.fixture
def slow():
    images = SlowImages()
    yield images
    images.is_allowed.set()


def test_labels_are_there_before_the_images_and_all_equals_a_plain_batch(reader, slow):
    rows = slow.rows(reader)
    batch = training_collate(reader)(rows)
    assert isinstance(batch, PendingBatch)
    early = batch["labels"]
    slow.is_allowed.set()
    expected = reader.collate(rows)
    assert torch.equal(early, expected["labels"])
    assert set(batch) == set(expected)
    assert len(batch) == len(expected)
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype
        assert torch.equal(batch[name], tensor)
    assert batch["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [True, False])
def test_a_batch_is_padded_to_a_fixed_shape_before_its_images_are_there(reader, slow, masked):
    rows = slow.rows(reader)
    shape = BatchShape(max(row.length for row in rows) + 3, 30)
    batch = with_shape(training_collate(reader)(rows), shape, masked=masked)
    assert batch["input_ids"].shape == (4, shape.length)
    slow.is_allowed.set()
    expected = with_shape(reader.collate(rows), shape, masked=masked)
    assert set(batch) == set(expected)
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())


def test_rows_without_images_make_a_plain_batch(reader, slow):
    batch = training_collate(reader)([slow.rows(reader)[2]])
    assert not isinstance(batch, PendingBatch)


def test_a_loader_of_the_trainer_waits_for_no_image(reader, slow):
    rows = slow.rows(reader)
    loader = DataLoader(rows, batch_size=2, collate_fn=training_collate(reader))
    batches = [send_to_device(batch, META, non_blocking=True) for batch in loader]
    assert all(batch["labels"].is_meta for batch in batches)
    slow.is_allowed.set()
    expected = reader.collate(rows[:2])
    for name, tensor in batches[0].items():
        assert tensor.is_meta
        assert tensor.shape == expected[name].shape


def test_a_damaged_image_fails_in_one_line_where_the_batch_is_used(reader, slow):
    rows = slow.rows(reader)
    images = rows[0].images
    object.__setattr__(images[0], "read", lambda: b"damaged")
    batch = training_collate(reader)(rows)
    slow.is_allowed.set()
    assert batch["labels"] is not None
    with pytest.raises(ConfigError, match=r"^0-28: cannot read the image") as error:
        batch["pixel_values"]
    assert "\n" not in str(error.value)


def pending(**ready) -> tuple[PendingBatch, list[None]]:
    """Return a batch with a pending tensor `late`, and a list that grows if it is waited for."""
    waits: list[None] = []

    def finish():
        waits.append(None)
        return {"late": torch.ones(2)}

    return PendingBatch(ready, finish, ["late"]), waits


def test_a_ready_tensor_is_looked_up_and_replaced_without_a_wait():
    batch, waits = pending(ids=torch.zeros(1))
    batch["ids"] = batch["ids"] + 1
    merged = batch | {"more": 3}
    assert merged["more"] == 3
    assert "ids" in merged
    assert "shift_labels" not in merged  # as the Trainer asks for each batch
    assert merged.get("none") is None
    assert waits == []
    assert "late" in merged
    assert merged["late"].tolist() == [1, 1]
    assert dict(merged).keys() == {"ids", "late", "more"}
    assert waits == [None]


def test_pending_tensors_are_changed_when_they_are_ready():
    batch, waits = pending(ids=torch.zeros(1), labels=torch.zeros(1))

    def plus_one(tensors):
        return {name: tensor + 1 for name, tensor in tensors.items() if name != "labels"}

    ready = changed_batch(batch, plus_one)
    assert ready["ids"] == 1
    assert "labels" not in ready
    assert waits == []
    assert ready["late"].tolist() == [2, 2]
    assert changed_batch({"ids": torch.zeros(1)}, plus_one) == {"ids": torch.ones(1)}


def test_a_batch_is_passed_as_arguments_and_loses_values_that_are_taken_out():
    batch, waits = pending(ids=torch.zeros(1), count=3)
    assert batch.pop("count") == 3
    assert (lambda **inputs: set(inputs))(**batch) == {"ids", "late"}
    assert waits == [None]
    with pytest.raises(KeyError):
        batch["none"]


def test_a_future_among_the_values_stays_what_it_is_on_another_device():
    future: Future[int] = Future()
    batch, waits = pending(ids=torch.zeros(1), offsets=future)
    moved = batch.to(META)
    assert moved["ids"].is_meta
    assert moved["offsets"] is future
    assert waits == []
    assert moved["late"].is_meta


def test_an_image_takes_the_threads_of_all_but_one_core(monkeypatch):
    assert image_threads() is image_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr("os.getpid", lambda: -1)  # as in a forked process
    assert image_threads()._max_workers == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert image_threads()._max_workers == 1
