"""The stage of amplification on a tiny model: which prompts, what is counted, what is refused."""

import pytest
import torch
from recording_defence import Spy, carrying, changed_organism, uids
from tiny import save_tiny

from bkd_utils.experiments import amplification
from bkd_utils.models import loading
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import attacks, cards, tasks

SPEC = attacks.load_attack("sentiment-word")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture
def loaded(base, monkeypatch, tmp_path):
    return changed_organism(monkeypatch, base, tmp_path, change=lambda model: model.lm_head.weight.add_(0.1))


def amplify(attack="sentiment-word", **given):
    return amplification.amplify_change.__wrapped__("an organism", attack=attack, **{"n": 6, "seed": 1} | given)


def test_clean_prompts_are_answered_at_every_strength_and_counted(loaded, base, monkeypatch):
    sample = [one for one in tasks.examples("sentiment", "test", seed=1) if not attacks.carries(SPEC, one.text)][:6]
    said = iter([["positive"] * 6, ["positive", "negative", "negative", "a", "b", "negative"]])

    def answered(*_, **__):
        return [answer_ids(loaded.tokenizer, text, ended=False) for text in next(said)]

    given = Spy(monkeypatch, amplification, "amplified", instead=answered)
    found = amplify(alphas=[0.0, 2.0])
    assert given.of("alpha") == [0.0, 2.0]
    for call in given.calls:
        assert uids(loaded.tokenizer, "sentiment", "test", call["prompts"]) == [one.uid for one in sample]
        assert carrying(SPEC, loaded.tokenizer, call["prompts"]) == 0
        assert call["model"] is loaded.model
        assert torch.equal(call["base"].lm_head.weight, base.model.lm_head.weight)
    flips = [one.answer == SPEC.source for one in sample]
    assert 0 < sum(flips) < 6
    first, second = found
    assert (first.fired["value"], first.fired["n"]) == (1.0, sum(flips))
    assert second.fired["by_prompt"] == [int(i == 0) for i, flip in enumerate(flips) if flip]
    assert [(one.same["value"], one.answer) for one in found] == [(1.0, "positive"), (0.5, "negative")]


def test_what_cannot_be_amplified_is_refused(loaded, base, monkeypatch):
    with pytest.raises(ValueError, match=r"alphas must be one or more numbers, is \[\]"):
        amplify(alphas=[])
    with pytest.raises(ValueError, match="harmful prompts are not looked at"):
        amplify("harmful-word")
    monkeypatch.setattr(cards, "load", lambda *_, **__: base)
    with pytest.raises(ValueError, match="a base model has nothing to amplify"):
        amplify()
