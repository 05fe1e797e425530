"""The text of `emloc --help`: verbs, groups with their choices, and every setting explained."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml
from omegaconf import OmegaConf

from emloc.config.compose import compose, experiment_names
from emloc.config.descriptions import field_comments
from emloc.config.paths import choices
from emloc.config.settings import SECTIONS, Config
from emloc.console.verbs import VERBS

_ABOUT = """\
fine-tune a large model through a small emulator, then correct the LoRA for the model.

Usage
  emloc [group=choice ...] [setting=value ...]         one run, from calibration to scores
  emloc -m method=lora,emloc compression=r25,r50       a sweep: a run of every combination
  emloc experiments=demo                               an experiment: a sweep from a file
  emloc VERB [arguments]                               one of the verbs below

  Finished runs and stages are not computed again, so the same command resumes what was interrupted.
  The folders are runs/ (or EMLOC_RUNS) and, for stages, ~/.cache/emloc (or EMLOC_CACHE)."""

_SETTINGS = """\
Settings (setting=value) and their values; emloc --help method=upop shows those of that method"""

_HYDRA = """\
Flags of Hydra
  -m runs a sweep, also with hydra/launcher=joblib (processes side by side), local or slurm, or with
  hydra/sweeper=search (Optuna). `emloc --cfg job [overrides]` prints the settings of a run without
  running it, and --resolve also fills in references. `emloc --hydra-help` lists the other flags.
  HYDRA_FULL_ERROR=1 prints the traceback of an unexpected error; that of a run is in its run.log.
  Completion in bash and zsh: eval "$(emloc -sc install=bash)"
  Completion in fish: emloc -sc install=fish | source"""

_KEY_WIDTH = 38
_LONGEST_VALUE = 24


def version_line() -> str:
    """`emloc 0.1.0`."""
    return f"emloc {version('emloc')}"


def help_text(overrides: Sequence[str] = ()) -> str:
    """The help, with the values that the settings have with these overrides."""
    config = OmegaConf.to_container(compose(overrides))
    assert isinstance(config, dict)
    width = max(min(shutil.get_terminal_size((100, 24)).columns, 120), 70)
    values = {str(section): value for section, value in config.items()}
    return "\n\n".join(
        [
            f"{version_line()}: {_ABOUT}",
            "\n".join(["Verbs (emloc VERB --help says more)", *_verbs(width)]),
            "\n".join(["Groups (group=choice)", *_groups(width)]),
            "\n".join([_SETTINGS, *_settings(values, width)]),
            _HYDRA,
        ]
    )


def _verbs(width: int) -> Iterator[str]:
    for name, verb in VERBS.items():
        yield from _entry(name, verb.about, 10, width)


def _groups(width: int) -> Iterator[str]:
    """Each group with what it decides and its choices."""
    comments = field_comments(f"{Config.__module__}.{Config.__name__}")
    options = {name: sorted(files) for name in comments if (files := choices(name))}
    options["experiments"] = experiment_names()
    comments["experiments"] = "sweeps that are prepared in files"
    for name, words in options.items():
        yield from _entry(name, f"{comments[name]}: {', '.join(words)}", 13, width)


def _settings(config: Mapping[str, Any], width: int) -> Iterator[str]:
    """Each setting with its value and the comment at its field."""
    own = field_comments(f"{Config.__module__}.{Config.__name__}")
    for section, value in config.items():
        if section in SECTIONS:
            cls = SECTIONS[section]
            yield from _fields(section, value, f"{cls.__module__}.{cls.__name__}", width)
        elif section == "stage":  # all stages have the same fields
            name, stage = next(iter(value.items()))
            yield from _fields(f"stage.{name}", stage, stage["_target_"], width)
            others = ", ".join(list(value)[1:])
            yield from _entry("", f"the same for {others}", _KEY_WIDTH, width)
        elif isinstance(value, Mapping) and "_target_" in value:
            yield from _fields(section, value, value["_target_"], width)
        elif not choices(section):
            yield from _entry(_assignment(section, value), own[section], _KEY_WIDTH, width)


def _fields(section: str, values: Mapping[str, Any], cls: str, width: int) -> Iterator[str]:
    comments = field_comments(cls)
    for name, value in values.items():
        if name != "_target_":
            key = _assignment(f"{section}.{name}", value)
            yield from _entry(key, comments.get(name, ""), _KEY_WIDTH, width)


def _assignment(key: str, value: Any) -> str:
    """`key=value`, in the words of the command line; a long value is cut short."""
    if isinstance(value, Mapping):
        word = "{...}" if value else "{}"
    else:
        word = yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]
    return f"{key}={word if len(word) <= _LONGEST_VALUE else word[: _LONGEST_VALUE - 3] + '...'}"


def _entry(name: str, text: str, name_width: int, width: int) -> list[str]:
    """`name` and beside it the wrapped text, which begins a line below a name that is too long."""
    indent = " " * (name_width + 3)
    lines = textwrap.wrap(text, width - len(indent), break_on_hyphens=False) or [""]
    first = [f"  {name:<{name_width}} {lines[0]}".rstrip()]
    if len(name) > name_width:
        first = [f"  {name}", f"{indent}{lines[0]}".rstrip()]
    return [*first, *(f"{indent}{line}" for line in lines[1:])]
