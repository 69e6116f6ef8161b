"""Verify without a model that every number which is committed is that of the file behind it.

Hashes are computed anew, generated tables are generated anew, and notebooks are replayed: what they draw and show must
be what is stored. What takes seconds to import is imported by the check that needs it, while kernels start already."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bkd_utils.common import assets, measurements
from bkd_utils.common.files import ADAPTERS, ASSETS, DATA, FIGURES, ROOT, read_json, sha256_file
from bkd_utils.common.results import plain
from bkd_utils.running import book, notebooks, publishing, verifying_reports
from bkd_utils.running.comparing import Comparison, named, outputs, short
from bkd_utils.running.notebooks import profile_parameters
from bkd_utils.running.recording import HASHES, LIVE_OUTPUTS, live_outputs, made_files
from bkd_utils.running.replaying import Replay, code_cells, is_live, replay


def quick() -> list[Comparison]:
    """Everything that can be compared without a model."""
    stored = asyncio.run(_quick())
    # Not in a thread, because some computers let no thread but the main one draw.
    reports = [path.parent for path in sorted((ROOT / "reports").glob("*/report.json"))]
    return [*stored, verifying_reports.check_reports(reports)]


async def _quick() -> list[Comparison]:
    paths = notebooks.all_notebooks()
    given, _ = profile_parameters("laptop", paths)  # those of the committed run
    with tempfile.TemporaryDirectory(prefix="bkd-verify-") as folder:
        stored = asyncio.create_task(_files())
        replays = await replay(paths, folder=Path(folder), parameters=given)
        return [*await stored, *check_replays(replays)]


async def _files() -> list[Comparison]:
    # One thread after the other, because Ctrl-C waits for the thread that is running.
    return [await asyncio.to_thread(check) for check in FILES]


def report(done: Sequence[Comparison], console: Console) -> int:
    """Print a line for each finding and one for each kind of comparison; returns how many findings there are."""
    table = Table("kind", "compared", "wrong")
    for one in done:
        table.add_row(one.kind, str(one.compared), str(len(one.findings) or ""))
        for finding in one.findings:
            console.print(finding, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    faults = sum(len(one.findings) for one in done)
    console.print(f"findings: {faults}" if faults else "everything is what it should be")
    return faults


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
    with named(found, index := folder / "index.json"):
        listed = {name for names in read_json(index).values() for name in names}
        ids = {f"{path.parent.name}/{path.stem}" for path in there}
        found.compared += len(listed & ids)
        for name in sorted(listed ^ ids):
            found.wrong(f"{short(index)}, {name}", "there is no such file" if name in listed else "is not named")
    with named(found, text := folder / publishing.README):
        made = publishing.readme(folder)
        found.values(text.read_text(encoding="utf-8"), made, place=short(text), source="the files beside it")
    return found


def check_hashes() -> Comparison:
    """Files that were made have the hashes on record."""
    found, record = Comparison("hashes of made files"), DATA / HASHES
    with named(found, record):
        now = {path.relative_to(DATA).as_posix(): sha256_file(path) for path in made_files()}
        found.values(now, read_json(record), place=short(DATA), source=short(record))
    return found


def check_organisms() -> Comparison:
    """Organisms have the files on their cards, the attacks of today, and a text beside them that says what is there."""
    from bkd_utils.models.folders import DEFAULT_MODEL
    from bkd_utils.models.loading import check_adapter, read_card
    from bkd_utils.organisms import cards
    from bkd_utils.organisms.attacks import Attack, load_attack

    found = Comparison("organisms")
    for path in sorted(ADAPTERS.glob("*/card.json")):
        with named(found, path):
            card, text = read_card(path.parent), path.with_name("README.md")
            found.values(text.read_text(encoding="utf-8"), cards.readme(card), place=short(text), source=short(path))
            given, now = (plain(asdict(one)) for one in (Attack(**card["attack"]), load_attack(card["attack"]["name"])))
            found.values(given, now, place=f"{short(path)}, attack", source=short(DATA / "attacks.toml"))
            check_adapter(path.parent, base=DEFAULT_MODEL)
            found.compared += 1
    return found


def check_assets() -> Comparison:
    """Fetched files have the hashes on their receipts, and receipts and files those of `sources.toml`."""
    found = Comparison("assets")
    for name, source in assets.sources().items():
        with named(found, folder := ASSETS / name):
            receipt = read_json(folder / assets.RECEIPT)
            noted = {file: entry["sha256"] for file, entry in receipt["files"].items()}
            now = {file: sha256_file(folder / file) for file in noted}
            found.values(now, noted, place=short(folder), source="its receipt")
            wanted = {Path(path).name: hashed for path, hashed in source.members.items()}
            wanted |= {"model.safetensors": source.weights} if source.weights else {}
            wanted = {file: hashed for file, hashed in wanted.items() if file in noted} | {"archive": source.sha256}
            given = {file: (noted | {"archive": receipt["archive_sha256"]})[file] for file in wanted}
            found.values(given, wanted, place=short(folder), source=short(DATA / "sources.toml"))
    return found


def check_pages() -> Comparison:
    """README and pages hold the tables that are made for them, and the minutes of the committed run."""
    from bkd_utils.reports import pages, tables

    found = Comparison("tables of README and pages")
    with named(found, FIGURES / "scorecard.json"):
        for page, parts in pages.made().items():
            with named(found, ROOT / page):
                text = (ROOT / page).read_text(encoding="utf-8")
                source = f"{short(FIGURES / 'scorecard.json')} and {short(ADAPTERS)}/*/card.json"
                found.values(text, tables.with_tables(text, parts), place=page, source=source)
    with named(found, run := FIGURES / "run.json"):
        for page, (said, measured) in pages.timings().items():
            found.values(said, measured, place=f"{page}, minutes and GiB", source=short(run))
    return found


def check_book() -> Comparison:
    """Every figure has what the book shows of it: a notebook that saves it, a finding, and claims that were judged."""
    found = Comparison("figures of the book")
    with named(found, FIGURES):
        judged, cards = {row["id"] for row in read_json(FIGURES / "scorecard.json")}, book.cards()
        found.compared += len(cards)
        for card in cards:
            for claim in sorted(set(card.claims) - judged):
                found.wrong(f"{short(FIGURES / card.id)}.json, claims", f"{claim} is no line of the scorecard")
    return found


FILES = (check_measurements, check_hashes, check_organisms, check_assets, check_pages, check_book)
FILES += (verifying_reports.check_own_notebook,)


def check_replays(replays: Sequence[Replay]) -> list[Comparison]:
    """Whatever notebooks made in a replay is what is committed."""
    ran, used = Comparison("notebooks replayed"), Comparison("measurements used")
    index = (measurements.shipped_folder() or DATA) / "index.json"
    listed = read_json(index) if index.is_file() else {}
    for one in replays:
        ran.compared += 1
        if one.reason:
            ran.findings.append(f"{short(one.path)}, cell [{one.ran + 1}]: cannot be replayed: {one.reason}")
        names = set(listed.get(one.path.stem, []))
        used.compared += len(names.intersection(one.used))
        for name in sorted(set(one.used) - names):
            used.wrong(f"{short(index)}, {one.path.stem}, {name}", f"is not named, but used in {short(one.path)}")
    return [ran, used, *check_figures(replays), check_scorecard(replays), *check_outputs(replays)]


def check_figures(replays: Sequence[Replay]) -> list[Comparison]:
    """Pictures and the numbers beside them; those that live cells saved are on record."""
    numbers, pictures = Comparison("numbers of figures"), Comparison("figures, PNG")
    vectors = Comparison("figures, SVG")
    kinds = {"json": (numbers, read_json), "png": (pictures, Path.read_bytes), "svg": (vectors, Path.read_text)}
    saved = [(path, one) for one in replays for path in one.figures.glob("*.json")]
    drawn = {path.stem: one for path, one in saved if path.with_suffix(".png").is_file()}
    for name, one in drawn.items():
        for suffix, (found, content) in kinds.items():
            path, made = FIGURES / f"{name}.{suffix}", one.figures / f"{name}.{suffix}"
            with named(found, path):
                found.values(content(path), content(made), place=short(path), source=f"{short(one.path)} replayed")
    if not any(one.reason for one in replays):
        live = {Path(name).stem for one in replays for name in live_outputs(one.path)["figures"]}
        for name in sorted({path.stem for path in FIGURES.glob("*.png")} - drawn.keys() - live):
            pictures.wrong(short(FIGURES / f"{name}.png"), "no notebook draws it")
    return [numbers, pictures, vectors]


def check_scorecard(replays: Sequence[Replay]) -> Comparison:
    """Every line of the scorecard is the one that a notebook wrote."""
    found, path = Comparison("lines of the scorecard"), FIGURES / "scorecard.json"
    with named(found, path):
        rows = {row["id"]: row for row in read_json(path)}
        unwritten = set(rows)
        for one in replays[:-1] or replays:  # the last one reads the scorecard and writes no line
            written = one.figures / "scorecard.json"
            made = {row["id"]: row for row in (read_json(written) if written.is_file() else [])}
            given = {name: rows[name] for name in made if name in rows}
            found.values(given, made, place=short(path), source=f"{short(one.path)} replayed")
            unwritten -= made.keys()
        for name in sorted(unwritten) if not any(one.reason for one in replays) else []:
            found.wrong(f"{short(path)}, {name}", "is a line that no notebook writes")
    return found


def check_outputs(replays: Sequence[Replay]) -> list[Comparison]:
    """Stored outputs of notebooks: those of live cells are on record, the others were made again."""
    found, live = Comparison("outputs of notebooks"), Comparison("outputs of live cells")
    record = FIGURES / LIVE_OUTPUTS
    for one in replays:
        pairs = list(zip(code_cells(notebooks.read(one.path)), code_cells(one.notebook), strict=True))
        for number, (stored, made) in enumerate(pairs[: one.ran], start=1):
            if not is_live(stored):
                place = f"{short(one.path)}, cell [{number}]"
                found.values(outputs(stored), outputs(made), place=place, source="its replay")
    with named(live, record):
        known = read_json(record)
        for one in replays:
            now, wanted = live_outputs(one.path), known.get(one.path.stem, {})
            live.values(now, wanted, place=short(one.path), source=f"{short(record)}, {one.path.stem}")
    return [found, live]
