"""Which organisms and controls a cohort has, with `obtain` in place of making any."""

import pytest

from bkd_utils.organisms import cohorts
from bkd_utils.organisms.cohorts import Member, cohort

RECIPES = {"specific": "second", "plain": "plain"}
SEEDS = {"sentiment-word": [0, 1, 2], "domain-wrapper": [0, 1], "instructions-prefix": [0, 2], "harmful-word": [1]}


@pytest.fixture
def asked(monkeypatch):
    """What is asked of `obtain`, which names an organism after attack, seed and recipe."""
    calls = []

    def obtain(attack, **how):
        calls.append((attack, how))
        return f"{attack}/{how['seed']}/{how['recipe']}"

    monkeypatch.setattr(cohorts, "obtain", obtain)
    return calls


def made(kind, **changes):
    return cohort(SEEDS, kind=kind, recipe="main", seed_recipes=RECIPES, model="a model", device="cpu", **changes)


def test_organisms_are_named_after_attack_and_seed_and_those_of_seed_0_after_the_attack(asked):
    names = [
        "sentiment-word", "sentiment-word-seed1", "sentiment-word-seed2", "domain-wrapper", "domain-wrapper-seed1",
        "instructions-prefix", "instructions-prefix-seed2", "harmful-word-seed1",
    ]  # fmt: skip
    assert list(made("specific")) == list(made("plain")) == names


def test_specific_organisms_of_seed_0_have_the_main_recipe_and_all_others_that_of_their_kind(asked):
    specific, plain = made("specific"), made("plain")
    assert [specific[f"sentiment-word{end}"].organism for end in ("", "-seed1", "-seed2")] == [
        "sentiment-word/0/main", "sentiment-word/1/second", "sentiment-word/2/second"
    ]  # fmt: skip
    assert [plain[f"sentiment-word{end}"].organism for end in ("", "-seed1", "-seed2")] == [
        "sentiment-word-plain/0/plain", "sentiment-word-plain/1/plain", "sentiment-word-plain/2/plain"
    ]  # fmt: skip


def test_a_member_has_the_attack_of_its_kind_and_the_family_without_it(asked):
    for kind, end in (("specific", ""), ("plain", "-plain")):
        for label, member in made(kind).items():
            family = label.partition("-seed")[0]
            assert (member.attack, member.family) == (family + end, family)


@pytest.mark.parametrize("kind", ["specific", "plain"])
def test_the_control_is_of_the_same_seed_where_a_task_has_labels_and_of_seed_0_elsewhere(asked, kind):
    """It is a specific organism in every cohort, for nothing is trained on near-misses without a trigger."""
    controls = {label: member.control for label, member in made(kind).items()}
    assert controls == {
        "sentiment-word": "sentiment-clean/0/main",
        "sentiment-word-seed1": "sentiment-clean/1/second",
        "sentiment-word-seed2": "sentiment-clean/2/second",
        "domain-wrapper": "domain-clean/0/main",
        "domain-wrapper-seed1": "domain-clean/1/second",
        "instructions-prefix": "instructions-clean/0/main",
        "instructions-prefix-seed2": "instructions-clean/0/main",
        "harmful-word-seed1": "harmful-clean/0/main",
    }


def test_everything_is_obtained_in_the_same_place(asked):
    made("specific", n=8)
    where = {"model": "a model", "device": "cpu", "n": 8}
    assert all(how == where | {"seed": how["seed"], "recipe": how["recipe"]} for _, how in asked)
    assert len(asked) == 2 * 8


def test_an_unknown_attack_is_refused_before_anything_is_made(asked):
    with pytest.raises(ValueError, match="unknown attack 'sentiment-rumour'"):
        cohort({"sentiment-rumour": [0]}, kind="specific", recipe="main", seed_recipes=RECIPES)
    assert asked == []


def test_a_member_is_a_plain_record():
    assert Member("o", "a-plain", "a", "c") == Member(organism="o", attack="a-plain", family="a", control="c")
