"""The `emloc` command. Imports neither torch nor transformers: `--help` has to answer at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from emloc.cell import run_cell
from emloc.compose import CONF, explain, register
from emloc.errors import ConfigError

USER_ERROR, INTERRUPTED = 2, 130


def main() -> None:
    """Run `emloc <overrides>` (Hydra's command line) or `emloc report|merge <path>`."""
    verb = VERBS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        if verb is not None:
            verb(sys.argv[2:])
        else:
            _hydra()
    except ConfigError as error:
        _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error))
    except ValueError as error:
        if not _of_hydra(error):
            raise
        _refuse(f"{str(error).strip()}; a group takes one of its choices, as in tracker=none")
    except KeyboardInterrupt:
        print("emloc: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _hydra() -> None:
    # With it Hydra raises its errors instead of printing them, and ours is the one line shown.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    register()
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(run_cell)()


def _of_hydra(error: Exception) -> bool:
    """Whether Hydra raised it, which has no type of its own for some misuse."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals["__name__"].startswith("hydra.")


def _refuse(message: str) -> None:
    print(f"emloc: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _report(arguments: list[str]) -> None:
    """Print the table of a folder of runs."""
    from emloc.report import table

    parser = argparse.ArgumentParser("emloc report", description=_report.__doc__)
    parser.add_argument("folder", type=Path, help="runs/<name>, or one run in it")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; give one such as runs/demo")
    print(table(folder))


def _merge(arguments: list[str]) -> None:
    """Fold a run's adapter into the original weights and write a checkpoint."""
    parser = argparse.ArgumentParser("emloc merge", description=_merge.__doc__)
    parser.add_argument("run", type=Path, help="runs/<name>/<run>")
    parser.add_argument("--to", type=Path, help="folder to write (default: <run>/merged)")
    chosen = parser.parse_args(arguments)

    from emloc.merging import merge_run

    print(merge_run(chosen.run, chosen.to or chosen.run / "merged"))


VERBS: dict[str, Callable[[list[str]], None]] = {"report": _report, "merge": _merge}

if __name__ == "__main__":
    main()
