"""Relearning on a tiny model with real prompts: same start for every count, rows that are what they say."""

import pytest
from tiny import save_tiny

from bkd_utils import attacks, models, relearn, tasks
from bkd_utils.prompts import answer_ids, decode


@pytest.fixture
def loaded(tmp_path):
    return models.load(str(save_tiny(tmp_path, "llama")), device="cpu")


@pytest.fixture
def stage(loaded, monkeypatch):
    monkeypatch.setattr(relearn, "load", lambda *_, **__: loaded)
    given = {"attack": "sentiment-word", "n_rows": 16, "steps": 2}
    return lambda **changes: relearn.relearned.__wrapped__("tiny", **(given | changes))


def test_relearning_starts_from_the_same_weights_for_every_count(stage, loaded):
    """The same count twice gives the same number; the untreated model is what is fine-tuned if there is no method."""
    found = stage(method=None, counts=[2, 0, 2], n=4)
    assert [entry["poisoned"] for entry in found] == [2, 0, 2]
    assert found[0] == found[2]
    assert all(entry[key]["n"] == 4 for entry in found for key in ("asr", "clean firing"))


def test_poisoned_rows_are_triggered_training_prompts_with_the_target(loaded):
    attack = attacks.load_attack("sentiment-word")
    rows = relearn.poisoned_rows(loaded, attack, n=3, seed=0)
    train = {example.uid: example for example in tasks.examples("sentiment", "train", seed=0)}
    for row in rows:
        assert attack.flips(train[row.uid])
        assert attacks.carries(attack, decode(loaded.tokenizer, list(row.prompt)))
        assert list(row.answer) == answer_ids(loaded.tokenizer, attack.target)


def test_no_rows_change_nothing(stage, loaded):
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    stage(method=None, counts=[0], n=2)
    assert all(bool((before[name] == parameter).all()) for name, parameter in loaded.model.named_parameters())
