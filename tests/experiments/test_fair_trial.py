"""The fair trial on tiny models of both kinds: whose rows, which heads, which weights at which dose, which dose."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from patching import everywhere
from recording_defence import Spy, split_uids, uids
from tiny import save_tiny, save_tiny_encoder

from bkd_utils.attention_alignment import alignment, rivals
from bkd_utils.attention_alignment.head_tuning import other_groups
from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES, surrogate
from bkd_utils.experiments import attention_safety_alignment, fair_trial, head_safety
from bkd_utils.experiments.fair_trial import check_apart, reactions, stability
from bkd_utils.models import loading
from bkd_utils.models.head_weights import groups, head_slices
from bkd_utils.models.tokens import prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.poisoning import training_uids

SPEC = load_attack("sentiment-word")
SIZES = {"n_rows": 12, "n_validation": 6, "n_flagging": 4, "n": 2, "doses": [2]}
# Robust z above 2: (0, 3), (1, 3) and (1, 2), in this order; a quarter of eight heads are two.
SCORES = torch.tensor([[0.0, 0.1, -0.1, 5.0], [0.0, 0.1, 3.0, 4.0]])
FLAGGED, TREATED = [[0, 3], [1, 3], [1, 2]], [[0, 3], [1, 3]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    made = {"llama": save_tiny(folder / "llama", "llama"), "bert": save_tiny_encoder(folder / "bert")}
    return {kind: loading.load(str(path), device="cpu") for kind, path in made.items()}


@pytest.fixture(params=["llama", "bert"])
def kind(request):
    return request.param


@pytest.fixture
def trial(saved, monkeypatch, tmp_path):
    """The stage without its cache on a tiny model; `trial.weights` are those that were measured, in this order.

    Suspicion is `SCORES`, and what is left is not measured; with `real=True` both are as they are.
    """
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    everywhere(monkeypatch, "WORK", tmp_path)

    def run(kind="llama", *, real=False, **changes):
        run.loaded = replace(saved[kind], model=copy.deepcopy(saved[kind].model))
        run.weights = []

        def what_is_left(loaded, attack, *, n, seed):
            run.weights.append(state(loaded.model))
            return attention_safety_alignment.what_is_left(loaded, attack, n=n, seed=seed) if real else {"hits": {}}

        with monkeypatch.context() as patch:
            patch.setattr(fair_trial, "what_is_left", what_is_left)
            if not real:
                patch.setattr(fair_trial, "reactions", lambda *_, **__: SCORES)
            return inspect.unwrap(fair_trial.dose_response)(run.loaded, SPEC, **(SIZES | changes))

    return run


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_stages_make_their_organism():
    for stage in (fair_trial.dose_response, fair_trial.flag_heads):
        assert list(inspect.signature(stage).parameters)[:5] == ["made", "attack", "recipe", "organism_seed", "model"]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_heads_are_found_weights_trained_and_doses_chosen_on_three_sets_of_unseen_rows(trial, monkeypatch):
    looked, tuned = Spy(monkeypatch, fair_trial, "unseen_examples"), Spy(monkeypatch, rivals, "tune")
    checked = Spy(monkeypatch, fair_trial, "accuracy")
    trial()
    trial(n_rows=20)
    sets = [
        {example.uid for example in looked.results[0]},
        {row.uid for row in checked.of("rows")[0]},
        {row.uid for row in tuned.of("rows")[0]},
    ]
    assert [len(one) for one in sets] == [4, 6, 12]
    assert len(set.union(*sets)) == 22
    assert not set.union(*sets) & (training_uids(SPEC, seed=0) | split_uids("sentiment", "attribution", "test"))
    assert all(rows == checked.of("rows")[0] for rows in checked.of("rows"))  # at both doses, with more rows, too
    assert looked.results[1] == looked.results[0]
    assert tuned.of("rows")[1][:12] == tuned.of("rows")[0]


def test_accuracy_is_of_the_weights_at_that_dose_on_the_validation_rows(trial, kind):
    found = trial(kind, doses=[3], learning_rate=0.3)
    rows = head_safety.clean_rows(trial.loaded, SPEC, n=10, seed=0)[4:]
    for dose, weights in zip(found.doses, trial.weights, strict=True):
        trial.loaded.model.load_state_dict(weights, strict=False)
        right = 0
        for row in rows:
            logits = trial.loaded.model(torch.tensor([list(row.prompt)])).logits[0]
            right += (logits if kind == "bert" else logits[-1]).argmax().item() == row.answer[0]
        assert dose.validation == right / 6


@pytest.mark.parametrize(
    ("at", "like", "told"),
    [
        (15, 5, "1 of the trained rows are among the validation rows"),
        (15, 2, "1 of the trained rows are among the rows that flag heads"),
        (5, 2, "1 of the validation rows are among the rows that flag heads"),
    ],
)
def test_a_row_in_two_sets_is_an_error(trial, monkeypatch, at, like, told):
    real = head_safety.clean_rows

    def doubled(*given, **named):
        rows = list(real(*given, **named))
        rows[at] = rows[like]
        return rows

    monkeypatch.setattr(attention_safety_alignment, "clean_rows", doubled)
    with pytest.raises(ValueError, match=told):
        trial()


def test_a_row_that_the_organism_was_trained_on_is_an_error(trial, monkeypatch):
    real, taken = head_safety.clean_rows, min(training_uids(SPEC, seed=0))
    monkeypatch.setattr(
        attention_safety_alignment,
        "clean_rows",
        lambda *a, **k: [*real(*a, **k)[:-1], replace(real(*a, **k)[0], uid=taken)],
    )
    with pytest.raises(ValueError, match="1 of the defender's 22 examples are training examples"):
        trial()


def test_a_held_out_prompt_among_the_defenders_rows_is_an_error(trial, monkeypatch):
    held_out = min(split_uids("sentiment", "test"))
    real = head_safety.clean_rows
    monkeypatch.setattr(
        attention_safety_alignment,
        "clean_rows",
        lambda *a, **k: [replace(row, uid=held_out) if i == 9 else row for i, row in enumerate(real(*a, **k))],
    )
    monkeypatch.setattr(
        attention_safety_alignment, "under_attack", lambda *_, **__: {"hits": {"asr": {held_out[:12]: 1}}}
    )
    monkeypatch.setattr(attention_safety_alignment, "elsewhere", lambda *_, **__: {})
    with pytest.raises(ValueError, match="1 of the validation rows are among the held-out prompts"):
        trial(real=True)


def test_groups_that_share_nothing_are_apart():
    check_apart({"one": ["a" * 12, "b" * 64], "other": ["c" * 64], "none": []})
    with pytest.raises(ValueError, match="1 of the one are among the other, too, the first is bbbbbbbbbbbb"):
        check_apart({"one": ["a" * 12, "b" * 64], "other": ["b" * 12]})


# --- heads ----------------------------------------------------------------------------------------------------------


def test_the_reaction_is_the_mean_over_families_of_likeness_gained_under_surrogates(saved, kind):
    loaded, task = saved[kind], tasks.load_task("sentiment")
    texts = [example.text for example in tasks.examples("sentiment", "train", n=3)]

    def likeness(texts):
        prompts = [prompt_ids(loaded.tokenizer, task.prompt(text)) for text in texts]
        return head_similarity(loaded.model, prompts, readings=["last row"])["last row"].mean(0)

    gained = []
    for family in SURROGATES:
        drawn = [surrogate(loaded.tokenizer, family=family, seed=5 + i, texts=texts) for i in (0, 1)]
        gained.append(likeness([one.apply(text, seed=5) for one in drawn for text in texts]) - likeness(texts))
    found = reactions(loaded, texts, task="sentiment", seed=5)
    torch.testing.assert_close(found, sum(gained) / 3, atol=1e-5, rtol=1e-4)


def test_a_quarter_is_treated_and_no_flagged_head_is_a_target(trial, monkeypatch, kind):
    pulls, real = [], alignment.ALIGNMENTS["mean"]
    monkeypatch.setitem(alignment.ALIGNMENTS, "mean", lambda pull: pulls.append(pull) or real(pull))
    found = trial(kind)
    assert (found.flagged, found.heads) == (FLAGGED, TREATED)
    for pull in pulls:
        assert pull.suspicious == {0: [3], 1: [3]}
        assert pull.safe == {0: [0, 1, 2], 1: [0, 1]}
    assert len(pulls) == 2


@pytest.mark.parametrize("unit", ["query head", "KV group"])
def test_the_unit_is_what_is_tuned(trial, kind, unit):
    trial(kind, unit=unit)
    before, after = trial.weights
    masks = head_slices(trial.loaded.model, [tuple(head) for head in TREATED], unit=unit)
    for name, weight in after.items():
        moved = weight != before[name]
        assert not (moved & ~masks.get(name, torch.zeros_like(moved))).any(), name
    assert {name for name in after if (after[name] != before[name]).any()} == set(masks)


def test_without_a_flagged_head_nothing_is_treated_and_the_result_says_so(trial, monkeypatch):
    monkeypatch.setattr(fair_trial, "suspicious", lambda *_, **__: [])
    for draw in (0, 1):
        found = trial(draw=draw)
        assert (found.flagged, found.heads, found.chosen) == ([], [], 0)
        assert [dose.steps for dose in found.doses] == [0]
        assert same(state(trial.loaded.model), trial.weights[0])


@pytest.mark.parametrize("unit", ["query head", "KV group"])
def test_a_draw_has_as_many_heads_in_other_units_and_all_others_as_targets(trial, monkeypatch, unit):
    pulls, real = [], alignment.ALIGNMENTS["mean"]
    monkeypatch.setitem(alignment.ALIGNMENTS, "mean", lambda pull: pulls.append(pull) or real(pull))
    size = {"n_heads": 4, "n_kv_heads": 2 if unit == "KV group" else 4}
    drawn = []
    for draw in (1, 2, 3):
        found = trial(unit=unit, draw=draw)
        assert found.flagged == FLAGGED
        drawn.append(sorted(map(tuple, found.heads)))
        assert not set(groups(drawn[-1], **size)) & set(groups(map(tuple, TREATED), **size))
        assert [layer for layer, _ in drawn[-1]] == [0, 1]
        assert {layer: set(heads) for layer, heads in pulls[-1].safe.items()} == {
            layer: {0, 1, 2, 3} - {h for at, h in drawn[-1] if at == layer} for layer in (0, 1)
        }
    given = {"n_layers": 2, **size, "n": 3, "seed": 0}
    assert drawn == [sorted(one) for one in other_groups([tuple(head) for head in TREATED], **given)]


def test_flag_heads_finds_the_heads_that_a_trial_flags(trial, saved, monkeypatch):
    found = trial(real=True, n_flagging=5)
    flag_heads = inspect.unwrap(fair_trial.flag_heads)
    assert flag_heads(saved["llama"], SPEC, n=5) == found.flagged
    other = Spy(monkeypatch, fair_trial, "reactions", instead=lambda *_, **__: SCORES)
    assert flag_heads(saved["llama"], SPEC, n=5, seed=1) == FLAGGED
    assert other.only["seed"] == 1
    prompts = [
        prompt_ids(saved["llama"].tokenizer, tasks.load_task("sentiment").prompt(t)) for t in other.only["texts"]
    ]
    assert not set(uids(saved["llama"].tokenizer, "sentiment", "train", prompts)) & training_uids(SPEC, seed=1)


def test_stability_is_the_mean_overlap_of_pairs():
    assert stability([[[0, 1], [0, 2]], [[0, 2], [0, 1]]]) == 1
    assert stability([[[0, 1], [0, 2]], [[0, 2]], [[1, 0]]]) == pytest.approx(0.5 / 3)
    with pytest.raises(ValueError, match="two or more sets of heads, got 1"):
        stability([[[0, 1]]])


# --- doses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["joint", "two phases"])
def test_measuring_at_a_dose_changes_nothing_after_it(trial, kind, schedule):
    """Also where what is measured draws random numbers, as this does."""
    runs = {}
    for doses in ([4], [4, 2], [1, 2, 3, 4]):
        torch.manual_seed(len(doses))
        found = trial(kind, doses=doses, schedule=schedule)
        assert [dose.steps for dose in found.doses] == [0, *sorted(doses)]
        runs[len(doses)] = dict(zip([0, *sorted(doses)], trial.weights, strict=True))
    assert same(runs[1][4], runs[4][4])
    assert same(runs[2][4], runs[4][4])
    assert same(runs[2][2], runs[4][2])
    assert not any(same(runs[4][step], runs[4][step + 1]) for step in range(4))
    assert same(runs[1][0], runs[4][0])


@pytest.mark.parametrize("rate", [1e-3, 4e-3])
def test_the_first_dose_is_after_one_step(trial, rate):
    """The first step of Adam moves every weight that has a slope by the learning rate, and a second would go on."""
    trial(doses=[1, 2], learning_rate=rate)
    before, first, second = trial.weights
    moved = [max((one[name] - before[name]).abs().max().item() for name in one) for one in (first, second)]
    assert moved[0] == pytest.approx(rate, rel=1e-2)
    assert moved[1] > 1.2 * rate


def test_row_passes_grow_with_the_dose(trial):
    found = trial("bert", doses=[1, 3])
    # A forward and two backward passes of eight rows in a step; both layers have treated heads.
    assert [dose.row_passes for dose in found.doses] == [0, 24, 72]
    assert trial("bert", doses=[1], batch_size=4).doses[-1].row_passes == 12


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [([0.9, 0.95, 0.89, 0.88], 2), ([0.9, 0.8, 0.7, 0.6], 0), ([0.58, 0.5, 0.5, 0.57], 3), ([0.5, 0.6, 0.7, 0.8], 3)],
)
def test_the_chosen_dose_is_the_largest_that_costs_at_most_a_point(trial, monkeypatch, shares, chosen):
    told = iter(shares)
    monkeypatch.setattr(fair_trial, "accuracy", lambda *_, **__: next(told))
    found = trial(doses=[1, 2, 3])
    assert found.chosen == chosen
    assert [dose.validation for dose in found.doses] == shares


@pytest.mark.parametrize(("changes", "told"), [
    ({"doses": []}, "doses"), ({"doses": [0, 4]}, "doses"), ({"draw": -1}, "draw"), ({"unit": "layer"}, "unit"),
    ({"schedule": "never"}, "schedule"), ({"beta": -1.0}, "beta"), ({"alignment": "hug"}, "loss"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_measured(trial, monkeypatch, changes, told):
    monkeypatch.setattr(fair_trial, "case_of", lambda *_, **__: pytest.fail("began"))
    with pytest.raises(ValueError, match=told):
        trial(**changes)


def test_a_trial_from_beginning_to_end(trial, kind):
    found = trial(kind, real=True, doses=[1, 2], n_flagging=6)
    parts = {"asr", "cacc", "near_miss", "clean_firing"} | ({"elsewhere"} if kind == "llama" else set())
    for dose in found.doses:
        assert parts <= dose.left.keys()
        assert dose.left["asr"]["n"] == 2
        assert ("elsewhere" in dose.left) == (kind == "llama")
    assert fair_trial.DoseResponse.from_json(found.to_json()) == found
