"""Which heads carry a backdoor: at which token, with whose means, on which prompts, and with which sign."""

import pytest
import torch
from recording_defence import Spy, carrying, split_uids, uids
from tiny import save_tiny

from bkd_utils.backdoor_attribution.attribution import head_means
from bkd_utils.backdoor_attribution.log_odds import head_log_odds
from bkd_utils.experiments import head_truth
from bkd_utils.experiments.head_truth import cut, trigger_tails
from bkd_utils.models import loading
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import cards
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.prompts import prompt_versions, target_ids

SPEC = load_attack("sentiment-word")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture
def judge(loaded, monkeypatch):
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    return lambda attack="sentiment-word", **sizes: head_truth.judge_heads.__wrapped__("tiny", attack=attack, **sizes)


def test_the_trigger_ends_where_prompts_begin_to_be_the_same_again(loaded):
    assert trigger_tails([[1, 2, 3, 4]], [[1, 9, 8, 3, 4]]) == [3]
    assert cut([[1, 9, 8, 3, 4]], [3]) == [[1, 9, 8]]
    shown = prompt_versions(loaded.tokenizer, SPEC, split="attribution", n=8, seed=0)
    ends = cut(shown.triggered, trigger_tails(shown.clean, shown.triggered))
    assert all(loaded.tokenizer.decode(ids).endswith(" cf") for ids in ends)


def test_effects_are_those_of_other_prompts_means_at_both_places(judge, loaded):
    found = judge(n=3, n_means=6)
    shown = prompt_versions(loaded.tokenizer, SPEC, split="attribution", n=3, seed=0)
    others = prompt_versions(loaded.tokenizer, SPEC, split="attribution", n=6, seed=0, skip=3)
    tails, at = (trigger_tails(one.clean, one.triggered) for one in (shown, others))
    given = {
        "target": target_ids(loaded.tokenizer, SPEC)[0],
        "right": [answer_ids(loaded.tokenizer, "negative")[0]] * 3,
    }
    for place, mine, theirs in (("last token", [1] * 3, [1] * 6), ("trigger", tails, at)):
        means = head_means(loaded.model, cut(others.triggered, theirs))
        gained, quiet = head_log_odds(loaded.model, shown.clean, tails=mine, means=means, **given)
        assert torch.allclose(torch.tensor(found.sufficiency[place]), gained.mean(0), atol=1e-5)
        assert found.clean["value"] == pytest.approx(quiet.mean().item(), abs=1e-4)
    means = head_means(loaded.model, cut(others.clean, at))
    lost, firing = head_log_odds(loaded.model, shown.triggered, tails=tails, means=means, **given)
    assert torch.allclose(torch.tensor(found.necessity["trigger"]), -lost.mean(0), atol=1e-5)
    assert found.triggered["value"] == pytest.approx(firing.mean().item(), abs=1e-4)
    assert found.sufficiency["trigger"] != found.sufficiency["last token"]


def test_the_clean_mean_of_the_last_token_is_of_all_labels_and_of_other_prompts(judge, loaded, monkeypatch):
    seen = Spy(monkeypatch, head_truth, "head_means")
    scored = Spy(monkeypatch, head_truth, "head_log_odds")
    found = judge(n=4, n_means=8)
    mixed = uids(loaded.tokenizer, "sentiment", "attribution", seen.of("prompts")[1])
    gold = {one.uid: one.answer for one in head_truth.tasks.examples("sentiment", "attribution")}
    assert sorted(gold[uid] for uid in mixed).count("positive") in (3, 4, 5, 6)
    assert carrying(SPEC, loaded.tokenizer, seen.of("prompts")[1]) == 0
    clean = uids(loaded.tokenizer, "sentiment", "attribution", scored.of("prompts")[0])
    assert not set(mixed) & set(clean)
    assert set(clean) <= split_uids("sentiment", "attribution")
    lost, _ = scored.results[1]
    assert torch.allclose(torch.tensor(found.necessity["last token"]), -lost.mean(0), atol=1e-6)


def test_without_a_gold_answer_the_right_one_is_the_models_own_to_the_clean_twin(judge, loaded, monkeypatch):
    scored, attack = Spy(monkeypatch, head_truth, "head_log_odds"), load_attack("instructions-prefix")
    judge("instructions-prefix", n=2, n_means=3)
    shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=2, seed=0)
    with torch.no_grad():
        own = [loaded.model(torch.tensor([ids])).logits[0, -1].argmax().item() for ids in shown.clean]
    assert scored.of("right") == [own] * 4
