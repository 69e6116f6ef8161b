"""A report whose numbers, words or pictures are not those that were measured is found, and nothing is loaded for it."""

import shutil
from types import SimpleNamespace

import architecture_table
import pytest
from own_reports import SMALL, run, work_below, write_table
from patching import everywhere
from typer.testing import CliRunner

from bkd_utils.__main__ import app
from bkd_utils.common import files
from bkd_utils.common.files import read_json, write_json
from bkd_utils.experiments import own_chain, own_model
from bkd_utils.experiments.own_question import Asked, own_attack
from bkd_utils.models import loading
from bkd_utils.reports import own_page
from bkd_utils.running import verifying
from bkd_utils.running.verifying_reports import check_own_notebook, check_reports


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A work folder with two reports, one with an organism trained for it and one about a model of unknown trigger."""
    home = tmp_path_factory.mktemp("reports")
    with work_below(home):
        data, model = write_table(home / "mine.csv"), architecture_table.folder("llama", home / "llama")
        attack = own_attack(trigger="word:cf", target="good", data=data)
        how = {"sizes": SMALL, "device": "cpu"}
        asked = {"trained": Asked(str(model), attack.task, attack, train=True, recipe="smoke", **how)}
        asked["stranger"] = Asked(str(model), str(data), cured=home / "stranger" / "cured", **how)
        for name, one in asked.items():
            own_page.write(one, list(run(one).values()), folder=home / name, minutes=1.0)
        yield SimpleNamespace(home=home, asked=asked)


@pytest.fixture
def report(written, tmp_path, monkeypatch):
    """A copy of a report that may be changed; no model may be loaded."""
    for module in (loading, own_chain, own_model):
        monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    return lambda name="trained": shutil.copytree(written.home / name, tmp_path / name)


@pytest.mark.parametrize("name", ["trained", "stranger"])
def test_a_report_that_nobody_changed_is_right(name, report):
    done = check_reports([report(name)])
    assert done.findings == []
    assert done.compared > {"trained": 150, "stranger": 60}[name]


def test_what_was_asked_can_be_read_again(written):
    for one in written.asked.values():
        assert Asked.from_json(one.to_json()) == one
    known = read_json(written.home / "trained" / "question.json")
    assert known["asked"]["organism"].startswith("own-attack-")
    assert set(known["able"].values()) == {""}


def changed(folder, path, value):
    numbers = read_json(folder / "report.json")
    inside = numbers["sections"]
    *before, last = path
    for part in before:
        inside = inside[part]
    assert inside[last] != value
    inside[last] = value
    write_json(folder / "report.json", numbers)


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ((1, "numbers", 0, "value"), 0.9871, "/sections/1/numbers/0/value: 0.9871, should be"),
        ((4, "numbers", 2, "low"), -1.0, "/sections/4/numbers/2/low: -1.0, should be"),
        ((8, "told"), "Cured.", "/sections/8/told: Cured., should be Each has"),
        ((9, "skipped"), "no time", "/sections/9/skipped: no time, should be None"),
        ((1, "numbers", 0, "shipped", "high"), 0.5, "/sections/1/numbers/0/shipped/high: 0.5, should be"),
    ],
)
def test_a_changed_number_or_word_is_found_in_the_numbers_and_on_the_page(path, value, place, report):
    folder = report()
    changed(folder, path, value)
    found = check_reports([folder]).findings
    assert f"report.json, {place}" in found[0]
    assert any("index.html" in line for line in found[1:]) or value == -1.0


def test_a_changed_page_is_found(report):
    folder = report()
    page = folder / "index.html"
    text = page.read_text()
    before, _, after = text.partition("<td>6</td>")
    page.write_text(f"{before}<td>60</td>{after}")
    (line,) = check_reports([folder]).findings
    assert "index.html, line" in line
    assert "60, should be 6" in line
    pictures = own_page.pictures_of(text)
    assert len(pictures) > 6
    page.write_text(own_page.page(read_json(folder / "report.json"), pictures | {"heads": pictures["probe"]}))
    (line,) = check_reports([folder]).findings
    assert line.startswith("pictures of ")
    assert "trained, /heads: " in line
    del pictures["probe"]
    page.write_text(own_page.page(read_json(folder / "report.json"), pictures))
    assert "/probe: is missing" in " ".join(check_reports([folder]).findings)


def test_a_measurement_that_is_gone_is_no_reason_to_measure(written, report, tmp_path, monkeypatch):
    shutil.copytree(written.home / "work" / "measurements", tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / "steer_organism")
    monkeypatch.setenv("BKD_KEEP", str(tmp_path / "kept"))
    found = " ".join(check_reports([report()]).findings)
    assert "/sections/5/skipped: None, should be no measurement of steer_organism ships" in found
    shutil.rmtree(written.home / "stranger" / "cured")
    assert "holds no cure of this model" in " ".join(check_reports([report("stranger")]).findings)


def test_a_report_of_an_earlier_version_of_the_code_is_still_right(report, monkeypatch):
    monkeypatch.setattr("bkd_utils.common.cache.installed_versions", lambda: {"torch": "9"})
    assert check_reports([report()]).findings == []


@pytest.mark.parametrize("file", ["report.json", "index.html", "question.json"])
def test_a_broken_or_missing_file_is_one_finding_and_others_go_on(file, report):
    folder, other = report(), report("stranger")
    (folder / file).unlink()
    (line,) = check_reports([folder]).findings
    assert f"{file} is missing" in line
    (folder / file).write_text("{}" if file != "index.html" else "")
    done = check_reports([folder, other])
    assert done.findings
    assert done.compared > 50


def test_verify_takes_the_reports_below_reports_and_one_that_is_named(report, tmp_path, monkeypatch):
    everywhere(monkeypatch, "ROOT", tmp_path)
    folder = report()
    shutil.copytree(folder, tmp_path / "reports" / "mine")
    (tmp_path / "reports" / "begun").mkdir()

    async def nothing():
        return []

    monkeypatch.setattr(verifying, "_quick", nothing)
    (done,) = verifying.quick()
    assert (done.kind, done.findings, done.compared > 150) == ("reports", [], True)
    given = ["verify", "--report", str(folder)]
    assert CliRunner().invoke(app, given).exit_code == 0
    changed(folder, (1, "numbers", 0, "value"), 0.9871)
    answer = CliRunner().invoke(app, given)
    assert (answer.exit_code, "0.9871, should be" in answer.output) == (1, True)
    assert CliRunner().invoke(app, ["verify", "--report", str(tmp_path / "none")]).exit_code == 2


def test_notebook_08_shows_the_numbers_beside_its_figure(tmp_path, monkeypatch):
    for name in ("FIGURES", "NOTEBOOKS"):
        (tmp_path / name).mkdir()
    shutil.copy(files.NOTEBOOKS / "08_your_own_model.ipynb", tmp_path / "NOTEBOOKS")
    path = tmp_path / "FIGURES" / "08_own_heads.json"
    shutil.copy(files.FIGURES / path.name, path)
    everywhere(monkeypatch, "FIGURES", tmp_path / "FIGURES")
    everywhere(monkeypatch, "NOTEBOOKS", tmp_path / "NOTEBOOKS")
    shutil.copy(files.ROOT / "figures" / "scorecard.json", tmp_path / "FIGURES")
    monkeypatch.delenv("BKD_SHIPPED")  # with that of the tests there is nothing to stand beside
    done = check_own_notebook()
    assert done.findings == []
    assert done.compared > 100
    card = read_json(path)
    card["numbers"]["cure"][0]["n"] += 1
    card["numbers"]["attack"][0]["shipped"]["low"] -= 0.1
    write_json(path, card)
    first, second, third = check_own_notebook().findings
    assert "attack, ASR, triggered prompts, /low: 0.7" in first
    assert "ASR, triggered prompts: no table of the notebook has ['100.0 %', '64', '94.3 to 100.0', '78.8 to" in second
    assert "cure, ASR before: no table of the notebook has ['100.0 %', '65'" in third
