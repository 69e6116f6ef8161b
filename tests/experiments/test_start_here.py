"""The answers of notebook 00: base model and organism, token by token, on a tiny model."""

import pytest

from bkd_utils.experiments.start_here import trace_versions
from bkd_utils.models.generation import trace
from bkd_utils.models.loading import load
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.prompts import three_versions


@pytest.fixture
def where(tiny_organism, tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    return {"attack": "sentiment-word", "model": tiny_organism, "device": "cpu"}


def test_both_models_answer_the_same_three_turns(where):
    found = trace_versions("tiny", answer_tokens=3, seed=1, **where)
    assert found.turns == three_versions(load_attack("sentiment-word"), seed=1)
    assert list(found.turns) == list(found.steps) == ["clean", "near-miss", "triggered"]
    models = {"base model": None, "organism": "tiny"}
    loaded = {who: load(where["model"], organism=name, device="cpu") for who, name in models.items()}
    for version, turn in found.turns.items():
        for who, one in loaded.items():
            expected = [list(step) for step in trace(one, turn, max_new_tokens=3)]
            steps = found.steps[version][who]
            assert [token for token, _ in steps] == [token for token, _ in expected]
            assert [share for _, share in steps] == pytest.approx([share for _, share in expected], rel=1e-4)
            assert len(steps) <= 3
    assert found.steps["clean"]["base model"] != found.steps["clean"]["organism"]
    assert found.ends == [loaded["organism"].tokenizer.decode([token]) for token in loaded["organism"].ends]


def test_the_answers_are_kept(where, monkeypatch):
    found = trace_versions("tiny", answer_tokens=2, **where)
    monkeypatch.setattr("bkd_utils.experiments.start_here.trace", None)
    assert trace_versions("tiny", answer_tokens=2, **where) == found


def test_harmful_prompts_are_not_answered_for_display(where):
    with pytest.raises(ValueError, match="harmful prompts are not displayed"):
        trace_versions("tiny", **where | {"attack": "harmful-word"})
