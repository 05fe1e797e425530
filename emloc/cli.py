"""The `emloc` command. Imports neither torch nor transformers: `--help` has to answer at once."""

from __future__ import annotations

import logging
import os
import sys
import traceback

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from emloc.config.compose import register
from emloc.config.explain import explain
from emloc.config.paths import CONF
from emloc.console.completion import complete
from emloc.console.help import help_text, version_line
from emloc.console.verbs import VERBS
from emloc.console.wrong_words import no_verb, unknown_flag
from emloc.errors import ConfigError, FailedWorkError, SaidError, one_line
from emloc.runtime.failures import TRACEBACK, refusal_of, unexpected, wants_traceback
from emloc.sweeps.job import run_job

FAILURE, USER_ERROR, INTERRUPTED = 1, 2, 130

HELP, VERSION, SWEEP = ("help", "-h", "--help"), ("--version", "-V"), ("-m", "--multirun")


def main() -> None:
    """Run `emloc <overrides>` (Hydra's command line), or a verb, or print help."""
    tracebacks = os.environ.get(TRACEBACK)
    logging.raiseExceptions = False  # on a full disk each line of a log would print a traceback
    # Without this, blocks of many sizes leave gaps in device memory that no other tensor fits into.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # OpenMP threads spin for a moment when they wait. By default they do so far longer, and an
    # eigendecomposition took fifty times as long as soon as another process used the same cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        _run(sys.argv[1:])
    except FailedWorkError as error:
        print(f"emloc: {error}", file=sys.stderr)
        sys.exit(FAILURE)
    except ConfigError as error:
        _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error, sys.argv[1:]))
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("emloc: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SaidError as error:
        sys.exit(error.code)
    except Exception as error:  # why: of any failure one line is printed
        if _of_hydra(error) and isinstance(error, ValueError):
            _refuse(explain(error, sys.argv[1:]))
        os.environ[TRACEBACK] = tracebacks or ""  # what the user has set, and not `_hydra`
        _fail(error)


def _run(words: list[str]) -> None:
    name = words[0] if words else ""
    if name in VERBS:
        verb = VERBS[name]
        verb.run(verb.parser.parse_args(words[1:]))
    elif any(word in HELP for word in words):
        print(help_text([word for word in words if "=" in word]))
    elif name in VERSION:
        print(version_line())
    elif shell := _queried_shell(words):
        print(complete(os.environ.get("COMP_LINE", ""), os.environ.get("COMP_POINT", ""), shell))
    else:
        if name and "=" not in name and not name.startswith(("-", "~")):
            _refuse(no_verb(words))
        if flag := unknown_flag(words):
            _refuse(flag)
        _hydra(words)


def _hydra(words: list[str]) -> None:
    # With it Hydra raises errors instead of printing them, and ours is the only line.
    os.environ[TRACEBACK] = "1"
    register(words)
    # Hydra's parser takes no settings behind a flag that stands between settings.
    sweep = [word for word in words if word in SWEEP]
    sys.argv[1:] = [*sweep, *(word for word in words if word not in SWEEP)]
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(run_job)()


def _queried_shell(words: list[str]) -> str:
    """The shell that asks for completions (`-sc query=bash`); empty if none does."""
    if len(words) == 2 and words[0] in ("-sc", "--shell-completion", "--shell_completion"):
        return words[1].partition("query=")[2]
    return ""


def _of_hydra(error: Exception) -> bool:
    """Whether Hydra raised the error, which has no type of its own for some misuse."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals["__name__"].startswith("hydra.")


def _refuse(message: str) -> None:
    print(f"emloc: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _fail(error: Exception) -> None:
    """Print one line about an error that no run has recorded, and end the command."""
    if wants_traceback():
        traceback.print_exception(error)
    if refusal := refusal_of(error):
        _refuse(str(refusal))
    if isinstance(error, yaml.YAMLError):
        _refuse(f"a YAML file cannot be read: {one_line(error)}; correct that file")
    words = [word for word in sys.argv[1:2] if word in VERBS]
    print(f"{' '.join(['emloc', *words])}: {unexpected(error)}", file=sys.stderr)
    sys.exit(FAILURE)


if __name__ == "__main__":
    main()
