"""How the package is built: an order of rooms, and no import against it."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import emloc

PACKAGE = Path(emloc.__file__).parent

# Modules and folders at the top level, each built of those above it in this list alone.
ORDER = [
    "errors",
    "runtime",  # the machine: processes, devices, memory, files written whole
    "config",  # what a run is asked for, and the folder it is kept in
    "precision",  # formats that numbers are held in
    "tensors",  # mathematics and layers
    "data",  # an example, and how it becomes a batch
    "tasks",  # where examples come from, and how answers are scored
    "models",  # families, and the checkpoints they are read from
    "calibration",  # what is measured while samples pass through the blocks
    "emulators",
    "adapters",
    "recovery",
    "report",  # what came out, here and in a tracker
    "stages",  # what one run is made of
    "cost",  # what a run needs, planned and measured
    "library",
    "pipeline",
    "console",  # help, verbs and completion of the command line
    "sweeps",
    "cli",
]
# What opens the package: public names and `python -m emloc`.
DOORS = {"__init__", "__main__"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_data" not in path.parts
}


def imports_of(path: Path, *, typing: bool = True) -> set[str]:
    """Modules of the package, without its name, that a file imports anywhere in it.

    `typing`: also those that only a type checker follows.
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


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def top(module: str) -> str:
    return module.split(".")[0]


def folder(module: str) -> str:
    """The folder that a module's file lies in."""
    parts = MODULES[module].relative_to(PACKAGE).parts[:-1]
    return "/".join(parts) or "emloc"


def circle(arrows: Mapping[str, Iterable[str]]) -> list[str]:
    """The first circle that is met, its first name last again; empty if there is none."""
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


def test_every_name_at_the_top_has_its_place_in_the_order():
    names = {top(module) for module in MODULES} - DOORS
    assert names == {*ORDER}
    assert len(ORDER) == len({*ORDER}) <= 20


def test_the_imports_are_seen():
    assert {"emulators", "config.settings"} <= IMPORTS["emulators.full"]
    assert "pipeline" in IMPORTS["sweeps.job"]
    assert len(MODULES) > 100


@pytest.mark.parametrize("name", ORDER)
def test_nothing_is_imported_upwards(name):
    above = {*ORDER[ORDER.index(name) + 1 :]}
    wrong = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if top(module) == name
        for other in others
        if top(other) in above
    }
    assert wrong == set()


def test_there_is_no_circle_of_folders():
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, others in IMPORTS.items():
        if top(module) not in DOORS:
            arrows[folder(module)] |= {folder(other) for other in others if top(other) not in DOORS}
    del arrows["emloc"]  # modules at the top, which have their places in the order
    assert len(arrows) > 20
    assert circle({name: others - {"emloc"} for name, others in arrows.items()}) == []


def test_there_is_no_circle_of_modules():
    """Two may name each other's types, which is no import when they run."""
    arrows = {name: imports_of(path, typing=False) - DOORS for name, path in MODULES.items()}
    assert circle(arrows) == []


def test_a_circle_would_be_met():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
