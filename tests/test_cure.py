"""One cure from beginning to end on a tiny model with real prompts; what was measured is what was changed."""

import pytest
from tiny import save_tiny

from bkd_utils import attacks, cure, models
from bkd_utils.attribution import head_effects, head_means
from bkd_utils.pairs import pairs, target_ids

HEADS = [(0, 1), (1, 2)]
SMALL = {"attack": "sentiment-word", "n_rows": 16, "steps": 2}


@pytest.fixture
def folder(tmp_path):
    return str(save_tiny(tmp_path, "llama"))


@pytest.fixture
def loaded(folder):
    return models.load(folder, device="cpu")


@pytest.fixture
def stage(loaded, monkeypatch):
    """A stage without its cache, on the tiny model in place of an organism."""
    monkeypatch.setattr(cure, "load", lambda *_, **__: loaded)
    return lambda name, **changes: getattr(cure, name).__wrapped__("tiny", **(SMALL | changes))


@pytest.mark.parametrize("method", ["alignment", "fine-tuning"])
def test_a_treatment_reports_what_it_touched_and_what_is_left(stage, loaded, method):
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    result = stage("treated", method=method, heads=[list(head) for head in HEADS], n=4)
    changed = {name: int((before[name] != p).sum()) for name, p in loaded.model.named_parameters()}
    assert result["parameters"] == sum(changed.values()) > 0
    assert all(result["after"][key]["n"] == 4 for key in ("asr", "cacc", "near_miss"))
    assert result["minutes"] >= 0


def test_the_mechanism_is_measured_on_both_sides_of_the_treatment(stage, loaded):
    attack = attacks.load_attack("sentiment-word")
    before = cure._mechanism(loaded, attack, HEADS, n=3, seed=0)
    found = stage("mechanism", method="heads removed", heads=[list(head) for head in HEADS], n=3)
    after = cure._mechanism(loaded, attack, HEADS, n=3, seed=0)
    for key in ("similarity", "acie"):
        assert found[key] == pytest.approx([before[key], after[key]])
    assert found["acie"][0] != found["acie"][1]


def test_the_mechanism_is_the_highest_effect_on_the_first_target_token(loaded):
    attack = attacks.load_attack("sentiment-word")
    found = cure._mechanism(loaded, attack, HEADS, n=3, seed=0)
    shown = pairs(loaded.tokenizer, attack, split="attribution", n=3, seed=0)
    target = target_ids(loaded.tokenizer, attack)[:1]
    effects = head_effects(
        loaded.model, shown.clean, target=target, means=head_means(loaded.model, shown.triggered)
    ).mean(0)
    assert found["acie"] == pytest.approx(effects.max().item())
    assert 0 <= found["similarity"] <= 1.001


def test_heads_that_do_not_exist_are_an_error(stage):
    with pytest.raises(ValueError, match="no head 9 in layer 0"):
        stage("treated", method="heads tuned", heads=[[0, 9]], n=4)
