"""What notebooks used, as their ledgers tell it, and the closing lines made of that."""

import json

import pytest

from bkd_utils.common.spot_checks import Spot
from bkd_utils.running import ledger


def line(id, how, *, commit="c0ffee0123456789", seconds=1.0):
    return {"id": id, "how": how, "commit": commit, "seconds": seconds}


def checked(id, *, agrees=True, worst=0.0, place="level"):
    return {"how": "checked", "id": id, "agrees": agrees, "worst": worst, "place": place}


def write(path, *lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)) + end, encoding="utf-8")
    return path


def used(*lines):
    found, checks = {}, {}
    for one in lines:
        (checks if one["how"] == "checked" else found)[one["id"]] = one
    return ledger.Used(found, checks)


def test_a_ledger_is_read_by_where_results_came_from(tmp_path):
    path = write(
        tmp_path / "01.jsonl",
        line("toy/a", "shipped"),
        line("toy/b", "shipped, other code", commit="beef"),
        line("toy/c", "measured here"),
        line("toy/c", "kept here"),  # the second time that it was asked for
        line("toy/d", "kept here"),
        checked("toy/a"),
        checked("other/x", agrees=False),
    )
    found = ledger.read(path)
    assert found.shipped == ["toy/a", "toy/b"]
    assert found.stale == {"toy/b": "beef"}
    assert found.own == ["toy/c", "toy/d"]
    assert list(found.measurements) == ["toy/a", "toy/b", "toy/c", "toy/d"]
    assert [line["agrees"] for line in found.checks.values()] == [True, False]
    assert not found.finished
    ledger.finish(path)
    assert ledger.read(path).finished
    assert ledger.read(path).measurements == found.measurements


def test_no_ledger_is_an_empty_one(tmp_path):
    assert ledger.read(tmp_path / "none.jsonl") == ledger.Used()


@pytest.mark.parametrize("cut", ['{"id": "toy/b", "how": "ship', "{", '{"how": "finish'])
def test_a_line_that_a_kill_cut_off_is_left_out(cut, tmp_path):
    path = write(tmp_path / "01.jsonl", line("toy/a", "shipped"), end=f"\n{cut}")
    assert ledger.read(path) == used(line("toy/a", "shipped"))


# --- the closing lines ----------------------------------------------------------------------------------------------


def test_the_closing_line_counts_every_measurement_once(monkeypatch):
    monkeypatch.setattr(ledger, "spots", dict)
    first = used(line("toy/a", "shipped"), line("toy/b", "shipped, other code"), line("toy/c", "measured here"))
    second = used(line("toy/a", "shipped"), line("toy/d", "kept here"), checked("toy/a"))
    third = used(checked("other/x", agrees=False, worst=0.25))
    told = ledger.summary([first, second, third])
    assert told[0] == "2 shipped and used, 2 checked and 1 agreed, 1 stale, 2 measured here"
    assert ledger.summary([]) == ["0 shipped and used, 0 checked and 0 agreed, 0 stale, 0 measured here"]


def test_stale_ones_are_told_with_the_commits_they_were_measured_at():
    one = used(
        line("toy/a", "shipped, other code", commit="0123456789abcdef"),
        line("toy/b", "shipped, other code", commit="0123456789abcdef"),
        line("toy/c", "shipped, other code", commit=None),
        checked("toy/a"),
    )
    _, told = ledger.summary([one])
    assert told == (
        "stale: measured by other code (2 at 0123456789ab, 1 at no commit); "
        "python -m bkd_utils verify measures a share of them again"
    )


def test_the_largest_difference_of_all_checks_is_told_with_its_place():
    checks = [checked("toy/a", worst=0.01), checked("toy/b", worst=0.0256, place="hits.p3"), checked("toy/c")]
    _, told = ledger.summary([used(*checks, checked("toy/d", worst=None))])
    assert told == "largest difference of a check: 0.0256, toy/b at hits.p3"


def test_a_stage_that_was_used_and_not_checked_is_told_with_the_reason(monkeypatch):
    monkeypatch.setattr(ledger, "spots", lambda: {"slow": Spot(none="it takes a year"), "toy": Spot()})
    one = used(
        line("slow/a", "shipped"), line("toy/a", "shipped"), line("new/a", "shipped"), line("own/a", "kept here")
    )
    assert ledger.summary([one])[1:] == [
        "not checked: new: no spot check was run",
        "not checked: slow: it takes a year",
        "not checked: toy: no spot check was run",
    ]
    assert ledger.summary([one, used(checked("toy/z"), checked("new/z"))])[1:] == ["not checked: slow: it takes a year"]


# --- measuring everything anew --------------------------------------------------------------------------------------


@pytest.fixture
def remeasured(tmp_path):
    """A folder with measurements of two notebooks and one more, and the notebooks' ledgers."""
    for name in ("toy/a", "toy/b", "other/x"):
        for kind in ("json", "safetensors"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.{kind}").touch()
    return [
        write(tmp_path / "ledgers" / "01.jsonl", line("toy/a", "measured here")),
        write(tmp_path / "ledgers" / "02.jsonl", line("toy/a", "kept here"), line("toy/b", "measured here")),
    ]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.suffix != ".jsonl")


def test_what_notebooks_used_is_forgotten_once_all_of_them_ran_to_their_end(remeasured, tmp_path):
    for path in remeasured:
        ledger.finish(path)
    ledger.forget_finished(tmp_path, remeasured, others=True)
    assert files(tmp_path) == ["other/x.json", "other/x.safetensors"]
    ledger.forget_finished(tmp_path, remeasured, others=True)  # what is gone already is no error


def test_without_other_notebooks_everything_is_forgotten_once_all_ran_to_their_end(remeasured, tmp_path):
    folder = tmp_path / "toy"
    ledger.forget_finished(folder, remeasured, others=False)
    assert folder.is_dir()
    for path in remeasured:
        ledger.finish(path)
    ledger.forget_finished(folder, remeasured, others=False)
    assert not folder.exists()


@pytest.mark.parametrize("finished", [[], [0], [1]])
def test_nothing_is_forgotten_while_one_of_them_did_not(finished, remeasured, tmp_path):
    before = files(tmp_path)
    for number in finished:
        ledger.finish(remeasured[number])
    ledger.forget_finished(tmp_path, remeasured, others=True)
    ledger.forget_finished(tmp_path, [*remeasured, tmp_path / "ledgers" / "03.jsonl"], others=True)
    assert files(tmp_path) == before


def test_a_notebook_alone_is_forgotten_alone(remeasured, tmp_path):
    ledger.finish(remeasured[0])
    ledger.forget_finished(tmp_path, remeasured[:1], others=True)
    assert files(tmp_path) == ["other/x.json", "other/x.safetensors", "toy/b.json", "toy/b.safetensors"]
