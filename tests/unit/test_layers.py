"""The structure of the package: each part imports only parts before it in a fixed order."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

import emloc

PACKAGE = Path(emloc.__file__).parent

# Modules and folders at the top level; each one imports only those above it in this list.
ORDER = [
    "errors",
    "runtime",  # the machine: processes, devices, memory, atomic files
    "config",  # the settings of a run, and its folder
    "precision",  # packed formats of weights
    "tensors",  # linear algebra and layers
    "data",  # examples, and batches of them
    "tasks",  # data sets, and the scores of answers
    "models",  # model families, and the checkpoints they are read from
    "calibration",  # statistics of the activations of calibration samples
    "emulators",
    "adapters",
    "recovery",
    "anchors",  # hidden states of the original, recorded and put back
    "report",  # results, in files and in a tracker
    "stages",  # the stages of one run
    "cost",  # memory and time of a run, planned and measured
    "library",
    "pipeline",
    "console",  # help, verbs and completion of the command line
    "sweeps",
    "cli",
]
# Entry points of the package: its public names, and `python -m emloc`.
DOORS = {"__init__", "__main__"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_data" not in path.parts
}


def imports_of(path: Path, *, typing: bool = True) -> set[str]:
    """Modules of the package (without its name) that a file imports anywhere.

    `typing`: include imports that only a type checker follows.
    """
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checks = [one for one in ast.walk(tree) if isinstance(one, ast.If)]
    unread = {
        id(inner)
        for one in checks
        if "TYPE_CHECKING" in ast.unparse(one.test) and not typing
        for inner in ast.walk(one)
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            deep = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in deep if name.removeprefix("emloc.") in MODULES}
            names |= modules or {node.module}
    return {name.removeprefix("emloc.") for name in names if name.startswith("emloc.")} & {*MODULES}


@cache
def imports() -> dict[str, set[str]]:
    """Return module -> modules that it imports, read at the first call."""
    return {module: imports_of(path) for module, path in MODULES.items()}


def top(module: str) -> str:
    return module.split(".")[0]


def folder(module: str) -> str:
    """Return the folder of a module's file."""
    parts = MODULES[module].relative_to(PACKAGE).parts[:-1]
    return "/".join(parts) or "emloc"


def circle(arrows: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the first import cycle, ending with its first name; empty if there is none."""
    over: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in over:
            return []
        for other in sorted(arrows.get(node, ())):
            if other != node and (met := walk(other, [*path, node])):
                return met
        over.add(node)
        return []

    return next((met for node in sorted(arrows) if (met := walk(node, []))), [])


def test_the_order_lists_every_top_level_name():
    names = {top(module) for module in MODULES} - DOORS
    assert names == {*ORDER}
    assert len(ORDER) == len({*ORDER}) <= 21


def test_imports_are_recognised():
    assert {"emulators", "config.settings"} <= imports()["emulators.full"]
    assert "pipeline" in imports()["sweeps.job"]
    assert len(MODULES) > 100


@pytest.mark.parametrize("name", ORDER)
def test_no_part_imports_a_later_part(name):
    above = {*ORDER[ORDER.index(name) + 1 :]}
    wrong = {
        f"{module} imports {other}"
        for module, others in imports().items()
        if top(module) == name
        for other in others
        if top(other) in above
    }
    assert wrong == set()


def test_folders_have_no_import_cycle():
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, others in imports().items():
        if top(module) not in DOORS:
            arrows[folder(module)] |= {folder(other) for other in others if top(other) not in DOORS}
    del arrows["emloc"]  # top-level modules, which the order covers
    assert len(arrows) > 20
    assert circle({name: others - {"emloc"} for name, others in arrows.items()}) == []


def test_modules_have_no_import_cycle():
    """Two modules may import each other's types for the type checker alone."""
    arrows = {name: imports_of(path, typing=False) - DOORS for name, path in MODULES.items()}
    assert circle(arrows) == []


def test_an_import_cycle_is_recognised():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
