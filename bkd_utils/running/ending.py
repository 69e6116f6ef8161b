"""How processes end: children with the one that started them, and that one, ended from outside, as by Ctrl-C."""

import ctypes
import signal
import sys
from functools import partial

# In the child: Linux ends it when its parent is killed (1: PR_SET_PDEATHSIG).
END_WITH_PARENT = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL) if sys.platform == "linux" else None


def end_as_by_ctrl_c() -> list[int]:
    """Ended from outside, this process still ends its kernels and removes its half-written files, as with Ctrl-C. The
    list that is returned holds SIGTERM once it was that."""
    ended_by: list[int] = []

    def terminate(*_: object) -> None:
        ended_by.append(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told its background jobs to ignore it
    signal.signal(signal.SIGTERM, terminate)
    return ended_by
