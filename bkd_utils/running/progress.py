"""How far a list of long jobs has come: a bar on a terminal, a line a minute elsewhere, and how long the rest takes."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bkd_utils.common.files import UserError

EVERY = 60.0
# The pace is that of the record at first: as if so many seconds had been measured already, exactly as fast. Without
# this, a first job of a tenth of a second that also imports a library would promise days.
TRUSTED = 60.0


class Pace:
    """Jobs done, and seconds left of the others: those on record, scaled by how fast this machine has been so far."""

    def __init__(self, recorded: Sequence[float], *, tell: Callable[[int], None] = lambda done: None) -> None:
        self.recorded, self.done, self.failed, self._tell = list(recorded), 0, 0, tell
        self._record = self._took = TRUSTED
        self._began = time.monotonic()

    def finished(self, *, failed: bool = False) -> None:
        """The next job has ended. One that failed says nothing of how fast this machine is."""
        now = time.monotonic()
        if not failed:
            self._record += self.recorded[self.done]
            self._took += now - self._began
        self.done, self.failed, self._began = self.done + 1, self.failed + failed, now
        self._tell(self.done)

    def left(self) -> float:
        """Seconds until all jobs are done; what the running one has taken already is subtracted."""
        if self.done >= len(self.recorded):
            return 0.0
        scale = self._took / self._record
        now, *rest = self.recorded[self.done :]
        return scale * sum(rest) + max(0.0, scale * now - (time.monotonic() - self._began))

    def __str__(self) -> str:
        told = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {len(self.recorded)}{told}, about {duration(self.left())} left"


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
def shown(console: Console, what: str, recorded: Sequence[float]) -> Iterator[Pace]:
    """Show how far jobs of so many seconds on record have come; the caller says when one has `finished`."""
    log, ended = logging.getLogger("bkd_utils"), threading.Event()
    before = log.level
    log.setLevel(logging.WARNING)  # that a stage was measured is what is shown here
    try:
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[pace]}"))
            with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, redirect_stderr=False) as bar:
                pace = Pace(recorded, tell=lambda done: bar.update(task, completed=done))
                task = bar.add_task(what, total=max(1, len(pace.recorded)), pace=pace)
                yield pace
        else:
            pace = Pace(recorded)
            threading.Thread(target=_lines, args=(console, what, pace, ended), daemon=True).start()
            yield pace
    finally:
        ended.set()
        log.setLevel(before)


def _lines(console: Console, what: str, pace: Pace, ended: threading.Event) -> None:
    while not ended.wait(EVERY):
        console.print(f"  {what}: {pace}", markup=False, highlight=False)
