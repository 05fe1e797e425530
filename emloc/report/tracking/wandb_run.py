"""One W&B run with all of its files in one folder. The only module that imports wandb."""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from emloc.errors import ConfigError, one_line
from emloc.report.tracking.artifacts import Table
from emloc.runtime.permissions import apply_umask

log = logging.getLogger("emloc")

# Folders that wandb would otherwise put into the home folder.
_FOLDERS = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")
# Whether wandb reports its own failures to its makers.
_REPORTING = "WANDB_ERROR_REPORTING"

# Longest name of a run or artifact that W&B allows.
_LONGEST = 120

# W&B gets no facts of machine, user or code: metrics.json has those that matter.
_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",  # progress bars
    "disable_code": True,
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 0.1,  # seconds that a killed run may lose
    "finish_timeout": 300,  # seconds to wait for the network; unsent lines stay in the folder
    "finish_timeout_raises": True,
}


class WandbRun:
    """A W&B run, open until `end`. Its files are in `wandb/` of its folder.

    A run that was open before is resumed, either by the server or by `wandb sync`, which joins the
    parts in the folder. If the network fails, wandb keeps unsent lines in the folder and continues.

    Args:
        folder: of the run that is mirrored.
        mode: offline or online.
        described: keyword arguments of `wandb.init`, among them `group` and `name`.

    Raises:
        ConfigError: wandb is not installed, or there is no account to go online with.
    """

    def __init__(self, folder: Path, mode: str, **described: Any) -> None:
        self._home = home = folder / "wandb"
        self.continued = any(home.glob("*run-*/run-*.wandb"))
        self._before = {name: os.environ.get(name) for name in (*_FOLDERS, _REPORTING)}
        os.environ.update(dict.fromkeys(_FOLDERS, str(home.absolute())))
        os.environ.setdefault(_REPORTING, "false")
        identity = f"{described['group']}-{described['name']}-{self._unique_word()}"
        options = {
            **described,
            "id": re.sub(r"[^\w.=-]", "-", identity)[-_LONGEST:],
            "dir": str(folder),
            "resume": "allow" if self.continued else None,
            "reinit": "create_new",
        }
        try:
            self._wandb = _wandb()
            self._run = self._online(options) if mode == "online" else self._offline(options)
        except BaseException:  # why: the environment must be restored after any failure
            self._restore_environment()
            raise

    def _unique_word(self) -> str:
        """Return a word that separates the run from others with the same settings."""
        path = self._home / "id"
        if not path.exists():
            self._home.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4))
        return path.read_text()

    def _online(self, options: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(**_SETTINGS)
        _require_account(self._wandb.setup(settings).settings.base_url)
        try:
            run = self._wandb.init(mode="online", settings=settings, **options)
        except self._wandb.errors.CommError as error:
            reason = one_line(error)
            if re.search(r"\b40[13]\b", reason):
                raise ConfigError(
                    f"tracker.mode=online: W&B refuses this account ({reason}); "
                    "run `wandb login`, or set tracker.mode=offline"
                ) from error
            log.warning("W&B cannot be reached (%s): this run is tracked offline", reason)
            self._log_how_to_send("offline-run-*")
            self._wandb.teardown()  # drops the run of this name that it has begun
            return self._offline(options)
        log.info("W&B: %s", run.url)
        return run

    def _offline(self, options: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(**_SETTINGS)
        self._wandb.setup(settings)
        return self._wandb.init(mode="offline", settings=settings, **options)

    def last_sent(self, name: str, recorded: int) -> int:
        """Return the last value of a counter that W&B has; `recorded` is the last in the log.

        It is -1 where W&B has none.

        Online the server knows the value. Offline a resumed run has all lines of the log, except
        for those of the last tenth of a second before it was killed.
        """
        if not self.continued:
            return -1
        value = recorded if self._run.offline else self._run.summary.get(name)
        return -1 if value is None else int(value)

    def draw_over(self, name: str, counter: str) -> None:
        """Use a counter as the horizontal axis of all numbers that match a name with `*`."""
        self._run.define_metric(counter)
        self._run.define_metric(name, step_metric=counter)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add one line of numbers."""
        self._run.log(dict(line))

    def summarise(self, facts: Mapping[str, Any]) -> None:
        """Set facts of the whole run."""
        self._run.summary.update(dict(facts))

    def show_tables(self, tables: Mapping[str, Table]) -> None:
        """Add tables."""
        for name, table in tables.items():
            self._run.log({name: self._wandb.Table(columns=table.columns, data=table.rows)})

    def show_pictures(self, pictures: Mapping[str, Path]) -> None:
        """Add images from files."""
        for name, path in pictures.items():
            self._run.log({f"figures/{name}": self._wandb.Image(str(path))})

    def keep(self, name: str, kind: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Add the files of a folder as an artifact. They are not copied and must stay there."""
        artifact = self._wandb.Artifact(name[-_LONGEST:], type=kind, metadata=dict(metadata))
        for path in sorted(folder.iterdir()):
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def end(self, code: int) -> None:
        """Wait until all lines are written, and online until they are sent or time is up."""
        try:
            self._run.finish(exit_code=code)
        except TimeoutError:
            log.warning("W&B did not take all within %d s", _SETTINGS["finish_timeout"])
            self._log_how_to_send("run-*")
        finally:
            self._restore_environment()
            # W&B's copies of artifacts can be read by their owner alone. After a timeout W&B may
            # still be removing files here.
            with suppress(OSError):
                apply_umask(self._home)

    def _log_how_to_send(self, runs: str) -> None:
        log.warning("`wandb sync %s` sends it later", self._home / runs)

    def _restore_environment(self) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if wandb := sys.modules.get("wandb"):
            wandb.teardown()  # the next run of this process has its files elsewhere


def _wandb() -> Any:
    """Import and return wandb.

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
    """Check that wandb finds an account, without asking for one.

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
