"""Compare what is stored with what it should be: values by their paths, texts by their numbers, pictures by pixels."""

import base64
import io
import re
from typing import Any

import numpy as np
from matplotlib.image import imread
from nbformat import NotebookNode

NUMBER = re.compile(r"\d[\d.]*(?:e[+-]?\d+)?", re.IGNORECASE)
AT_MOST = 5  # lines about one place; the others are counted
LONG = 120  # characters of a value that are shown


class Comparison:
    """How many things of one kind were compared, and a line for each that is not what it should be.

    Every line names the place, the value that is there, what it should be, and where that is known from.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.compared = 0
        self.findings: list[str] = []

    def wrong(self, place: str, why: object) -> None:
        """A finding without two values, such as a file that is missing."""
        self.compared += 1
        self.findings.append(f"{place}: {' '.join(str(why).split())}")

    def same(self, found: Any, wanted: Any, *, place: str, source: str) -> None:
        """Compare two values that have no parts; a truth value is no number here."""
        self.compared += 1
        if found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
            self.findings.append(f"{place}: {shown(found)}, should be {shown(wanted)} (from {source})")

    def values(self, found: Any, wanted: Any, *, place: str, source: str) -> None:
        """Compare two JSON values part by part; the place of each part ends in its path."""
        before = len(self.findings)
        self._parts(found, wanted, place, "", source)
        self._shorten(before, place)

    def texts(self, found: str, wanted: str, *, place: str, source: str) -> None:
        """Compare two texts line by line; of lines that differ in numbers alone, number by number."""
        before = len(self.findings)
        ours, theirs = found.splitlines(), wanted.splitlines()
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
            self._line(one, other, place=f"{place}, line {number}", source=source)
        if len(ours) != len(theirs):
            self.same(len(ours), len(theirs), place=f"{place}, number of lines", source=source)
        elif found != wanted and len(self.findings) == before:
            self.wrong(place, "ends of lines differ")
        self._shorten(before, place)

    def pictures(self, found: bytes, wanted: bytes, *, place: str, source: str) -> None:
        """Compare two pictures pixel by pixel, whatever their files say beside the pixels."""
        self.compared += 1
        try:
            one, other = (
                np.rint(255 * imread(io.BytesIO(picture), format="png")).astype(int) for picture in (found, wanted)
            )
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

    def outputs(self, found: list[NotebookNode], wanted: list[NotebookNode], *, place: str, source: str) -> None:
        """Compare the outputs of one cell of a notebook."""
        self.same([kind(one) for one in found], [kind(one) for one in wanted], place=place, source=source)
        for number, (one, other) in enumerate(zip(found, wanted, strict=False), start=1):
            ours, theirs = content(one), content(other)
            for mime in sorted(ours.keys() & theirs.keys()):
                how = self.pictures if isinstance(ours[mime], bytes) else self.texts
                how(ours[mime], theirs[mime], place=f"{place}, output {number}, {mime}", source=source)

    def _parts(self, found: Any, wanted: Any, place: str, path: str, source: str) -> None:
        if isinstance(found, dict) and isinstance(wanted, dict):
            for name in [*wanted, *(found.keys() - wanted.keys())]:
                if name in found and name in wanted:
                    self._parts(found[name], wanted[name], place, f"{path}/{name}", source)
                else:
                    self.wrong(f"{place}, {path}/{name}", f"{'is missing' if name in wanted else 'is not'} in {source}")
        elif isinstance(found, list) and isinstance(wanted, list):
            if len(found) != len(wanted):
                self.same(len(found), len(wanted), place=f"{place}, length of {path or '/'}", source=source)
            for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
                self._parts(one, other, place, f"{path}/{number}", source)
        else:
            self.same(found, wanted, place=f"{place}, {path or '/'}", source=source)

    def _line(self, found: str, wanted: str, *, place: str, source: str) -> None:
        numbers = NUMBER.findall(found), NUMBER.findall(wanted)
        if NUMBER.sub("0", found) != NUMBER.sub("0", wanted):
            self.same(found.strip(), wanted.strip(), place=place, source=source)
            return
        self.compared += len(numbers[0]) or 1
        for count, (one, other) in enumerate(zip(*numbers, strict=True), start=1):
            if one != other:
                self.findings.append(f"{place}, number {count}: {one}, should be {other} (from {source})")

    def _shorten(self, before: int, place: str) -> None:
        if (more := len(self.findings) - before - AT_MOST) > 0:
            self.findings[before + AT_MOST :] = [f"{place}: {more} more differences"]


def shown(value: Any) -> str:
    """A value in one line that is not too long."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def kind(output: NotebookNode) -> str:
    """What an output of a cell is, in short: its type, and the formats that it has."""
    return " ".join([output.output_type, *sorted(output.get("data", {}))])


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
