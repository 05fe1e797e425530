"""Rules of the code that no other tool checks."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import emloc

PACKAGE = Path(emloc.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = PACKAGE.parent / "pyproject.toml"

PUBLIC = [
    "ConfigError",
    "Factorized",
    "SavedLora",
    "StageError",
    "Store",
    "anchor",
    "build",
    "build_emulator",
    "compose",
    "correct",
    "load_emulator",
    "merge",
    "read_lora",
    "run",
    "save_emulator",
    "table",
]

# Libraries that take seconds to import; --help and tables must not import them.
HEAVY = {"torch", "transformers", "peft", "lm_eval", "wandb", "datasets", "accelerate"}
DRAWN = ["emloc.report.figures"]
SWEEP = ["emloc.config.run_folder", "emloc.sweeps.callbacks", "emloc.sweeps.lost_jobs"]
START = ["emloc", "emloc.cli", "emloc.config.compose", "emloc.config.formats"]
WITHOUT_PANDAS = [*START, "emloc.report.rows", *DRAWN, *SWEEP]
LIGHT = [*WITHOUT_PANDAS, "emloc.report.all_experiments", "emloc.report.write"]


def where(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


@cache
def nodes(module: Path) -> list[ast.AST]:
    """All nodes of the syntax tree of a file."""
    return list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))


def imported(module: Path) -> Iterator[str]:
    """Yield the dotted names of all modules that the file imports anywhere."""
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def importers(package: str) -> set[str]:
    return {where(m) for m in MODULES if any(i.split(".")[0] == package for i in imported(m))}


def test_modules_of_the_package_are_listed():
    assert {"cli.py", "tensors/linalg/gram.py", "tasks/text.py"} <= {
        where(module) for module in MODULES
    }


def test_the_public_names():
    assert emloc.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_does_not_depend_on_earlier_imports(name):
    """Also if a module of the package has the same name."""
    first = getattr(emloc, name)
    home = importlib.import_module(first.__module__)
    assert callable(first)
    assert getattr(emloc, name) is first
    assert getattr(home, name) is first


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'emloc' has no attribute 'emulate'"):
        _ = emloc.emulate


def test_help_and_tables_wait_for_no_heavy_import():
    assert imported_with(LIGHT, HEAVY) == LIGHT


def test_only_tables_import_pandas():
    assert imported_with(WITHOUT_PANDAS, {"pandas"}) == WITHOUT_PANDAS


def imported_with(modules: list[str], libraries: set[str]) -> list[str]:
    """Each module, and which of the libraries are imported with it, one after the other."""
    program = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, *sorted({libraries} & {{*sys.modules}}))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return process.stdout.splitlines()


def test_public_names_work_after_an_import_of_their_module():
    program = (
        "import importlib\n"
        "for home in ('emloc.config.compose', 'emloc.cli'):\n"
        "    importlib.import_module(home)\n"
        "import emloc\n"
        "from emloc import compose\n"
        "print(callable(emloc.compose), callable(compose))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert process.stdout == "True True\n"


def test_no_module_hides_a_public_name():
    """An imported module becomes an attribute of its package and would hide a lazy name."""
    lazy = set(PUBLIC) - set(vars(emloc))
    assert lazy & {module.stem for module in PACKAGE.glob("*.py")} == set()


def test_some_libraries_are_imported_in_only_one_place():
    assert importers("wandb") == {"report/tracking/wandb_run.py"}
    assert {str(Path(place).parent) for place in importers("lm_eval")} == {
        "stages/evaluation/harness"
    }
    assert importers("bitsandbytes") == {
        "precision/nf4.py",  # packs weights
        "models/checkpoint/bitsandbytes.py",  # reads weights that others have packed
    }
    assert {place.split("/")[0] for place in importers("peft")} == {"adapters"}
    assert {"adapters/lora.py", "adapters/saved.py"} <= importers("peft")


def test_packed_formats_are_used_only_through_their_interface():
    homes = {where(module) for module in MODULES if "emloc.precision.nf4" in {*imported(module)}}
    # The benchmark compares with the layer of bitsandbytes.
    assert homes == {"cost/bench/training.py"}


def test_only_a_few_modules_import_hydra():
    allowed = {
        "sweeps/job.py",
        "config/check.py",
        "config/sources.py",
        "cli.py",
        "config/compose.py",
        "config/explain.py",
        "config/quoting.py",
        "stages/run_config.py",
        "config/experiments.py",
        "stages/merge_run.py",
        "config/run_folder.py",
    }
    allowed |= {"config/stage_order.py"}  # which reads YAML files alone
    allowed |= {
        "console/completion.py",
        "console/help.py",
        "console/wrong_words.py",
    }  # parts of the command line
    allowed |= {"config/settings.py", "sweeps/plugin/hydra_plugins/emloc_sweeps.py"}
    importing_modules = importers("hydra") | importers("omegaconf")
    assert {place for place in importing_modules if not place.startswith("sweeps/")} <= allowed


def test_linear_algebra_imports_no_other_part():
    inside = [m for m in MODULES if where(m).startswith("tensors/linalg/")]
    assert len(inside) >= 3
    for module in inside:
        own = {name for name in imported(module) if name.startswith("emloc")}
        assert all(name.startswith("emloc.tensors.linalg") for name in own), (where(module), own)
        assert not {"pathlib", "logging", "os", "transformers"} & {*imported(module)}


def test_no_module_has_a_vague_name():
    words = {part for module in MODULES for part in Path(where(module)).with_suffix("").parts}
    assert not {w for w in words if re.search(r"utils?$|helpers?$|^base_|^common$|^misc$", w)}


def test_no_value_is_named_by_a_bare_participle():
    """Such a name does not say what the value is; see the style page of CONTRIBUTING.md."""
    participles = {
        *("asked", "chosen", "drawn", "found", "given", "held", "kept", "known", "listed"),
        *("made", "said", "seen", "shown", "taken", "told", "used", "wanted"),
    }
    names = [
        f"{where(module)}: {name}"
        for module in MODULES
        for node in nodes(module)
        if (name := value_name(node)) in participles
    ]
    assert names == []


def value_name(node: ast.AST) -> str | None:
    """The name that a node gives to a value: an assigned variable or a parameter."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return node.arg if isinstance(node, ast.arg) else None


def test_nothing_is_unpickled():
    for module in MODULES:
        assert not {"pickle", "dill", "joblib", "shelve"} & {*imported(module)}, where(module)
        calls = {ast.unparse(node.func) for node in nodes(module) if isinstance(node, ast.Call)}
        assert not {"torch.load", "torch.save"} & calls, where(module)


def test_no_bare_except_and_no_assert_on_a_tuple():
    for module in MODULES:
        for node in nodes(module):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{where(module)}: bare except"
            if isinstance(node, ast.Assert):
                assert not isinstance(node.test, ast.Tuple), f"{where(module)}: always true"


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = ("parallel", "slurm", "search", "kernels")
    lines = [*project["dependencies"], *(line for name in optional for line in extras[name])]
    declared = {_plain(re.split(r"[<>=\[; ]", line)[0]) for line in lines}
    homes = importlib.metadata.packages_distributions()
    used = {name.split(".")[0] for module in MODULES for name in imported(module)}
    foreign = used - set(sys.stdlib_module_names) - {"emloc"}
    assert {"torch", "hydra", "yaml"} <= foreign
    missing = {
        # Kernels for GPUs are not installed everywhere; their modules have the names of packages.
        name
        for name in foreign
        if not {_plain(dist) for dist in homes.get(name, [name])} & declared
    }
    assert missing == set()


def _plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
