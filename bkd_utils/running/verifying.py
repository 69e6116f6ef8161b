"""Verify without a model that every number which is committed is that of the file behind it.

Hashes are computed anew, generated tables are generated anew, and notebooks are replayed: what they draw and show must
be what is stored.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bkd_utils.common import assets, measurements
from bkd_utils.common.files import ADAPTERS, ASSETS, DATA, FIGURES, ROOT, read_json, sha256_file
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.loading import check_adapter, read_card
from bkd_utils.organisms import cards
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.reports import pages, tables
from bkd_utils.running import notebooks, publishing
from bkd_utils.running.comparing import Comparison
from bkd_utils.running.recording import HASHES, LIVE_OUTPUTS, live_outputs, made_files
from bkd_utils.running.replaying import Replay, code_cells, is_live, replay
from bkd_utils.running.runner import profile_parameters

FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)  # of a file with a wrong content


def quick(on_done: Callable[[Replay], None] = lambda _: None) -> list[Comparison]:
    """Everything that can be compared without a model; `on_done` is told of every notebook that was replayed."""
    return asyncio.run(_quick(on_done))


async def _quick(on_done: Callable[[Replay], None]) -> list[Comparison]:
    paths = notebooks.all_notebooks()
    given, _ = profile_parameters("laptop", paths)  # those of the committed run
    with tempfile.TemporaryDirectory(prefix="bkd-verify-") as folder:
        running = replay(paths, folder=Path(folder), parameters=given, on_done=on_done)
        replays, stored = await asyncio.gather(running, asyncio.to_thread(check_files))
        return [*stored, *check_replays(replays)]


def report(done: Sequence[Comparison], console: Console) -> int:
    """Print a line for each finding and one for each kind of comparison; returns how many findings there are."""
    for one in done:
        for finding in one.findings:
            console.print(finding, style="red", markup=False, highlight=False, soft_wrap=True)
    table = Table("kind", "compared", "wrong")
    for one in done:
        table.add_row(one.kind, str(one.compared), str(len(one.findings) or ""))
    console.print(table)
    faults = sum(len(one.findings) for one in done)
    console.print(f"findings: {faults}" if faults else "everything is what it should be")
    return faults


def check_files() -> list[Comparison]:
    """Whatever needs no notebook."""
    return [check_measurements(), check_hashes(), check_organisms(), check_assets(), check_pages()]


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


def check_measurements() -> Comparison:
    """Every measurement is whole, the index names those that are there, and the text beside them counts them."""
    found, folder = Comparison("measurements"), measurements.shipped_folder()
    if folder is None:
        return found
    there = measurements.paths(folder)
    for path in there:
        with named(found, path):
            measurements.read(path)
            found.compared += 1
    index = folder / "index.json"
    with named(found, index):
        listed = {name for names in read_json(index).values() for name in names}
        ids = {f"{path.parent.name}/{path.stem}" for path in there}
        for name in sorted(listed | ids):
            what = {True: "names it", False: "does not name it"}
            place = f"{short(index)}, {name}"
            found.same(what[name in listed], what[name in ids], place=place, source="the files there")
    with named(found, text := folder / publishing.README):
        made = publishing.readme(folder)
        found.texts(text.read_text(encoding="utf-8"), made, place=short(text), source="the files beside it")
    return found


def check_hashes() -> Comparison:
    """Files that were made have the hashes on record."""
    found, record = Comparison("hashes of made files"), DATA / HASHES
    with named(found, record):
        known = read_json(record)
        there = {path.relative_to(DATA).as_posix() for path in made_files()}
        for name in sorted(known.keys() | there):
            with named(found, DATA / name):
                now = f"sha256 {sha256_file(DATA / name)[:16]}"
                wanted = f"sha256 {known[name][:16]}" if name in known else "a file on record"
                found.same(now, wanted, place=short(DATA / name), source=short(record))
    return found


def check_organisms() -> Comparison:
    """Organisms have the files on their cards, the attacks of today, and a text beside them that says what is there."""
    found = Comparison("organisms")
    for path in sorted(ADAPTERS.glob("*/card.json")):
        with named(found, path):
            card, text = read_card(path.parent), path.with_name("README.md")
            found.texts(text.read_text(encoding="utf-8"), cards.readme(card), place=short(text), source=short(path))
            given, now = asdict(Attack(**card["attack"])), asdict(load_attack(card["attack"]["name"]))
            found.values(
                _plain(given), _plain(now), place=f"{short(path)}, attack", source=short(DATA / "attacks.toml")
            )
            check_adapter(path.parent, base=DEFAULT_MODEL)
            found.compared += 1
    return found


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def check_assets() -> Comparison:
    """Fetched files have the hashes on their receipts, and receipts and files those of `sources.toml`."""
    found = Comparison("assets")
    for name, source in assets.sources().items():
        folder, listed = ASSETS / name, short(DATA / "sources.toml")
        with named(found, folder):
            receipt = read_json(folder / assets.RECEIPT)
            found.same(receipt["archive_sha256"], source.sha256, place=f"{name}, hash of its archive", source=listed)
            wanted = {file: entry["sha256"] for file, entry in receipt["files"].items()}
            for file, hashed in wanted.items():
                found.same(sha256_file(folder / file), hashed, place=short(folder / file), source="its receipt")
            members = {Path(path).name: hashed for path, hashed in source.members.items()}
            members |= {"model.safetensors": source.weights} if source.weights else {}
            for file in members.keys() & wanted.keys():
                found.same(wanted[file], members[file], place=short(folder / file), source=listed)
    return found


def check_pages() -> Comparison:
    """README and pages hold the tables that are made for them, and the minutes of the committed run."""
    found = Comparison("tables of README and pages")
    with named(found, FIGURES / "scorecard.json"):
        for page, parts in pages.made().items():
            with named(found, ROOT / page):
                text = (ROOT / page).read_text(encoding="utf-8")
                source = f"{short(FIGURES / 'scorecard.json')} and {short(ADAPTERS)}/*/card.json"
                found.texts(text, tables.with_tables(text, parts), place=page, source=source)
    with named(found, run := FIGURES / "run.json"):
        for page, (said, measured) in pages.timings().items():
            found.values(said, measured, place=f"{page}, minutes and GiB", source=short(run))
    return found


def check_replays(replays: Sequence[Replay]) -> list[Comparison]:
    """Whatever notebooks made in a replay is what is committed."""
    ran = Comparison("notebooks replayed")
    for one in replays:
        ran.compared += 1
        if one.reason:
            ran.findings.append(f"{short(one.path)}, cell [{one.ran + 1}]: cannot be replayed: {one.reason}")
    return [ran, check_index(replays), *check_figures(replays), check_scorecard(replays), *check_outputs(replays)]


def check_index(replays: Sequence[Replay]) -> Comparison:
    """The index names for each notebook what it used."""
    found, index = Comparison("measurements used"), (measurements.shipped_folder() or DATA) / "index.json"
    listed = read_json(index) if index.is_file() else {}
    for one in replays:
        for name in one.used:
            place, names = f"{short(index)}, {one.path.stem}, {name}", listed.get(one.path.stem, [])
            found.same("is named" if name in names else "is not named", "is named", place=place, source=short(one.path))
    return found


def check_figures(replays: Sequence[Replay]) -> list[Comparison]:
    """Pictures and the numbers beside them; those that live cells saved are on record."""
    kinds = {
        "json": Comparison("numbers of figures"),
        "png": Comparison("figures, PNG"),
        "svg": Comparison("figures, SVG"),
    }
    drawn = {
        path.stem: one for one in replays for path in one.figures.glob("*.json") if path.with_suffix(".png").is_file()
    }
    for name, one in drawn.items():
        source = f"{short(one.path)} replayed"
        for suffix, found in kinds.items():
            path, made = FIGURES / f"{name}.{suffix}", one.figures / f"{name}.{suffix}"
            with named(found, path):
                if suffix == "json":
                    found.values(read_json(path), read_json(made), place=short(path), source=source)
                elif suffix == "png":
                    found.pictures(path.read_bytes(), made.read_bytes(), place=short(path), source=source)
                else:
                    theirs, ours = (file.read_text(encoding="utf-8") for file in (path, made))
                    found.texts(theirs, ours, place=short(path), source=source)
    if not any(one.reason for one in replays):
        live = {Path(name).stem for one in replays for name in live_outputs(one.path)["figures"]}
        there = {path.stem for path in FIGURES.glob("*.png")}
        for name in sorted(there - drawn.keys() - live):
            kinds["png"].wrong(short(FIGURES / f"{name}.png"), "no notebook draws it")
    return list(kinds.values())


def check_scorecard(replays: Sequence[Replay]) -> Comparison:
    """Every line of the scorecard is the one that a notebook wrote."""
    found, path = Comparison("lines of the scorecard"), FIGURES / "scorecard.json"
    with named(found, path):
        rows = {row["id"]: row for row in read_json(path)}
        whole = not any(one.reason for one in replays)
        made = {}
        for one in replays[:-1] if len(replays) > 1 else replays:
            written = one.figures / "scorecard.json"
            made |= {row["id"]: (row, short(one.path)) for row in (read_json(written) if written.is_file() else [])}
        for name in sorted(rows.keys() | made.keys()):
            place = f"{short(path)}, {name}"
            if name in rows and name in made:
                found.values(rows[name], made[name][0], place=place, source=f"{made[name][1]} replayed")
            elif name in made or whole:
                found.wrong(place, "is missing" if name in made else "is a line that no notebook writes")
    return found


def check_outputs(replays: Sequence[Replay]) -> list[Comparison]:
    """Stored outputs of notebooks: those of live cells are on record, the others were made again."""
    found, live = Comparison("outputs of notebooks"), Comparison("outputs of live cells")
    record = FIGURES / LIVE_OUTPUTS
    known = {}
    with named(live, record):
        known = read_json(record)
    for one in replays:
        pairs = zip(code_cells(notebooks.read(one.path)), code_cells(one.notebook), strict=True)
        for number, (stored, made) in list(enumerate(pairs, start=1))[: one.ran]:
            if not is_live(stored):
                place = f"{short(one.path)}, cell [{number}]"
                found.outputs(stored.outputs, made.outputs, place=place, source="its replay")
        if known:
            now, wanted = live_outputs(one.path), known.get(one.path.stem, {"cells": {}, "figures": {}})
            source = f"{short(record)}, {one.path.stem}"
            _live_cells(live, now["cells"], wanted["cells"], short(one.path), source)
            for name in sorted(now["figures"].keys() | wanted["figures"].keys()):
                ours, theirs = ({name: each["figures"].get(name)} for each in (now, wanted))
                live.values(ours[name], theirs[name], place=short(FIGURES / name), source=source)
    return [found, live]


def _live_cells(found: Comparison, now: dict, wanted: dict, place: str, source: str) -> None:
    """Outputs of live cells, as `recording.live_outputs` gives them, against those on record."""
    for number in sorted(now.keys() | wanted.keys(), key=int):
        where, ours, theirs = f"{place}, cell [{number}]", now.get(number, []), wanted.get(number, [])
        found.same([list(one) for one in ours], [list(one) for one in theirs], place=where, source=source)
        for count, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
            for mime in sorted(one.keys() & other.keys()):
                found.texts(one[mime], other[mime], place=f"{where}, output {count}, {mime}", source=source)
