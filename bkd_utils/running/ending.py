"""How processes end: children with the one that started them, and that one, ended from outside, as by Ctrl-C; the
command line with one line for what its user can mend."""

import ctypes
import errno
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from bkd_utils.common.files import UserError

# In the child: Linux ends it when its parent is killed (1: PR_SET_PDEATHSIG).
END_WITH_PARENT = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL) if sys.platform == "linux" else None
# A full or read-only disk, a folder that is another user's: nothing that a traceback would explain.
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
INTERRUPTED = 128 + signal.SIGINT  # exit status


def in_one_line(command: Callable[[], Any], console: Any) -> None:
    """Our own errors are one line each, and so is Ctrl-C; anything else is a bug and keeps its traceback."""
    ended_by = end_as_by_ctrl_c()
    try:
        command()
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:  # to which typer turns a Ctrl-C
            raise
        console.print("stopped; the same command again does what is left")
        sys.exit(128 + signal.SIGTERM if ended_by else INTERRUPTED)
    except (ValueError, UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_MACHINE:
            raise
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


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
