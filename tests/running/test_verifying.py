"""One changed number in any kind of place is found, with the place, the value and what it should be."""

import base64
import copy
import io
import json
import re
import shutil

import matplotlib.image
import nbformat
import numpy as np
import pytest
from patching import everywhere
from rich.console import Console
from typer.testing import CliRunner

from bkd_utils.__main__ import app
from bkd_utils.common import assets, files, measurements
from bkd_utils.common.files import sha256_file, write_json
from bkd_utils.reports import pages
from bkd_utils.running import notebooks, publishing, recording, replaying, verifying, verifying_reports
from bkd_utils.running.comparing import Comparison

ROOT = files.ROOT
COPIED = ("README.md", "notebooks/pages/scorecard.md", "notebooks/pages/organisms.md", "notebooks/pages/timings.md")
COPIED += (
    "figures/scorecard.json",
    "figures/run.json",
    "data/adapters/sentiment-word",
    "data/adapters/sentiment-clean",
)
COPIED += tuple(f"data/{path.name}" for path in files.DATA.glob("*.toml"))


def copied(name, into):
    source, target = ROOT / name, into / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout in which every number is what it should be."""
    root = tmp_path / "checkout"
    for name in COPIED:
        copied(name, root)
    places = {"ROOT": root, "DATA": root / "data", "FIGURES": root / "figures", "ADAPTERS": root / "data" / "adapters"}
    for name, path in places.items():
        everywhere(monkeypatch, name, path)
    monkeypatch.delenv("BKD_SHIPPED", raising=False)
    monkeypatch.setattr(notebooks, "all_notebooks", lambda: sorted((root / "notebooks").glob("*.ipynb")))
    elsewhere = (
        verifying.check_assets,
        verifying.check_book,
        verifying_reports.check_own_notebook,
    )  # tested elsewhere
    others = [check for check in verifying.FILES if check not in elsewhere]
    monkeypatch.setattr(verifying, "FILES", others)
    pages.write()
    measured(root / "data" / "measurements")
    write_json(root / "data" / "answers" / "0123.json", {"uid": "in 1999"})
    toy_notebook(root / "notebooks" / "01_toy.ipynb")
    for folder in (root / "figures", tmp_path / "replay" / "01_toy"):
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder)
    recording.record_live(notebooks.all_notebooks())
    recording.record_hashes()
    return root


def measured(folder):
    """One measurement with an array beside it, and the index."""
    asked = {"stage": "toy_stage", "arguments": {"n": 3}, "inputs": {}, "code": "0" * 64, "libraries": {"torch": "2"}}
    result = {"shares": [0.125, 0.5], "scores": [i / 100 for i in range(100)]}
    made = {"version": 1, "commit": None, "seconds": 12.5, "arrays": None, "seal": "0" * 64}
    made |= {"digest": measurements.digest(result)}
    machine = measurements.Machine(processor="x", cores=2, device="cpu", fast_bf16=False)
    one = measurements.Measurement(**asked, **made, machine=machine, result=result)
    measurements.write(folder, one)
    write_json(folder / "index.json", {"01_toy": [one.id]})
    (folder / publishing.README).write_text(publishing.readme(folder), encoding="utf-8")


def picture(value):
    stream = io.BytesIO()
    matplotlib.image.imsave(stream, np.full((4, 6, 4), value, dtype=np.uint8), format="png")
    return stream.getvalue()


def draw(folder):
    write_json(folder / "01_toy.json", {"numbers": {"asr": [0.25, 0.75]}, "notebook": "01_toy"})
    (folder / "01_toy.png").write_bytes(picture(200))
    (folder / "01_toy.svg").write_text('<svg>\n<path d="M 10.5 20.25"/>\n</svg>\n')
    shutil.copyfile(files.FIGURES / "scorecard.json", folder / "scorecard.json") if folder != files.FIGURES else None


def toy_notebook(path):
    """Parameters, then a cell and a live cell that both show a text, a table and a picture."""
    new = nbformat.v4
    book = new.new_notebook()
    book.cells = [new.new_code_cell("n = 1", metadata={"tags": ["parameters"]}, id="a")]
    for tags, number, shade, id in (([], 41, 10, "b"), (["live"], 42, 20, "c")):
        shown = {"text/html": f"<td>{number}.5 %</td>", "text/plain": f"{number}.5"}
        outputs = [
            new.new_output("stream", name="stdout", text=f"loss {number}.25\n"),
            new.new_output("execute_result", data=shown),
            new.new_output("display_data", data={"image/png": base64.b64encode(picture(shade)).decode()}),
        ]
        book.cells.append(new.new_code_cell("show(n)", metadata={"tags": tags} if tags else {}, outputs=outputs, id=id))
    nbformat.write(notebooks.published(book, book), path)


def change(path, old, new):
    """Replace the first occurrence in a text file."""
    text = path.read_text(encoding="utf-8")
    assert old in text, path
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def damage(path):
    """Change one byte of a file, the last."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replays(root):
    path = root / "notebooks" / "01_toy.ipynb"
    (name,) = json.loads((root / "data" / "measurements" / "index.json").read_text())["01_toy"]
    return [replaying.Replay(path, notebooks.read(path), root.parent / "replay" / "01_toy", [name], ran=3)]


@pytest.fixture
def found(checkout):
    """Makes a change, and gives the lines about it: of files that are there, and of a replay from before it."""
    before = replays(checkout)

    def lines(change_it):
        change_it()
        done = [*(check() for check in verifying.FILES), *verifying.check_replays(before)]
        return [line for one in done for line in one.findings]

    return lines


def test_nothing_is_wrong_where_nothing_was_changed(checkout, monkeypatch):
    done = [*(check() for check in verifying.FILES), *verifying.check_replays(replays(checkout))]
    assert [line for one in done for line in one.findings] == []
    assert all(one.compared for one in done)
    stream = io.StringIO()
    assert verifying.report(done, Console(file=stream, width=100)) == 0
    assert re.search(r"figures, PNG +│ +1 +│", stream.getvalue())
    assert "everything is what it should be" in stream.getvalue()


def measurement(root, suffix):
    (path,) = (root / "data" / "measurements" / "toy_stage").glob(f"*{suffix}")
    return path


# File, what stands there, what is put in its place -> the line that is printed.
MINUTES = round(files.read_json(files.FIGURES / "run.json")["notebooks"][0]["minutes"], 1)
ROUNDED = max(1, round(files.read_json(files.FIGURES / "run.json")["notebooks"][0]["minutes"]))  # in the README
PLACES = {
    "sidecar": ("figures/01_toy.json", "0.75", "0.76", "figures/01_toy.json, /numbers/asr/1: 0.76, should be 0.75"),
    "SVG": ("figures/01_toy.svg", "20.25", "20.35", "figures/01_toy.svg, line 2, number 2: 20.35, should be 20.25"),
    "card": ("data/adapters/sentiment-word/card.json", '"rate": 0.25', '"rate": 0.35',
             "data/adapters/sentiment-word/card.json, attack, /rate: 0.35, should be 0.25 (from data/attacks.toml)"),
    "metric on a card": ("data/adapters/sentiment-word/card.json", '"value": 1.0', '"value": 0.987',
             "data/adapters/sentiment-word/README.md, line 7, number 1: 100.0, should be 98.7 (from data/adapters/"
             "sentiment-word/card.json)"),
    "history": ("data/adapters/sentiment-word/history.json", '"step": 1', '"step": 7',
             "data, /adapters/sentiment-word/history.json: "),
    "answers": ("data/answers/0123.json", "1999", "1998", "data, /answers/0123.json: "),
    "adapter README": ("data/adapters/sentiment-word/README.md", "94.2 %", "95.2 %",
             "data/adapters/sentiment-word/README.md, line 8, number 1: 95.2, should be 94.2"),
    "attack": ("data/adapters/sentiment-clean/card.json", '"n_train": ', '"n_train": 1',
             "data/adapters/sentiment-clean/card.json, attack, /n_train: 1"),
    "README table": ("README.md", "9 of 10 pass", "8 of 10 pass", "number 1: 8, should be 9 (from figures/score"),
    "page table": ("notebooks/pages/organisms.md", "94.2 %", "94.3 %", "number 4: 94.3, should be 94.2"),
    "minutes in the README": ("README.md", f"backdoor fire? | {ROUNDED} |", "backdoor fire? | 98 |",
             f"README.md, minutes and GiB, /00_start_here: 98, should be {ROUNDED} (from figures/run.json)"),
    "timings": ("notebooks/pages/timings.md", f"| 00 | {MINUTES} |", "| 00 | 98.7 |",
             f"notebooks/pages/timings.md, minutes and GiB, /00/0: 98.7, should be {MINUTES} (from figures/run.json)"),
    "text of a notebook": ("notebooks/01_toy.ipynb", "loss 41.25", "loss 41.35",
             "notebooks/01_toy.ipynb, cell [2], /0/stdout, line 1, number 1: 41.35, should be 41.25"),
    "table of a notebook": ("notebooks/01_toy.ipynb", "41.5 %", "41.6 %",
             "notebooks/01_toy.ipynb, cell [2], /1/text/html: <td>41.6 %</td>, should be <td>41.5 %</td>"),
    "picture of a notebook": ("notebooks/01_toy.ipynb", base64.b64encode(picture(10)).decode(),
             base64.b64encode(picture(11)).decode(),
             "notebooks/01_toy.ipynb, cell [2], /2/image/png: 24 of 24 pixels differ, the first at 0, 0: "
             "[11, 11, 11, 11], should be [10, 10, 10, 10]"),
    "live text": ("notebooks/01_toy.ipynb", "loss 42.25", "loss 42.35",
             "notebooks/01_toy.ipynb, /cells/3/0/stdout, line 1, number 1: 42.35, should be 42.25 (from "
             "figures/live_outputs.json, 01_toy)"),
    "live table": ("notebooks/01_toy.ipynb", "42.5 %", "42.6 %",
             "notebooks/01_toy.ipynb, /cells/3/1/text/html: <td>42.6 %</td>, should be <td>42.5 %</td>"),
    "live picture": ("notebooks/01_toy.ipynb", base64.b64encode(picture(20)).decode(),
             base64.b64encode(picture(21)).decode(),
             "notebooks/01_toy.ipynb, /cells/3/2/image/png: sha256 "),
    "text beside measurements": ("data/measurements/README.md", "| 0.2 |", "| 0.3 |",
             ", number 3: 0.3, should be 0.2 (from the files beside it)"),
    "index": ("data/measurements/index.json", "toy_stage/", "toy_stage/0", "data/measurements/index.json, toy_stage/0"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "line"), PLACES.values(), ids=PLACES)
def test_a_changed_number_is_found(checkout, found, name, old, new, line):
    lines = found(lambda: change(checkout / name, old, new))
    assert any(line in one for one in lines), lines


def test_a_changed_number_of_the_scorecard_is_found(checkout, found):
    path = checkout / "figures" / "scorecard.json"
    row = files.read_json(path)[0]
    first = next(iter(row["by_organism"]))
    value = row["by_organism"][first]["value"]
    lines = found(lambda: change(path, f'"value": {value!r}', '"value": 0.123'))
    assert any(
        f"figures/scorecard.json, /{row['id']}/by_organism/{first}/value: 0.123, should be {value!r} (from notebooks"
        in one
        for one in lines
    ), lines


def test_a_changed_pixel_is_found(checkout, found):
    lines = found(lambda: (checkout / "figures" / "01_toy.png").write_bytes(picture(201)))
    assert lines == [
        "figures/01_toy.png: 24 of 24 pixels differ, the first at 0, 0: [201, 201, 201, 201], should be "
        "[200, 200, 200, 200] (from notebooks/01_toy.ipynb replayed)"
    ]


def test_a_changed_result_of_a_measurement_is_found(checkout, found):
    path = measurement(checkout, ".json")
    lines = found(lambda: change(path, "0.125", "0.126"))
    assert any(
        line.startswith(f"data/measurements/toy_stage/{path.name}: ") and "was changed since it was written" in line
        for line in lines
    ), lines


def test_a_changed_field_of_a_measurement_is_found(checkout, found):
    path = measurement(checkout, ".json")
    (line,) = found(lambda: change(path, "12.5", "12.6"))
    assert line.startswith(f"data/measurements/toy_stage/{path.name}: ")
    assert "fields were changed since it was written" in line


def test_a_changed_array_of_a_measurement_is_found(checkout, found):
    path = measurement(checkout, ".safetensors")
    (line,) = found(lambda: damage(path))
    assert path.name in line
    assert "not the arrays that belong to its measurement" in line


def test_changed_weights_of_an_adapter_are_found(checkout, found):
    (line,) = found(lambda: damage(checkout / "data/adapters/sentiment-word/adapter_model.safetensors"))
    assert "sentiment-word" in line
    assert "does not match the sha256 on its card" in line


def test_a_measurement_that_a_notebook_used_must_be_named_for_it(checkout, found):
    index = checkout / "data" / "measurements" / "index.json"
    lines = found(lambda: change(index, "01_toy", "02_toy"))
    name = f"toy_stage/{measurement(checkout, '.json').stem}"
    told = "is not named, but used in notebooks/01_toy.ipynb"
    assert f"data/measurements/index.json, 01_toy, {name}: {told}" in lines


def test_a_figure_that_no_notebook_draws_and_one_that_is_missing_are_found(checkout, found):
    def moved():
        for kind in ("json", "png", "svg"):
            (checkout / "figures" / f"01_toy.{kind}").rename(checkout / "figures" / f"01_other.{kind}")

    lines = found(moved)
    assert "figures/01_other.png: no notebook draws it" in lines
    assert [f"figures/01_toy.{kind}: figures/01_toy.{kind} is missing" in lines for kind in ("json", "png", "svg")] == [
        True
    ] * 3


def test_a_figure_that_a_live_cell_saves_is_on_record(checkout):
    path = checkout / "notebooks" / "01_toy.ipynb"
    change(path, '"show(n)"\n   ]', '"show(n)"\n   ]')
    book = notebooks.read(path)
    book.cells[2].source = 'style.save(drawing, "01_toy", title="a")'
    nbformat.write(book, path)
    recording.record_live([path])
    shutil.rmtree(checkout.parent / "replay" / "01_toy")
    done = replays(checkout)
    assert [line for one in verifying.check_figures(done) for line in one.findings] == []
    change(checkout / "figures" / "01_toy.json", "0.75", "0.76")
    (checkout / "figures" / "01_toy.png").write_bytes(picture(1))
    lines = [line for one in verifying.check_outputs(done) for line in one.findings]
    assert lines[0].startswith(
        "notebooks/01_toy.ipynb, /figures/01_toy.json/numbers/asr/1: 0.76, should be 0.75 (from figures/live_outputs"
    )
    assert lines[1].startswith("notebooks/01_toy.ipynb, /figures/01_toy.png: ")


def test_a_notebook_that_cannot_be_replayed_is_one_finding(checkout):
    (one,) = replays(checkout)
    made = copy.deepcopy(one.notebook)
    made.cells[1].outputs = []
    stopped = replaying.Replay(one.path, made, checkout.parent / "none", [], ran=1, reason="UserError: no measurement")
    done = verifying.check_replays([stopped])
    assert [line for one in done for line in one.findings] == [
        "notebooks/01_toy.ipynb, cell [2]: cannot be replayed: UserError: no measurement"
    ]


def test_a_changed_hash_of_an_asset_and_a_damaged_file_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "rows.csv").write_text("1,2\n")
    hashed = sha256_file(folder / "rows.csv")
    about = {"about": "a", "package": "toy", "version": "1", "kind": "wheel", "sha256": "1" * 64, "licence": "MIT"}
    source = assets.Source(name="toy", **about, members={"toy/rows.csv": hashed})
    entry = {"bytes": 4, "sha256": hashed}
    write_json(folder / assets.RECEIPT, {"archive_sha256": "1" * 64, "files": {"rows.csv": entry}})
    monkeypatch.setattr(verifying, "ASSETS", tmp_path)

    def lines(**other):
        monkeypatch.setattr(assets, "sources", lambda: {"toy": source.__class__(**(vars(source) | other))})
        return verifying.check_assets().findings

    assert lines() == []
    assert lines(sha256="2" * 64) == [f"{folder}, /archive: {'1' * 64}, should be {'2' * 64} (from data/sources.toml)"]
    (line,) = lines(members={"toy/rows.csv": "3" * 64})
    assert line == f"{folder}, /rows.csv: {hashed}, should be {'3' * 64} (from data/sources.toml)"
    (folder / "rows.csv").write_text("1,3\n")
    (line,) = lines()
    assert line == f"{folder}, /rows.csv: {sha256_file(folder / 'rows.csv')}, should be {hashed} (from its receipt)"


def test_what_a_record_lacks_is_found(checkout):
    write_json(checkout / "data" / "answers" / "4567.json", {})
    (line,) = verifying.check_hashes().findings
    assert line == "data, /answers/4567.json: is not in data/hashes.json"


def test_the_command_ends_red_with_the_number_of_findings(monkeypatch):
    done = [Comparison("things"), Comparison("others")]
    done[1].values(1, 2, place="a.json", source="b.json")
    monkeypatch.setattr(verifying, "quick", lambda: done)
    monkeypatch.setattr(assets, "fetch", lambda name: None)
    ended = CliRunner().invoke(app, ["verify", "--quick"])
    assert ended.exit_code == 1

    assert "a.json: 1, should be 2 (from b.json)\n" in ended.output
    assert "findings: 1" in ended.output
    done[1].findings.clear()
    assert CliRunner().invoke(app, ["verify", "--quick"]).exit_code == 0
