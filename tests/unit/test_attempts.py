"""Figures of a stage that was interrupted: those of all its attempts."""

from pathlib import Path

import pytest

from emloc.runtime.attempts import attempt, earlier_attempts
from emloc.runtime.stage_cache import Store
from emloc.runtime.work_meter import count_operations, count_weights


def spend(folder: Path, operations: int, error: BaseException) -> None:
    with attempt(folder) as spent:
        count_operations(operations)
        count_weights(2 * operations)
        spent.peak_gib = max(spent.peak_gib, 10 / operations)
        raise error


def interrupted(folder: Path, operations: int, error: BaseException) -> None:
    with pytest.raises(type(error)):
        spend(folder, operations, error)


def test_the_attempt_that_finishes_has_the_sum_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    interrupted(folder, 5, KeyboardInterrupt())
    interrupted(folder, 7, RuntimeError())
    earlier = earlier_attempts(folder)
    assert (earlier.operations, earlier.weight_bytes, earlier.peak_gib) == (12, 24, 2.0)
    with attempt(folder) as spent:
        count_operations(1)
    assert (spent.operations, spent.weight_bytes) == (13, 24)
    assert spent.seconds > earlier.seconds > 0
    assert not list(tmp_path.iterdir())


def test_an_attempt_ends_with_its_own_error_if_its_folder_is_gone(tmp_path: Path) -> None:
    interrupted(tmp_path / "absent" / "stage", 5, KeyboardInterrupt())


def twice(folder: Path) -> dict[str, int]:
    """A stage that is interrupted at its first attempt."""
    if not (folder / "begun").exists():
        (folder / "begun").touch()
        raise KeyboardInterrupt
    return {}


def test_a_stage_has_the_seconds_of_all_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("emloc.runtime.attempts.time.perf_counter", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).stage("twice", twice)
    artifact = Store(tmp_path).stage("twice", twice)
    assert artifact.facts["seconds"] == 8
    assert not list(tmp_path.rglob("*attempts*"))
