"""One cure from beginning to end on a tiny model with real prompts; what was measured is what was changed."""

import pytest
from tiny import save_tiny

from bkd_utils import attacks, cure, models
from bkd_utils.alignment import head_slices
from bkd_utils.attribution import head_effects, head_means
from bkd_utils.pairs import pairs, target_ids

HEADS = [(0, 1), (1, 2)]
SMALL = {"attack": "sentiment-word", "n_rows": 8, "steps": 2, "n": 4, "n_attribution": 3, "learning_rate": 1e-2}


@pytest.fixture
def folder(tmp_path):
    return str(save_tiny(tmp_path, "llama"))


@pytest.fixture
def loaded(folder):
    return models.load(folder, device="cpu")


@pytest.fixture
def cured(loaded, monkeypatch):
    """The stage without its cache, on the tiny model in place of an organism."""
    monkeypatch.setattr(cure, "load", lambda *_, **__: loaded)
    return lambda **changes: cure.cured.__wrapped__("tiny", **(SMALL | {"heads": [list(h) for h in HEADS]} | changes))


@pytest.mark.parametrize("alignment", ["none", "mean"])
def test_a_cure_reports_what_it_touched(cured, loaded, alignment):
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    result = cured(alignment=alignment)
    changed = {n: int((before[n] != p).sum()) for n, p in loaded.model.named_parameters()}
    masks = head_slices(loaded.model, HEADS, unit="KV group")
    assert result["parameters"] == sum(changed.values()) > 0
    assert {name for name, count in changed.items() if count} <= set(masks)
    assert result["heads"] == 2
    assert len(result["history"]) == 2
    assert len(result["similarity"]) == len(result["acie"]) == 2
    assert result["after"]["agreement_with_base"] <= 1
    assert all(result["after"][key]["n"] == 4 for key in ("asr", "cacc", "near_miss"))


def test_redrawn_heads_start_from_new_weights(cured, loaded):
    name = next(iter(head_slices(loaded.model, HEADS)))
    before = loaded.model.get_parameter(name).detach().clone()
    cured(alignment="none", redraw=True, learning_rate=1e-9)
    moved = (loaded.model.get_parameter(name) - before).abs()
    assert moved.max() > 1e-3


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


def test_heads_that_do_not_exist_are_an_error(cured):
    with pytest.raises(ValueError, match="no head 9 in layer 0"):
        cured(heads=[[0, 9]])
