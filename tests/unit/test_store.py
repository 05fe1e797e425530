"""The stage cache: equal work is computed once, and different work never shares an artifact."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from emloc.adapters.training_inputs import TrainingInputs
from emloc.data.examples import Example, Examples
from emloc.errors import ConfigError, StageError
from emloc.runtime.keys import class_name, key_of, neutral
from emloc.runtime.manifest import MANIFEST, DamagedError, seal, verified_file
from emloc.runtime.stage_cache import Store, open_store

CALLS: list[tuple] = []
REFUSAL = ConfigError("task.path: nothing there")


@pytest.fixture(autouse=True)
def _no_calls_yet():
    CALLS.clear()


class Keys(Store):
    """A store that creates empty artifacts without any work, to test keys."""

    def _compute(self, name, home, *_):
        home.mkdir()
        (home / "stage.json").write_text("{}")
        seal(home)


@pytest.fixture
def key(tmp_path):
    """Function that returns the key of a stage with the given inputs."""
    keys = Keys(tmp_path / "keys")

    def make(*inputs, work=write, name="emulate", version=1):
        return keys.stage(name, work, *inputs, version=version).key

    return make


class Interrupted(BaseException):
    """An interruption like `KeyboardInterrupt`, which would also stop pytest."""


# Work functions, defined at module level as the store requires.


def write(folder: Path, *inputs, **live) -> dict:
    CALLS.append((inputs, live))
    (folder / "inputs.txt").write_text(repr(inputs))
    return {"answer": 42, "nested": {"a": [1.5, None]}}


def write_too(folder: Path, *inputs) -> dict:
    return write(folder, *inputs)


def slow(folder: Path, *inputs) -> dict:
    time.sleep(0.15)
    return write(folder, *inputs)


def halting(folder: Path) -> dict:
    """Write one part per attempt, and interrupt each attempt before the second part exists."""
    (folder / f"part{len(list(folder.iterdir()))}").write_text("done")
    parts = sorted(path.name for path in folder.iterdir())
    if len(parts) < 2:
        raise Interrupted
    return {"parts": parts}


def broken(folder: Path) -> dict:
    (folder / "half").write_text("")
    raise MemoryError("no more")


def refusing(folder: Path) -> dict:
    raise REFUSAL


def note(folder: Path, journal: str) -> dict:
    with open(journal, "a") as file:
        file.write("worked\n")
    time.sleep(0.15)
    return {}


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    name: str = "a"

    def work(self, folder: Path, *inputs) -> dict:
        return write(folder, *inputs)

    def other(self, folder: Path, *inputs) -> dict:
        return write(folder, *inputs)


@dataclass(frozen=True)
class Fields:
    """A class with another name and the fields of `Settings`."""

    rank: int = 8
    name: str = "a"

    def work(self, folder: Path, *inputs) -> dict:
        return write(folder, *inputs)


@dataclass(frozen=True)
class Nested:
    settings: Settings
    table: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Keyed:
    key: str
    folder: str = ""  # excluded from the key


def test_a_finished_stage_is_reused(store):
    first = store.stage("emulate", write, 1, "a")
    second = Store(store.root).stage("emulate", write, 1, "a")
    assert first == second
    assert CALLS == [((1, "a"), {})]
    assert first.folder == store.root / "emulate" / first.key
    assert (first.folder / "inputs.txt").read_text() == "(1, 'a')"
    assert {path.name for path in first.folder.iterdir()} == {"inputs.txt", "stage.json", MANIFEST}


def test_facts_are_known_when_the_folder_is_gone(store):
    store.stage("train", write)
    artifact = store.stage("train", write)
    shutil.rmtree(artifact.folder)
    assert artifact.facts["seconds"] >= 0
    assert artifact.finished <= time.time()


def test_facts_contain_those_of_the_work_and_seconds_and_memory(store):
    facts = store.stage("train", slow).facts
    assert facts["answer"] == 42
    assert facts["nested"] == {"a": [1.5, None]}
    assert 0.15 <= facts["seconds"] < 5
    # This process has imported torch: it uses more than 50 MB and less than 100 GiB.
    assert 0.05 < facts["peak_gib"] < 100
    again = store.stage("train", slow)
    assert again.facts == json.loads((again.folder / "stage.json").read_text()) == facts


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((1,), (2,), id="a number"),
        pytest.param(("a",), ("b",), id="a text"),
        pytest.param((None,), (0,), id="nothing and zero"),
        pytest.param((True,), (1,), id="true and one"),
        pytest.param((1,), (1.0,), id="a whole number and a float"),
        pytest.param((1,), ("1",), id="a number and its text"),
        pytest.param((1,), (1, None), id="one input more"),
        pytest.param((1, 2), (2, 1), id="the order"),
        pytest.param(([1], 2), ([1, 2],), id="where a list ends"),
        pytest.param(({"a": 1},), ({"b": 1},), id="a name in a table"),
        pytest.param(({"a": {"x": 1}},), ({"a": {"x": 2}},), id="a value below a table"),
        pytest.param((Settings(8),), (Settings(16),), id="a field"),
        pytest.param((Nested(Settings(8)),), (Nested(Settings(16)),), id="a field of a field"),
        pytest.param((Settings(),), (Fields(),), id="the class of equal fields"),
        pytest.param((Keyed("a"),), (Keyed("b"),), id="an object's own key"),
    ],
)
def test_each_input_changes_the_key(key, first, second):
    assert key(*first) == key(*first)
    assert key(*first) != key(*second)


def test_dictionaries_are_unordered_and_a_key_property_replaces_the_fields(key):
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    assert key(Keyed("a", "/here")) == key(Keyed("a", "/there"))


def test_the_key_of_examples_depends_on_texts_and_order(key):
    one, two = Example("0", "p", "t"), Example("1", "q", "u")
    base = key(Examples("name", (one, two)))
    assert key(Examples("other name", (one, Example("7", "q", "u")))) == base
    assert key(Examples("name", (two, one))) != base
    assert key(Examples("name", (one, Example("1", "q", "v")))) != base


def test_the_key_contains_the_settings_of_a_bound_method(key):
    keys = [
        key(),
        key(name="train"),
        key(work=Settings(8).work),
        key(work=Settings(16).work),
        key(work=Settings(8, "b").work),
        key(work=Fields(8).work),
    ]
    assert len(set(keys)) == len(keys)
    assert key(work=Settings(8).work) == keys[2]


def test_the_name_of_a_work_function_is_not_in_the_key(key):
    """The stage name and version identify the work, so that a refactoring keeps the cache."""
    assert key(1, work=write_too) == key(1, work=write)
    assert key(work=Settings(8).other) == key(work=Settings(8).work)


def test_the_folder_of_a_class_is_not_in_the_key(key):
    def part(module: str, **body):
        space = {"__name__": module, "dataclass": dataclass, **body}
        exec("@dataclass(frozen=True)\nclass Part:\n    rank: int = 8\n", space)
        return space["Part"]

    before, moved = part("emloc.emulators.thin"), part("elsewhere.parts.thin")
    assert key(before()) == key(moved())
    renamed = part("emloc.emulators.narrow")
    assert key(renamed()) != key(before())
    renamed.key_name = class_name(before)
    assert key(renamed()) == key(before())


def test_training_inputs_keep_their_first_name_in_keys():
    assert class_name(TrainingInputs) == "fit.Fit"


@dataclass(frozen=True)
class Grown:
    """The class `Settings` with settings that were added later."""

    key_name = "test_store.Settings"

    rank: int = 8
    name: str = "a"
    fresh: bool = neutral(False)
    share: float = neutral(0.0)


def test_an_added_setting_with_its_neutral_value_keeps_the_key(key):
    assert key(Grown()) == key(Settings())
    assert key(Nested(Grown())) == key(Nested(Settings()))
    assert key(work=Settings(8).work) == key(work=Settings().work)
    assert len({key(Grown()), key(Grown(fresh=True)), key(Grown(share=0.5))}) == 3


def test_keys_contain_no_module_names():
    for item in (Settings(), Nested(Grown(fresh=True)), {"a": [Settings()]}):
        assert "emloc." not in json.dumps(key_of(item))
    assert key_of(Settings()) == {"part": "test_store.Settings", "rank": 8, "name": "a"}


def test_classes_with_one_name_in_two_modules_have_different_keys():
    """A copied and changed part must not reuse the results of the original part."""
    parts = []
    for module in ("first_part", "second_part"):
        space = {"__name__": module, "dataclass": dataclass}
        exec("@dataclass(frozen=True)\nclass Part:\n    rank: int = 8\n", space)
        parts.append(space["Part"])
    assert parts[0].__qualname__ == parts[1].__qualname__
    assert key_of(parts[0]()) != key_of(parts[1]())


def test_a_new_version_changes_the_key(key):
    assert key(1, version=2) != key(1)
    assert key(1, version=1) == key(1)


def test_live_arguments_are_passed_to_the_work_but_not_to_the_key(store):
    cpu, meta = torch.device("cpu"), torch.device("meta")
    first = store.stage("emulate", write, 1, device=cpu, report=print)
    assert store.stage("emulate", write, 1, device=meta, report=repr) == first
    ((inputs, live),) = CALLS
    assert inputs == (1,)
    assert live == {"device": cpu, "report": print}


def test_the_next_attempt_finds_the_files_of_interrupted_work(store):
    with pytest.raises(Interrupted):
        store.stage("train", halting)
    (partial,) = (store.root / "train").glob("*.partial")
    assert [path.name for path in partial.iterdir()] == ["part0"]
    assert not list((store.root / "train").glob("*/stage.json"))
    artifact = store.stage("train", halting)
    assert artifact.facts["parts"] == ["part0", "part1"]
    assert partial == artifact.folder.with_suffix(".partial")
    assert not partial.exists()


def test_the_error_of_failed_work_names_the_stage_and_the_reason(store):
    with pytest.raises(StageError, match=r"^recover: MemoryError: no more$") as caught:
        store.stage("recover", broken)
    assert caught.value.stage == "recover"
    assert isinstance(caught.value.__cause__, MemoryError)
    folders = [path.suffix for path in (store.root / "recover").iterdir() if path.is_dir()]
    assert folders == [".partial"]


def test_a_config_error_of_the_work_passes_unchanged(store):
    with pytest.raises(ConfigError) as caught:
        store.stage("train", refusing)
    assert caught.value is REFUSAL


def test_concurrent_threads_compute_a_stage_once(store):
    artifacts = []
    threads = [
        threading.Thread(target=lambda: artifacts.append(store.stage("train", slow)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(CALLS) == 1
    assert len(artifacts) == 4
    assert len({artifact.key for artifact in artifacts}) == 1


def test_concurrent_processes_compute_a_stage_once(store, tmp_path):
    journal = tmp_path / "journal"
    start = multiprocessing.get_context("fork")
    workers = [
        start.Process(target=store.stage, args=("train", note, str(journal))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert journal.read_text() == "worked\n"


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({1, 2}, "set"),
        (object(), "object"),
        (Path("/tmp"), "Path"),
        (b"bytes", "bytes"),
        (torch.zeros(1), "Tensor"),
        (torch.float32, "dtype"),
        (functools.partial(write, 1), "partial"),
        ([1, {2}], "set"),
        ({"a": {2}}, "set"),
        (Nested(Settings(), {"a": object()}), "object"),
        (lambda folder: {}, "<lambda>"),
        (write, "write"),
        (Settings, "Settings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_objects_without_a_stable_name_are_refused_in_keys(item, named, store):
    with pytest.raises(TypeError, match=rf"{named}\S* cannot be part of a stage's key"):
        store.stage("train", write, item)
    assert CALLS == []
    assert not store.root.exists()


def test_nested_functions_are_refused_since_they_may_capture_values(store):
    def within(number):
        return lambda folder: {"number": number}

    for work in (within(1), within(2), within):
        with pytest.raises(TypeError, match="cannot be part of a stage's key"):
            store.stage("train", work)


def test_the_environment_variable_sets_the_folder_of_the_store(tmp_path, monkeypatch):
    assert open_store().root == tmp_path / "cache"
    monkeypatch.setenv("EMLOC_CACHE", "~/elsewhere")
    assert open_store().root == Path.home() / "elsewhere"
    monkeypatch.delenv("EMLOC_CACHE")
    assert open_store().root == Path.home() / ".cache" / "emloc"


# Several processes, as `torchrun` starts them.


def sign(folder: Path, journal: str) -> dict:
    with open(journal, "a") as file:
        file.write(f"{os.environ['RANK']}\n")
    if os.environ["RANK"] == "0":
        time.sleep(0.3)
    return {"by": os.environ["RANK"]}


def sign_all(folder: Path, journal: str) -> dict:
    return sign(folder, journal)


def fall(folder: Path) -> dict:
    raise MemoryError("no more")


def together(store):
    return functools.partial(store.stage, together=True)


def go_wrong(folder: Path, journal: str) -> dict:
    sign(folder, journal)
    raise MemoryError("no more")


def twice(store, name, work, *inputs):
    """Run a stage twice, as a sweep whose second run needs the failed stage of the first."""
    with contextlib.suppress(StageError):
        store.stage(name, work, *inputs)
    return store.stage(name, work, *inputs)


def in_one_of_several(rank, port, outcomes, call, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_PORT": port}
    try:
        outcome = call(*arguments).facts
    except Exception as error:  # any error; the test compares its text
        outcome = f"{type(error).__name__}: {error}"
    outcomes.put((rank, outcome))


@pytest.fixture
def in_three():
    """Function that calls another function in three processes of one launch.

    It returns the outcomes in the order of the ranks.
    """
    start = multiprocessing.get_context("fork")

    def run(call, *arguments, port="1") -> list:
        outcomes = start.Queue()
        workers = [
            start.Process(target=in_one_of_several, args=(rank, port, outcomes, call, arguments))
            for rank in (2, 1, 0)
        ]
        for worker in workers:
            worker.start()
        outcomes_by_rank = dict(outcomes.get() for _ in workers)
        for worker in workers:
            worker.join()
        return [outcomes_by_rank[rank] for rank in range(3)]

    return run


def test_the_first_of_several_processes_works_and_the_others_wait(store, tmp_path, in_three):
    facts = in_three(store.stage, "emulate", sign, str(tmp_path / "journal"))
    assert (tmp_path / "journal").read_text() == "0\n"
    assert [one["by"] for one in facts] == ["0", "0", "0"]
    assert not list((store.root / "emulate").glob("*.notice"))
    alone = store.stage("emulate", sign, str(tmp_path / "journal"))
    assert alone.facts == facts[0]


def test_all_processes_run_a_collective_stage_and_the_facts_are_those_of_the_first(
    store, tmp_path, in_three
):
    facts = in_three(together(store), "train", sign_all, str(tmp_path / "journal"))
    assert sorted((tmp_path / "journal").read_text().split()) == ["0", "1", "2"]
    assert [one["by"] for one in facts] == ["0", "0", "0"]
    assert facts[1]["seconds"] >= 0.3  # the first process waits 0.3 s for the others


def test_the_key_of_a_collective_stage_depends_on_the_number_of_processes(
    store, tmp_path, in_three, monkeypatch
):
    in_three(together(store), "train", sign_all, str(tmp_path / "journal"))
    monkeypatch.setenv("RANK", "0")
    together(store)("train", sign_all, str(tmp_path / "journal"))
    assert len((tmp_path / "journal").read_text().split()) == 4


def test_a_failure_of_the_first_process_fails_all_and_is_not_repeated(store, tmp_path, in_three):
    outcomes = in_three(twice, store, "recover", go_wrong, str(tmp_path / "journal"))
    assert outcomes == ["StageError: recover: MemoryError: no more"] * 3
    assert (tmp_path / "journal").read_text() == "0\n"


def test_the_next_launch_repeats_a_failed_stage(store, tmp_path, in_three):
    for port in ("1", "2"):
        in_three(store.stage, "recover", go_wrong, str(tmp_path / "journal"), port=port)
    assert (tmp_path / "journal").read_text() == "0\n0\n"
    # A launch may reuse the port of an earlier one; the time then tells the two apart.
    (path,) = (store.root / "recover").glob("*.notice")
    launch, when, *rest = json.loads(path.read_text())
    path.write_text(json.dumps([launch, when - 3600, *rest]))
    in_three(store.stage, "recover", go_wrong, str(tmp_path / "journal"), port="2")
    assert (tmp_path / "journal").read_text() == "0\n0\n0\n"


def test_a_config_error_reaches_all_processes_unchanged(store, in_three):
    outcomes = in_three(store.stage, "evaluate", refusing)
    assert outcomes == ["ConfigError: task.path: nothing there"] * 3


def test_a_failure_in_a_collective_stage_reports_processes_out_of_step(store, in_three):
    first, *others = in_three(together(store), "train", fall)
    assert first == "OutOfStepError: train: MemoryError: no more"
    # The other processes failed as well, or read of the failure before they started.
    assert {one.partition(": ")[2] for one in others} == {"train: MemoryError: no more"}


# Damages that a bad disk, a copy or a clean-up can do to an artifact.


def write_files(folder: Path, content: str = "abc") -> dict:
    CALLS.append(((content,), {}))
    (folder / "below").mkdir()
    (folder / "below" / "small.txt").write_text(content)
    (folder / "block.safetensors").write_text(content)
    return {}


def cut(folder: Path) -> None:
    (folder / "below" / "small.txt").write_text("ab")


def purge(folder: Path) -> None:
    (folder / "block.safetensors").unlink()


def change(folder: Path) -> None:
    path = folder / "below" / "small.txt"
    path.write_text("abd")
    os.utime(path, ns=(1, 1))


def lose_the_list(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_the_list(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "below/small.txt has 2 of 3 bytes"),
        (purge, "block.safetensors is missing"),
        (change, "the content of below/small.txt has changed"),
        (lose_the_list, "no readable manifest.json"),
        (cut_the_list, "no readable manifest.json"),
    ],
)
def test_a_damaged_artifact_is_reported_moved_aside_and_computed_again(
    store, caplog, damage, message
):
    caplog.set_level("WARNING")
    artifact = store.stage("emulate", write_files)
    damage(artifact.folder)
    again = store.stage("emulate", write_files)
    assert again == artifact
    assert len(CALLS) == 2
    assert (again.folder / "below" / "small.txt").read_text() == "abc"
    (line,) = caplog.messages
    assert message in line
    assert str(artifact.folder) in line
    (aside,) = (store.root / "emulate").glob("*.damaged-*")
    assert aside.name in line
    store.stage("emulate", write_files)
    assert len(CALLS) == 2


def test_a_memory_mapped_file_is_verified_when_it_is_opened(store):
    path = store.stage("emulate", write_files).folder / "block.safetensors"
    assert verified_file(path) == path
    path.write_text("abd")
    os.utime(path, ns=(1, 1))
    store.stage("emulate", write_files)
    assert len(CALLS) == 1  # the changed file has the expected size, so that the stage is reused
    with pytest.raises(DamagedError, match=r"content of block\.safetensors has changed") as caught:
        verified_file(path)
    assert caught.value.folder == path.parent
    path.unlink()
    with pytest.raises(DamagedError, match=r"block\.safetensors is missing"):
        verified_file(path)


def test_files_of_an_unfinished_folder_are_not_verified(tmp_path):
    path = tmp_path / "block.safetensors"
    path.write_text("abc")
    assert verified_file(path) == path


def test_contents_are_verified_once_per_process(store, monkeypatch):
    artifact = store.stage("emulate", write_files)
    store.stage("emulate", write_files)
    monkeypatch.setattr(
        "emloc.runtime.manifest.file_hash", lambda path: pytest.fail(f"reads {path}")
    )
    assert store.stage("emulate", write_files) == artifact
