"""One line about any error: what failed, on which file, and what mends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from emloc.errors import ConfigError, one_line
from emloc.runtime.folders import CACHE, RUNS, cache_folder, runs_folder

# Environment variable of Hydra: with the value 1 tracebacks of unexpected errors are printed.
TRACEBACK = "HYDRA_FULL_ERROR"

# Longest message of another library that a line repeats; run.log has all of it.
LONGEST = 400

# Reasons why a folder can never be written, so that the user has to choose another one.
_UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT),
    *(errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}


def reason_of(error: BaseException) -> str:
    """Return one line that says what happened; of a file error with the file and a remedy."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.filename is not None and cause.strerror:
            return f"{cause.filename}: {cause.strerror}; {_remedy(cause)}"
    message = one_line(error)
    start = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
    return f"{type(error).__name__}: {start}" if start else type(error).__name__


def wants_traceback() -> bool:
    """Return whether the user wants to see the traceback of an unexpected error."""
    return os.environ.get(TRACEBACK) == "1"


def unexpected(error: BaseException) -> str:
    """Return the line about an error that no run records, with the way to its traceback."""
    more = "" if wants_traceback() else f"; {TRACEBACK}=1 shows where in the code"
    return f"{reason_of(error)}{more}"


def refusal_of(error: BaseException) -> ConfigError | None:
    """Return the refusal of a setting, or of a folder for runs or the cache that is not writable.

    None if the error has another reason.
    """
    for cause in _chain(error):
        if isinstance(cause, ConfigError):  # a library has wrapped it into an error of its own
            return cause
        if isinstance(cause, OSError) and cause.errno in _UNWRITABLE and _variable(cause):
            return ConfigError(reason_of(cause))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the errors that it was raised from."""
    while error is not None:
        yield error
        # OmegaConf hides the error of a resolver, but does not forget it.
        is_hidden = type(error).__module__.startswith("omegaconf.")
        error = error.__context__ if is_hidden else error.__cause__


def _remedy(error: OSError) -> str:
    variable = _variable(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        move = f", or set {variable}=/another/folder" if variable else ""
        return f"make room on this disk{move}, and run the command again"
    if variable:
        return f"set {variable}=/another/folder that can be written"
    if error.errno == errno.ENOENT:
        return "give a path that exists"
    return "give another path, or permission for this one"


def _variable(error: OSError) -> str:
    """The variable whose folder the file lies in, or has as an ancestor; empty without one."""
    paths = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]
    for variable, folder in ((RUNS, runs_folder()), (CACHE, cache_folder())):
        if any(_is_related(path.absolute(), folder.absolute()) for path in paths):
            return variable
    return ""


def _is_related(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) or (folder.is_relative_to(path) and path != Path("/"))
