"""Relearning on a tiny model with real prompts: same start for every count, rows that are what they say."""

import re
from dataclasses import replace

import pytest
import torch
from tiny import save_tiny

from bkd_utils.attention_alignment import head_tuning
from bkd_utils.attention_alignment.head_tuning import tune
from bkd_utils.experiments import attention_safety_alignment, head_safety
from bkd_utils.models import loading
from bkd_utils.models.generation import respond
from bkd_utils.models.loss import collate
from bkd_utils.models.tokens import answer_ids, decode
from bkd_utils.organisms import attacks, cards, evaluation, poisoning, tasks


@pytest.fixture
def loaded(tmp_path):
    return loading.load(str(save_tiny(tmp_path, "llama")), device="cpu")


@pytest.fixture
def stage(loaded, monkeypatch):
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    given = {"attack": "sentiment-word", "n_rows": 16, "steps": 2}
    return lambda **changes: attention_safety_alignment.relearn_backdoor.__wrapped__("tiny", **(given | changes))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_relearning_starts_from_the_same_weights_for_every_count(stage, loaded, monkeypatch):
    """Weights and not rates: a random model never says the target, whatever it starts from."""
    before, started, answered = weights(loaded.model), [], []

    def spied(model, *given, **named):
        started.append(weights(model))
        return tune(model, *given, **named)

    def answers(loaded, texts, **named):
        answered.append(weights(loaded.model))
        return respond(loaded, texts, **named)

    monkeypatch.setattr(attention_safety_alignment, "tune", spied)
    monkeypatch.setattr(evaluation, "respond", answers)
    found = stage(method=None, counts=[2, 0, 2], n=4)
    assert [entry.poisoned for entry in found] == [2, 0, 2]
    assert all(share["n"] == 4 for entry in found for share in (entry.asr, entry.clean_firing))
    assert len(started) == 2
    assert all(same(one, before) for one in started)
    first, none, again = answered[::2]
    assert same(none, before)
    assert same(first, again)
    assert not same(first, before)


def test_the_batch_size_is_that_of_treatment_and_relearning(stage, monkeypatch):
    sizes = []
    monkeypatch.setattr(head_tuning, "collate", lambda rows, **given: sizes.append(len(rows)) or collate(rows, **given))
    stage(method="fine-tuning", counts=[3], n=2, batch_size=5)
    assert sizes == [5, 5, 5]  # two steps of treatment, one of relearning


def test_no_clean_row_is_one_that_the_organism_was_trained_on(stage, monkeypatch):
    used, taken = [], poisoning.training_uids(attacks.load_attack("sentiment-word"), seed=0)
    monkeypatch.setattr(attention_safety_alignment, "tune", lambda model, rows, **_: used.extend(rows))
    stage(method=None, counts=[3], n=2)
    assert not taken & {row.uid for row in used if row.kind == "clean"}
    assert [row.kind for row in used] == ["poisoned"] * 3 + ["clean"] * 3
    real = head_safety.clean_rows
    monkeypatch.setattr(
        attention_safety_alignment,
        "clean_rows",
        lambda *given, **named: [replace(row, uid=min(taken)) for row in real(*given, **named)],
    )
    with pytest.raises(ValueError, match="are training examples of the organism"):
        stage(method=None, counts=[3], n=2)


@pytest.mark.parametrize("counts", [[], [4, -1]])
@pytest.mark.parametrize("method", [None, "flat heads pruned"])
def test_counts_that_are_none_or_negative_are_refused(stage, counts, method):
    with pytest.raises(ValueError, match=re.escape(f"poisoned rows, is {counts}")):
        stage(method=method, counts=counts, n=2)


def test_poisoned_rows_are_triggered_training_prompts_with_the_target(loaded):
    attack = attacks.load_attack("sentiment-word")
    rows = attention_safety_alignment.poisoned_rows(loaded, attack, n=3, seed=0)
    train = {example.uid: example for example in tasks.examples("sentiment", "train", seed=0)}
    for row in rows:
        assert attack.flips(train[row.uid])
        assert attacks.carries(attack, decode(loaded.tokenizer, list(row.prompt)))
        assert list(row.answer) == answer_ids(loaded.tokenizer, attack.target)


def test_no_rows_change_nothing(stage, loaded):
    before = weights(loaded.model)
    stage(method=None, counts=[0], n=2)
    assert same(before, weights(loaded.model))
