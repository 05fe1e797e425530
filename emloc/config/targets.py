"""Dotted names of classes in settings (`_target_`)."""

from __future__ import annotations

# Former module -> module today, of classes that older run folders and settings name.
_MOVED_MODULES = {"emloc.tracking.track.": "emloc.report.tracking.trackers."}


def current_target(target: str) -> str:
    """Return today's dotted name of a class, given its present or its former name."""
    for former, current in _MOVED_MODULES.items():
        if target.startswith(former):
            return current + target.removeprefix(former)
    return target
