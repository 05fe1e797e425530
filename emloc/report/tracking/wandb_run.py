"""One run of W&B's, with all its files below one folder. The only module that imports wandb."""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc.errors import ConfigError
from emloc.report.tracking.artifacts import Table

log = logging.getLogger("emloc")

# Where wandb would write in the home folder.
_PLACES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")
# What it would tell its makers of itself, and of each attempt that failed the screen.
_REPORTING = "WANDB_ERROR_REPORTING"

# Letters of W&B's names of runs and artifacts.
_LONGEST = 120

# Of the machine and the code metrics.json says what matters, and nothing of whose they are.
_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",  # progress bars
    "disable_code": True,
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 0.1,  # seconds: what is lost of a run that is killed
    "finish_timeout": 300,  # seconds to wait for the network; what is not sent stays in the folder
    "finish_timeout_raises": True,
}


class WandbRun:
    """Open until `end`. Its files are in `wandb/` of its folder.

    Where it was open before, it is continued: by the server, or by `wandb sync` of all that lies
    there, which puts one after the other. Its network may fail at any time: wandb keeps what it
    could not send in the folder, and goes on.

    Args:
        folder: whose mirror it is.
        mode: offline or online.
        described: of what it is called and where, as `wandb.init` takes it; `group` and `name`.

    Raises:
        ConfigError: wandb is not installed, or there is no account to go online with.
    """

    def __init__(self, folder: Path, mode: str, **described: Any) -> None:
        self._home = home = folder / "wandb"
        self.continued = any(home.glob("*run-*/run-*.wandb"))
        self._before = {name: os.environ.get(name) for name in (*_PLACES, _REPORTING)}
        os.environ.update(dict.fromkeys(_PLACES, str(home.absolute())))
        os.environ.setdefault(_REPORTING, "false")
        identity = f"{described['group']}-{described['name']}-{self._own_word()}"
        given = {
            **described,
            "id": re.sub(r"[^\w.=-]", "-", identity)[-_LONGEST:],
            "dir": str(folder),
            "resume": "allow" if self.continued else None,
            "reinit": "create_new",
        }
        try:
            self._wandb = _wandb()
            self._run = self._online(given) if mode == "online" else self._offline(given)
        except BaseException:  # why: the environment is given back whatever it was
            self._leave()
            raise

    def _own_word(self) -> str:
        """Tells the run from one of the same settings on another machine, or before it."""
        path = self._home / "id"
        if not path.exists():
            self._home.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4))
        return path.read_text()

    def _online(self, given: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(**_SETTINGS)
        _require_account(self._wandb.setup(settings).settings.base_url)
        try:
            run = self._wandb.init(mode="online", settings=settings, **given)
        except self._wandb.errors.CommError as error:
            reason = " ".join(str(error).split())
            if re.search(r"\b40[13]\b", reason):
                raise ConfigError(
                    f"tracker.mode=online: W&B refuses this account ({reason}); "
                    "run `wandb login`, or set tracker.mode=offline"
                ) from error
            log.warning("W&B cannot be reached (%s): this run is logged offline", reason)
            self._say_how_to_send("offline-run-*")
            self._wandb.teardown()  # with what it has begun of a run of this name
            return self._offline(given)
        log.info("W&B: %s", run.url)
        return run

    def _offline(self, given: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(**_SETTINGS)
        self._wandb.setup(settings)
        return self._wandb.init(mode="offline", settings=settings, **given)

    def known(self, name: str, recorded: int) -> int:
        """The last value of a counter that W&B has heard of, where `recorded` is the last at all.

        A server says so itself; offline, a run that is continued was told all that was recorded
        (but for the last tenth of a second if it was killed).
        """
        if not self.continued:
            return 0
        return recorded if self._run.offline else int(self._run.summary.get(name) or 0)

    def draw_over(self, name: str, counter: str) -> None:
        """Draw all numbers of a name with `*` over a counter."""
        self._run.define_metric(counter)
        self._run.define_metric(name, step_metric=counter)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add one line of numbers."""
        self._run.log(dict(line))

    def summarise(self, facts: Mapping[str, Any]) -> None:
        """Set what stands for the whole run."""
        self._run.summary.update(dict(facts))

    def show_tables(self, tables: Mapping[str, Table]) -> None:
        """Add tables."""
        for name, table in tables.items():
            self._run.log({name: self._wandb.Table(columns=table.columns, data=table.rows)})

    def show_pictures(self, pictures: Mapping[str, Path]) -> None:
        """Add pictures that are in files."""
        for name, path in pictures.items():
            self._run.log({f"figures/{name}": self._wandb.Image(str(path))})

    def keep(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Add the files of a folder as an artifact. They are not copied, and have to stay there."""
        artifact = self._wandb.Artifact(name[-_LONGEST:], type=kind, metadata=dict(metadata))
        for path in sorted(folder.iterdir()):
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def end(self, code: int) -> None:
        """Wait until all is written, and online until all is sent, but not for ever."""
        try:
            self._run.finish(exit_code=code)
        except TimeoutError:
            log.warning("W&B did not receive everything within %d s", _SETTINGS["finish_timeout"])
            self._say_how_to_send("run-*")
        finally:
            self._leave()

    def _say_how_to_send(self, runs: str) -> None:
        log.warning("`wandb sync %s` sends it later", self._home / runs)

    def _leave(self) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if wandb := sys.modules.get("wandb"):
            wandb.teardown()  # the next run of this process has its files elsewhere


def _wandb() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "tracker=wandb: wandb is not installed; pip install wandb, or set tracker=none"
        ) from error
    return wandb


def _require_account(server: str) -> None:
    """Look where wandb looks for an account, but never ask for one.

    Raises:
        ConfigError: there is none, or no whole key.
    """
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    try:
        account = wbauth.authenticate_session(
            host=server, source="emloc", prompt=False, update_session=False
        )
    except AuthenticationError as error:
        raise ConfigError(
            f"tracker.mode=online: {error} Run `wandb login`, or set tracker.mode=offline"
        ) from error
    if account is None:
        raise ConfigError(
            "tracker.mode=online: no W&B account on this machine; run `wandb login`, "
            "set WANDB_API_KEY, or set tracker.mode=offline"
        )
