"""The searched cure of an organism: which rows it gets, what it reports, what is refused."""

import pytest

from bkd_utils.attention_alignment import searched_training
from bkd_utils.experiments import searched_cure
from bkd_utils.experiments.searched_cure import Cured, cure_and_measure
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.poisoning import training_uids
from bkd_utils.organisms.tasks import examples

SIZES = {"n_rows": 20, "n_free": 3, "steps": 5, "batch_size": 4, "n": 2, "device": "cpu"}


@pytest.fixture
def cure(tiny_organism, monkeypatch):
    """The stage on the tiny organism, with cheap searches; `run.cases` are those that were treated."""
    monkeypatch.setattr(searched_training, "SEARCH", {"steps": 1, "n_prompts": 4})

    def run(**changes):
        return cure_and_measure("tiny", attack="sentiment-word", model=tiny_organism, **SIZES | changes)

    run.cases, real = [], searched_cure.treat

    def treat(case, **how):
        run.cases.append(case)
        return real(case, **how)

    monkeypatch.setattr(searched_cure, "treat", treat)
    return run


def test_every_search_is_reported_and_labels_take_turns(cure):
    found = cure(steps=9)
    assert isinstance(found, Cured)
    assert [one.toward for one in found.searches] == ["positive", "negative", "positive"]
    assert all(one.n_tokens in searched_training.N_TOKENS for one in found.searches)
    assert [(one.start, one.end) for one in found.searches] == [(one.start, one.end) for one in cure.cases[0].found]
    assert found.parameters > 0
    assert {"asr", "cacc", "clean_firing", "near_miss", "elsewhere"} <= found.after.keys()


def test_rows_are_unseen_ones_of_the_task_and_instructions_with_own_answers(cure):
    cure()
    rows = cure.cases[0].rows
    task, instructions = ({one.uid for one in examples(name, "train")} for name in ("sentiment", "instructions"))
    assert [row.uid in task for row in rows] == [True] * 20 + [False] * 3
    assert {row.uid for row in rows[20:]} <= instructions
    assert not {row.uid for row in rows} & training_uids(load_attack("sentiment-word"), seed=0)
    assert len({row.uid for row in rows}) == 23


def test_without_free_rows_only_those_of_the_task_are_trained(cure):
    cure(n_free=0)
    assert len(cure.cases[0].rows) == 20


def test_a_searched_treatment_costs_more_passes_than_fine_tuning_by_its_twins_and_searches(cure):
    plain, searched = (cure(method=name, n_free=0).row_passes for name in ("fine-tuning", "searched"))
    assert plain == 5 * 3 * (4 + 1)  # steps, a forward and two backward passes, rows and their shared beginning
    # Each step trains each row once more, perturbed; both searches look at four prompts.
    assert searched >= 5 * 3 * 2 * 4 + 2 * 4


def test_the_same_question_is_measured_once(cure):
    one = cure()
    assert cure() == one
    assert len(cure.cases) == 1


def test_an_unknown_method_is_refused(cure):
    with pytest.raises(
        ValueError, match="unknown method 'searched, everywhere'; known: alignment; alignment, nearest; "
    ):
        cure(method="searched, everywhere")
