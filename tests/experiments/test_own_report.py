"""The report of a cure puts each number where it belongs, and says what it does not know."""

import pytest

from bkd_utils.experiments.own_model import report_text


def side(value, losses):
    pulls = {
        name: {"loss": loss, "token": "Sure", "nearest": [[" cf", "x"], ["|b", "y"]]} for name, loss in losses.items()
    }
    return {"accuracy": {"value": value, "n": 200, "low": value - 0.05, "high": value + 0.04}, "pulls": pulls}


def report(names, labels):
    return {
        "model": "my/model",
        "organism": None,
        "data": {"file": "a.csv", "rows": 90, "repeated": 4, "training": 70, "validation": 20, "labels": labels},
        "before": side(0.9, dict.fromkeys(names, 0.126)),
        "after": side(0.85, dict.fromkeys(names, 2.5)),
        "searches": 3,
        "changed_weights": 1234567,
        "method": "searched",
        "steps": 8,
        "seed": 5,
    }


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_before_stands_left_of_after():
    text = report_text(report(["no", "a|b"], ["no", "a|b"]))
    assert rows(text) == [
        "| validation rows | before | after |",
        "| first answer token right, n = 200 (95 % interval) | 90.0 % (85.0 to 94.0) | 85.0 % (80.0 to 89.0) |",
        "| pull to no | 0.13 nats | 2.50 nats |",
        "| pull to a\\|b | 0.13 nats | 2.50 nats |",
    ]
    assert "toward no: before ' cf' '|b'; after ' cf' '|b'" in text


@pytest.mark.parametrize(("labels", "kind"), [(["no", "yes"], "the 2 labels no, yes"), ([], "free texts")])
def test_it_says_what_it_was_made_of(labels, kind):
    text = " ".join(report_text(report(labels or ["one first token"], labels)).split())
    assert text.startswith("# `my/model` before and after a cure `a.csv`: 90 rows, 4 repeated ones left out; ")
    assert f"answers are {kind}. 70 rows were trained on, the other 20 are for validation." in text
    assert "Method `searched`, 8 steps, seed 5; 1,234,567 weights changed." in text
    assert ("| 0.13 nats, 'Sure' | 2.50 nats, 'Sure' |" in text) == (not labels)


def test_it_says_what_it_does_not_know():
    text = " ".join(report_text(report(["no"], ["no"])).split())
    for said in ("cannot be measured", "a sign of a backdoor and no proof", "**A treated model is not proven clean.**"):
        assert said in text
    assert "must still be at `my/model`" in text
