"""The signals that end a run once it has saved."""

from __future__ import annotations

import signal

#: Ctrl-C, a scheduler's or a launcher's end, Ctrl-Break (Windows, and ComfyUI's node there), and a terminal or connection
#: that is closed.
NAMES = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")


def stopping() -> tuple[signal.Signals, ...]:
    """Those of `NAMES` that this system has. A hang-up that is ignored, as under nohup, stays ignored."""
    found = [number for number in signal.Signals if number.name in NAMES]
    return tuple(n for n in found if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN)
