"""Compare what is stored with what it should be: values by their paths, texts by their numbers, pictures by pixels."""

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from nbformat import NotebookNode

from bkd_utils.common.files import ROOT

NUMBER = re.compile(r"\d[\d.]*(?:e[+-]?\d+)?", re.IGNORECASE)
FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)  # of a file with a wrong content
AT_MOST = 5  # lines about one place; the others are counted
LONG = 120  # characters of a value that are shown


class Comparison:
    """How many things of one kind were compared, and a line for each that is not what it should be. Every line names
    the place, the value that is there, what it should be, and where that is known from."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.compared = 0
        self.findings: list[str] = []

    def wrong(self, place: str, why: object) -> None:
        """A finding without two values, such as a file that is missing."""
        self.compared += 1
        self.findings.append(f"{place}: {' '.join(str(why).split())}")

    def values(self, found: Any, wanted: Any, *, place: str, source: str) -> None:
        """Compare two values part by part: JSON by its paths, texts by lines, and PNG pictures (bytes) by pixels."""
        before = len(self.findings)
        self._parts(found, wanted, place, "", source)
        if (more := len(self.findings) - before - AT_MOST) > 0:
            self.findings[before + AT_MOST :] = [f"{place}: {more} more differences"]

    def _parts(self, found: Any, wanted: Any, place: str, path: str, source: str) -> None:
        where = f"{place}, {path}" if path else place
        match found, wanted:
            case dict(), dict():
                for name in {**wanted, **found}:
                    if name in found and name in wanted:
                        self._parts(found[name], wanted[name], place, f"{path}/{name}", source)
                    else:
                        why = "is missing; it is in" if name in wanted else "is not in"
                        self.wrong(f"{place}, {path}/{name}", f"{why} {source}")
            case list(), list():
                if len(found) != len(wanted):
                    self._same(len(found), len(wanted), f"{place}, length of {path or '/'}", source)
                for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
                    self._parts(one, other, place, f"{path}/{number}", source)
            case bytes(), bytes():
                self._pictures(found, wanted, where, source)
            case str(), str() if "\n" in found + wanted:
                self._texts(found, wanted, where, source)
            case _:
                self._same(found, wanted, where, source)

    def _same(self, found: Any, wanted: Any, place: str, source: str) -> None:
        """Compare two values that have no parts; a truth value is no number here."""
        self.compared += 1
        if found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
            self.findings.append(f"{place}: {shown(found)}, should be {shown(wanted)} (from {source})")

    def _texts(self, found: str, wanted: str, place: str, source: str) -> None:
        """Line by line; of lines that differ in numbers alone, number by number."""
        self.compared += len(NUMBER.findall(found)) or 1
        if found == wanted:
            return
        before, ours, theirs = len(self.findings), found.splitlines(), wanted.splitlines()
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
            if NUMBER.sub("0", one) != NUMBER.sub("0", other):
                self._same(one.strip(), other.strip(), f"{place}, line {number}", source)
                continue
            for count, pair in enumerate(zip(NUMBER.findall(one), NUMBER.findall(other), strict=True), start=1):
                if pair[0] != pair[1]:
                    self._same(*pair, f"{place}, line {number}, number {count}", source)
        if len(ours) != len(theirs):
            self._same(len(ours), len(theirs), f"{place}, number of lines", source)
        elif len(self.findings) == before:
            self.wrong(place, "spaces or ends of lines differ")

    def _pictures(self, found: bytes, wanted: bytes, place: str, source: str) -> None:
        """Pixel by pixel, whatever the files say beside the pixels."""
        self.compared += 1
        if found == wanted:
            return
        try:
            one, other = (np.rint(255 * imread(io.BytesIO(each), format="png")).astype(int) for each in (found, wanted))
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
            self.findings.append(f"{place}: no whole picture ({error})")
            return
        if one.shape != other.shape:
            sizes = [f"{shape[1]} x {shape[0]} pixels" for shape in (one.shape, other.shape)]
            self.findings.append(f"{place}: {sizes[0]}, should be {sizes[1]} (from {source})")
            return
        rows, columns = np.nonzero((one != other).any(axis=-1))
        if len(rows):
            y, x = int(rows[0]), int(columns[0])
            first = f"the first at {x}, {y}: {one[y, x].tolist()}, should be {other[y, x].tolist()}"
            count = f"{len(rows)} of {one.shape[0] * one.shape[1]} pixels differ"
            self.findings.append(f"{place}: {count}, {first} (from {source})")


@contextmanager
def named(found: Comparison, place: Path | str) -> Iterator[None]:
    """A file that is missing or broken is a finding, and the others go on."""
    try:
        yield
    except FileNotFoundError as error:
        found.wrong(short(place), f"{short(Path(error.filename or place))} is missing")
    except FAULTS as error:
        found.wrong(short(place), f"has no {error}" if isinstance(error, KeyError) else error)


def short(path: Path | str) -> str:
    """A path as seen from the root of the checkout."""
    return path.relative_to(ROOT).as_posix() if isinstance(path, Path) and path.is_relative_to(ROOT) else str(path)


def shown(value: Any) -> str:
    """A value in one line that is not too long."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def content(output: NotebookNode) -> dict[str, Any]:
    """Format -> the text of an output of a cell, or the bytes of its picture."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": f"{output.ename}: {output.evalue}"}
    return {
        mime: base64.b64decode(value) if mime == "image/png" else value if isinstance(value, str) else repr(value)
        for mime, value in output.data.items()
    }


def outputs(cell: NotebookNode) -> list[dict[str, Any]]:
    """The outputs of a cell in a form that can be compared: the type and the `content` of each."""
    return [{"type": output.output_type} | content(output) for output in cell.outputs]
