"""How far a list of long jobs has come and how long the rest takes: live on a terminal, elsewhere a line a minute."""

import io
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr

from rich.console import Console
from rich.text import Text

from bkd_utils.common.files import UserError

EVERY = 60.0
# The pace is that of the record at first: as if so many seconds had been measured already, exactly as fast. Without
# this, a first job of a tenth of a second that also imports a library would promise days.
TRUSTED = 60.0


class Pace:
    """Jobs done, and seconds left of the others: those on record, scaled by how fast this machine has been so far."""

    def __init__(self, recorded: Sequence[float]) -> None:
        self.recorded, self.done, self.failed = list(recorded), 0, 0
        self._record = self._took = TRUSTED
        self._began = time.monotonic()

    def finished(self, *, failed: bool = False) -> None:
        """The next job has ended. One that failed says nothing of how fast this machine is."""
        now = time.monotonic()
        if not failed:
            self._record += self.recorded[self.done]
            self._took += now - self._began
        self.done, self.failed, self._began = self.done + 1, self.failed + failed, now

    def left(self) -> float:
        """Seconds until all jobs are done; what the running one has taken already is subtracted."""
        now, rest = self.recorded[self.done : self.done + 1], self.recorded[self.done + 1 :]
        scale = self._took / self._record
        return scale * sum(rest) + max(0.0, scale * sum(now) - (time.monotonic() - self._began))

    def __str__(self) -> str:
        told = f", {self.failed} failed" if self.failed else ""
        return f"measuring: {self.done} of {len(self.recorded)}{told}, about {duration(self.left())} left"

    def __rich__(self) -> Text:
        return Text(str(self))


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def one_line(error: Exception) -> str:
    """What an error says, in one line, with its kind where it is none that we raise to be read."""
    kind = "" if isinstance(error, ValueError | UserError) else f"{type(error).__name__}: "
    return kind + next(iter(str(error).splitlines()), "no reason was given")


@contextmanager
def shown(console: Console, recorded: Sequence[float]) -> Iterator[Pace]:
    """Show how far jobs of so many seconds on record have come; the caller says when one has `finished`. Meanwhile bars
    of single jobs, and lines that a stage was measured, are left out."""
    pace, log, ended = Pace(recorded), logging.getLogger("bkd_utils"), threading.Event()
    before = log.level
    log.setLevel(logging.WARNING)
    if not console.is_terminal:
        threading.Thread(target=_lines, args=(console, pace, ended), daemon=True).start()
    try:
        with console.status(pace), redirect_stderr(io.StringIO()):
            yield pace
    finally:
        ended.set()
        log.setLevel(before)


def _lines(console: Console, pace: Pace, ended: threading.Event) -> None:
    while not ended.wait(EVERY):
        console.print(f"  {pace}", markup=False, highlight=False)
