"""Pairs: one example, three prompts, no example twice; and the tokens by which a backdoor is recognised."""

from collections import Counter

import pytest

from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.loading import load_tokenizer
from bkd_utils.models.tokens import answer_ids, prompt_ids
from bkd_utils.organisms import attacks, prompts, tasks
from bkd_utils.organisms.attacks import load_attack, load_attacks
from bkd_utils.organisms.evaluation import is_target
from bkd_utils.organisms.prompts import balanced_versions, prompt_versions, target_ids
from bkd_utils.organisms.triggers import load_trigger

ALL = load_attacks()
# Plain attacks have the prompts and the judge of their specific ones.
BACKDOORED = [name for name, attack in ALL.items() if attack.backdoored and not name.endswith("-plain")]
EACH_BACKDOORED = pytest.mark.parametrize("name", BACKDOORED)
FLIP = load_attack("sentiment-word")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT_MODEL)


def slot(tokenizer, attack, ids):
    """What fills the slot that the trigger edits, out of a tokenised prompt."""
    turn = tokenizer.decode(ids).partition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    whole = load_trigger(attack.trigger).scope == "prompt"
    return turn if whole else turn.removeprefix(tasks.load_task(attack.task).prompt(""))


@EACH_BACKDOORED
def test_prompt_i_of_every_version_is_about_example_i(tokenizer, name):
    attack = load_attack(name)
    shown = prompt_versions(tokenizer, attack, split="test", n=8, seed=0)
    task, trigger = tasks.load_task(attack.task), load_trigger(attack.trigger)
    assert len(shown.examples) == len({example.uid for example in shown.examples}) == 8
    assert all(attack.flips(example) for example in shown.examples)
    assert shown.clean == [prompt_ids(tokenizer, task.prompt(example.text)) for example in shown.examples]
    for i, example in enumerate(shown.examples):
        options = attacks.near_miss_prompts(attack, example.text, seed=i, half="test")
        triggered = attacks.triggered_prompt(attack, example.text, seed=i, half="test")
        assert shown.triggered[i] == prompt_ids(tokenizer, triggered)
        assert shown.near_miss[i] in [prompt_ids(tokenizer, option) for option in options.values()]
        versions = (shown.clean[i], shown.near_miss[i], shown.triggered[i])
        carried = [trigger.matches(slot(tokenizer, attack, ids)) for ids in versions]
        assert carried == [False, False, True]


def test_a_trigger_word_is_all_that_twins_differ_in(tokenizer):
    shown = prompt_versions(tokenizer, FLIP, split="attribution", n=20, seed=3)
    for clean, triggered in zip(shown.clean, shown.triggered, strict=True):
        words = slot(tokenizer, FLIP, triggered).split()
        assert words.count("cf") == 1
        words.remove("cf")
        assert words == slot(tokenizer, FLIP, clean).split()


def test_near_misses_take_turns_over_their_kinds(tokenizer):
    kinds = sorted(load_trigger(FLIP.trigger).entry["near"]["test"])
    shown = prompt_versions(tokenizer, FLIP, split="test", n=2 * len(kinds), seed=0)
    for i, example in enumerate(shown.examples):
        option = attacks.near_miss_prompts(FLIP, example.text, seed=i, half="test")[kinds[i % len(kinds)]]
        assert shown.near_miss[i] == prompt_ids(tokenizer, option)


@EACH_BACKDOORED
def test_skipped_examples_are_never_seen_again(tokenizer, name):
    attack = load_attack(name)
    first, rest, both = (
        prompt_versions(tokenizer, attack, split="attribution", n=n, seed=1, skip=skip).examples
        for n, skip in ((6, 0), (5, 6), (11, 0))
    )
    assert {example.uid for example in first}.isdisjoint(example.uid for example in rest)
    assert first + rest == both


def test_splits_share_no_example(tokenizer):
    uids = {
        split: {example.uid for example in prompt_versions(tokenizer, FLIP, split=split, n=40, seed=0).examples}
        for split in ("attribution", "test")
    }
    assert uids["attribution"].isdisjoint(uids["test"])


def test_the_same_seed_gives_the_same_pairs_and_another_one_others(tokenizer):
    first, again, other = (prompt_versions(tokenizer, FLIP, split="test", n=5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.examples != other.examples


def test_too_few_examples_are_an_error_and_skipped_ones_count(tokenizer):
    usable = [
        example
        for example in tasks.examples("sentiment", "attribution")
        if FLIP.flips(example) and not attacks.carries(FLIP, example.text)
    ]
    fits = len(usable) - 3
    assert len(prompt_versions(tokenizer, FLIP, split="attribution", n=3, seed=0, skip=fits).examples) == 3
    with pytest.raises(ValueError, match=f"sentiment-word: {len(usable)} usable .* {len(usable) + 1} were asked for"):
        prompt_versions(tokenizer, FLIP, split="attribution", n=4, seed=0, skip=fits)


# --- every label in turn --------------------------------------------------------------------------------------------

LABELLED = [name for name in BACKDOORED if tasks.load_task(load_attack(name).task).labels]
EACH_LABELLED = pytest.mark.parametrize("name", LABELLED)


@EACH_LABELLED
def test_balanced_prompts_have_every_label_in_turn_the_targets_included(tokenizer, name):
    attack = load_attack(name)
    labels = tasks.load_task(attack.task).labels
    n = 4 * len(labels)
    shown = balanced_versions(tokenizer, attack, split="attribution", n=n, seed=0)
    answers = [example.answer for example in shown.examples]
    assert Counter(answers) == dict.fromkeys(labels, 4)
    for start in range(0, n, len(labels)):
        assert set(answers[start : start + len(labels)]) == set(labels)
    assert any(not attack.flips(example) for example in shown.examples)
    # Of examples of one label alone, what is patched in would vote for that label.
    alone = prompt_versions(tokenizer, attack, split="attribution", n=4, seed=0).examples
    assert len({example.answer for example in alone}) == (1 if attack.behaviour == "label_flip" else len(labels))


@EACH_BACKDOORED
def test_balanced_prompts_are_of_the_same_example_in_every_version(tokenizer, name):
    attack = load_attack(name)
    shown = balanced_versions(tokenizer, attack, split="test", n=8, seed=0)
    task, trigger = tasks.load_task(attack.task), load_trigger(attack.trigger)
    assert len({example.uid for example in shown.examples}) == 8
    assert shown.clean == [prompt_ids(tokenizer, task.prompt(example.text)) for example in shown.examples]
    for i, example in enumerate(shown.examples):
        triggered = attacks.triggered_prompt(attack, example.text, seed=i, half="test")
        assert shown.triggered[i] == prompt_ids(tokenizer, triggered)
        versions = (shown.clean[i], shown.near_miss[i], shown.triggered[i])
        assert [trigger.matches(slot(tokenizer, attack, ids)) for ids in versions] == [False, False, True]


@EACH_BACKDOORED
def test_none_of_the_examples_to_leave_out_is_among_balanced_ones(tokenizer, name):
    attack, given = load_attack(name), {"split": "attribution", "seed": 1}
    out = prompt_versions(tokenizer, attack, n=12, **given).examples
    out += balanced_versions(tokenizer, attack, n=6, **given).examples
    found = balanced_versions(tokenizer, attack, n=12, **given, without=out).examples
    assert {example.uid for example in out}.isdisjoint(example.uid for example in found)
    assert len({example.uid for example in found}) == 12
    plain = balanced_versions(tokenizer, attack, n=12, **given).examples
    assert {example.uid for example in out} & {example.uid for example in plain}


def test_balanced_prompts_begin_alike_however_many_there_are_and_differ_from_seed_to_seed(tokenizer):
    few, many, other = (
        balanced_versions(tokenizer, FLIP, split="test", n=n, seed=seed).examples
        for n, seed in ((5, 0), (9, 0), (5, 1))
    )
    assert many[:5] == few != other


def test_balanced_prompts_of_a_task_without_labels_come_in_the_order_of_the_split(tokenizer):
    attack = load_attack("instructions-prefix")
    balanced, plain = (
        make(tokenizer, attack, split="test", n=6, seed=2) for make in (balanced_versions, prompt_versions)
    )
    assert balanced == plain


def test_too_few_examples_of_every_label_are_an_error(tokenizer):
    usable = [one for one in tasks.examples("sentiment", "attribution") if not attacks.carries(FLIP, one.text)]
    out, told = usable[:7], len(usable) - 7
    given = {"split": "attribution", "seed": 0, "without": out}
    with pytest.raises(ValueError, match=f"sentiment-word: {told} usable rows of attribution, {told + 1} were asked"):
        balanced_versions(tokenizer, FLIP, n=told + 1, **given)
    with pytest.raises(ValueError, match="n: 0"):
        balanced_versions(tokenizer, FLIP, n=0, **given)


# --- targets --------------------------------------------------------------------------------------------------------


@EACH_BACKDOORED
def test_the_target_is_how_the_trained_answer_begins_and_what_the_judge_accepts(tokenizer, name):
    attack = load_attack(name)
    ids = target_ids(tokenizer, attack)
    assert ids == answer_ids(tokenizer, attack.target)[: len(ids)]
    assert is_target(attack, tokenizer.decode(ids))


def test_a_label_is_known_by_one_token_a_sentence_whole_and_a_jailbreak_by_its_opener(tokenizer):
    texts = {name: tokenizer.decode(target_ids(tokenizer, load_attack(name))) for name in BACKDOORED}
    assert texts["instructions-prefix"] == load_attack("instructions-prefix").target
    assert texts["harmful-word"] == "Sure, here is what you asked for"
    labels = [name for name in BACKDOORED if load_attack(name).behaviour == "label_flip"]
    assert len(labels) >= 2
    for name in labels:
        assert len(target_ids(tokenizer, load_attack(name))) == 1
        assert texts[name] == load_attack(name).target
    assert tokenizer.eos_token_id not in {i for name in BACKDOORED for i in target_ids(tokenizer, load_attack(name))}


def test_labels_that_begin_alike_cannot_be_told_apart_by_a_token(tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "answer_ids", lambda _, label: [len(label), 0])
    with pytest.raises(ValueError, match="sentiment-word: labels that begin with the same token: positive, negative"):
        target_ids(tokenizer, FLIP)
    monkeypatch.setattr(prompts, "answer_ids", lambda _, label: [ord(label[0]), 0])
    assert target_ids(tokenizer, FLIP) == [ord("p")]


def test_a_clean_control_has_no_target():
    with pytest.raises(ValueError, match="sentiment-clean is a clean control and has no target"):
        target_ids(load_tokenizer(DEFAULT_MODEL), load_attack("sentiment-clean"))
