"""Which hidden states of a pass are on disk, for a process that goes on after a kill."""

import time

import pytest
import torch

from emloc.anchors import pass_states
from emloc.anchors.pass_states import PassStates
from emloc.anchors.write_behind import WriteBehind


@pytest.fixture
def clock(monkeypatch):
    """List of one number: the seconds that `PassStates` reads."""
    seconds = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def go_through(states, place):
    """Save the states of two batches behind a place as a pass does, and end it."""
    for batch in range(2):
        hidden = torch.full((3, 4), 10.0 * place + batch)
        states.save("original", place, batch, hidden)
        assert torch.equal(states.load("original", place, batch, hidden.device), hidden)
        if states.marks(place):
            states.save("emulator", place, batch, hidden + 1)
    states.finish(place)


def test_a_place_is_marked_when_a_minute_has_passed(tmp_path, clock):
    with WriteBehind() as writer:
        states = PassStates(tmp_path, writer)
        for place in range(5):
            clock[0] += 25
            go_through(states, place)
    # 75 seconds behind the beginning; 50 seconds later there is no other mark.
    assert [path.name for path in states.folder.glob("*.json")] == ["finished-002.json"]
    files = sorted(path.name for path in states.folder.glob("*.safetensors"))
    assert files == sorted(
        f"{model}-002-{batch:05d}.safetensors"
        for model in ("original", "emulator")
        for batch in (0, 1)
    )
    assert pass_states.MOST_REPEATED == 60


def test_states_of_earlier_places_are_deleted(tmp_path, every_place_marked):
    with WriteBehind() as writer:
        states = PassStates(tmp_path, writer)
        go_through(states, 0)
        go_through(states, 1)
    assert {path.name.split("-")[1] for path in states.folder.glob("*.safetensors")} == {"001"}
    assert states.finished_places(shards=0) == 2


def test_a_damaged_file_lets_the_pass_start_anew(tmp_path, every_place_marked, caplog):
    with WriteBehind() as writer:
        states = PassStates(tmp_path, writer)
        go_through(states, 0)
    next(states.folder.glob("emulator-*")).write_bytes(b"0")
    assert states.finished_places(shards=0) == 0
    assert "it starts anew" in caplog.text
    assert list(states.folder.iterdir()) == []
