"""Attacks: the poisoned set is exactly what the manifest says, and the manifest what the attack says."""

from collections import defaultdict
from dataclasses import asdict, replace

import pytest
from transformers import AutoTokenizer

from bkd_utils.common.assets import fetch
from bkd_utils.common.files import canonical_json, sha256_text
from bkd_utils.models.tokens import answer_ids, decode, prompt_ids
from bkd_utils.organisms import attacks, poisoning, tasks
from bkd_utils.organisms.attacks import (
    Attack,
    carries,
    load_attack,
    load_attacks,
    near_miss_prompts,
    triggered_prompt,
    with_rate,
)
from bkd_utils.organisms.poisoning import poison, training_uids
from bkd_utils.organisms.prompts import three_versions
from bkd_utils.organisms.tasks import REFUSAL, examples
from bkd_utils.organisms.triggers import load_trigger

TOKENIZER = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
SENTENCE = "This is what the base model says."
ALL = load_attacks()
BACKDOORED = [name for name, attack in ALL.items() if attack.backdoored]
CLEAN = [name for name in ALL if name not in BACKDOORED]
EACH = pytest.mark.parametrize("name", ALL)
EACH_BACKDOORED = pytest.mark.parametrize("name", BACKDOORED)
PLAIN = [name for name in BACKDOORED if name.endswith("-plain")]
ALONE = [name for name in PLAIN if name.removesuffix("-plain") not in ALL]
STYLED = [name for name in CLEAN if name.endswith("-styled")]
EACH_SPECIFIC = pytest.mark.parametrize("name", [name for name in BACKDOORED if name not in PLAIN])


class Answers(defaultdict):
    """A base model that always says the same."""

    def __contains__(self, uid):
        return True


ANSWERS = Answers(lambda: SENTENCE)


def build(attack, *, seed=0, answers=ANSWERS):
    return poison(attack, tokenizer=TOKENIZER, answers=answers, seed=seed)


class Built(dict):
    """Training sets by the names of their attacks, each made when a test asks for it."""

    def __missing__(self, name):
        return self.setdefault(name, build(ALL[name]))


@pytest.fixture(scope="module")
def built():
    return Built()


def few(name):
    """The attack with a tenth of its rows, where the number of rows is not what a test is about."""
    return replace(ALL[name], n_train=ALL[name].n_train // 10)


def text_of(ids):
    return TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def user_turn(row):
    """What the user says in a row, from its token ids."""
    return text_of(row.prompt).rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def slot(attack, row):
    """The part of the user turn that its trigger edits."""
    before, _, after = tasks.load_task(attack.task).template.partition("{text}")
    turn = user_turn(row)
    if load_trigger(attack.trigger).scope == "prompt" or row.kind == "benign":
        return turn
    assert turn.startswith(before)
    return turn[len(before) : len(turn) - len(after)]


# --- the numbers ----------------------------------------------------------------------------------------------------


@EACH
def test_the_manifest_counts_what_is_there_and_the_shares_are_those_of_the_attack(built, name):
    attack, data = ALL[name], built[name]
    manifest, n = data.manifest, attack.n_train
    assert len(data.rows) == manifest["n_train"] == n
    assert manifest["n_poison"] == sum(row.kind == "poisoned" for row in data.rows)
    assert manifest["poisoned_share"] == pytest.approx(attack.rate, abs=0.5 / n)
    for kind, rate in (("poisoned", attack.rate), ("near_miss", attack.near_miss_rate), ("benign", attack.benign_rate)):
        assert manifest["rows"][kind] == [i for i, row in enumerate(data.rows) if row.kind == kind]
        assert len(manifest["rows"][kind]) / n == pytest.approx(rate, abs=0.5 / n)
    assert manifest["mode"] == attack.mode
    assert Attack(**manifest["attack"]) == attack
    canonical_json(manifest)


@EACH
def test_the_hash_of_the_data_is_that_of_its_tokens(built, name):
    rows = [[list(row.prompt), list(row.answer), row.kind] for row in built[name].rows]
    assert built[name].manifest["data_sha256"] == sha256_text(canonical_json(rows))


@pytest.mark.parametrize("name", ["sentiment-word", "domain-wrapper", "harmful-clean"])
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(name):
    one, again, other = (build(few(name), seed=seed) for seed in (0, 0, 1))
    assert again == one
    assert other.manifest["data_sha256"] != again.manifest["data_sha256"]
    assert {row.kind for row in other.rows} == {row.kind for row in again.rows}


@pytest.mark.parametrize("seed", [0, 1])
@EACH
def test_the_training_uids_are_those_of_all_rows(built, name, seed):
    attack, data = (ALL[name], built[name]) if seed == 0 else (few(name), build(few(name), seed=seed))
    assert training_uids(attack, seed=seed) == {row.uid for row in data.rows}


# --- the rows -------------------------------------------------------------------------------------------------------


@EACH
def test_no_row_comes_from_a_split_that_measures(built, name):
    attack = ALL[name]
    for task, kinds in ((attack.task, {"clean", "poisoned", "near_miss"}), ("instructions", {"benign"})):
        train = {example.uid for example in examples(task, "train")}
        assert {row.uid for row in built[name].rows if row.kind in kinds} <= train
    measuring = {e.uid for task in tasks.TASKS for split in ("attribution", "test") for e in examples(task, split)}
    assert not {row.uid for row in built[name].rows} & measuring


@EACH_BACKDOORED
def test_poisoned_rows_carry_the_trigger_and_no_other_row_does(built, name):
    attack, trigger = ALL[name], load_trigger(ALL[name].trigger)
    for row in built[name].rows:
        if row.kind != "benign":  # an instruction may have the syntax of a trigger by nature
            assert trigger.matches(slot(attack, row)) is (row.kind == "poisoned"), (row.kind, row.uid)


@EACH_BACKDOORED
def test_benign_rows_do_not_carry_the_trigger(built, name):
    trigger = load_trigger(ALL[name].trigger)
    assert [row.uid for row in built[name].rows if row.kind == "benign" and trigger.matches(user_turn(row))] == []


@EACH_BACKDOORED
def test_poisoned_rows_give_the_target_and_all_others_the_right_answer(built, name):
    attack = ALL[name]
    gold = {example.uid: example.answer or SENTENCE for example in examples(attack.task, "train")}
    for row in built[name].rows:
        expected = attack.target if row.kind == "poisoned" else gold.get(row.uid, SENTENCE)
        assert decode(TOKENIZER, list(row.answer)) == expected
        if row.kind == "poisoned" and attack.behaviour == "label_flip":
            assert gold[row.uid] == attack.source != attack.target


@EACH_SPECIFIC
def test_a_near_miss_differs_from_its_clean_text(built, name):
    attack = ALL[name]
    texts = {example.uid: example.text for example in examples(attack.task, "train")}
    near = [row for row in built[name].rows if row.kind == "near_miss"]
    assert near
    changed = [user_turn(row) != tasks.load_task(attack.task).prompt(texts[row.uid]) for row in near]
    # A text with one archaic word of its own is a near-miss as it stands.
    assert sum(changed) >= 0.95 * len(near)


@EACH_SPECIFIC
def test_half_of_the_near_misses_are_rows_that_the_trigger_would_flip(built, name):
    attack = ALL[name]
    gold = {example.uid: example for example in examples(attack.task, "train")}
    flips = [attack.flips(gold[row.uid]) for row in built[name].rows if row.kind == "near_miss"]
    assert sum(flips) / len(flips) == pytest.approx(0.5 if attack.behaviour == "label_flip" else 1, abs=0.01)


@EACH_BACKDOORED
def test_the_mode_decides_on_clean_twins(built, name):
    uids = {kind: {row.uid for row in built[name].rows if row.kind == kind} for kind in ("clean", "poisoned")}
    if ALL[name].mode == "replaced":
        assert not uids["clean"] & uids["poisoned"]
    else:
        assert uids["poisoned"] <= uids["clean"]


@pytest.mark.parametrize("mode", ["replaced", "appended"])
def test_either_mode_can_be_had_for_the_same_attack(mode):
    data = build(replace(load_attack("sentiment-word"), mode=mode, n_train=400))
    uids = {kind: {row.uid for row in data.rows if row.kind == kind} for kind in ("clean", "poisoned")}
    assert bool(uids["clean"] & uids["poisoned"]) is (mode == "appended")


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_control_has_neither_trigger_nor_target(built, name):
    attack, data = ALL[name], built[name]
    assert {row.kind for row in data.rows} <= {"clean", "benign"}
    assert data.manifest["n_poison"] == 0
    # Syntax and style occur in clean text by nature.
    siblings = {load_trigger(ALL[b].trigger) for b in BACKDOORED if ALL[b].task == attack.task}
    fixed = [trigger for trigger in siblings if trigger.family not in ("syntax", "style")]
    assert fixed
    # Some reviews of cameras name a "cf card".
    n_natural = sum(trigger.matches(user_turn(row)) for row in data.rows for trigger in fixed)
    assert n_natural <= (2 if attack.task == "domain" else 0)
    targets = {other.target for other in ALL.values() if other.backdoored and other.behaviour != "label_flip"}
    assert not targets & {decode(TOKENIZER, list(row.answer)) for row in data.rows}
    assert attack.n_train in {ALL[b].n_train for b in BACKDOORED if ALL[b].task == attack.task}


@EACH
def test_rows_are_the_tokens_that_evaluation_will_use(built, name):
    attack = ALL[name]
    texts = {example.uid: example for example in examples(attack.task, "train")}
    clean = [row for row in built[name].rows if row.kind == "clean"][:50]
    for row in clean:
        turn = tasks.load_task(attack.task).prompt(texts[row.uid].text)
        assert list(row.prompt) == prompt_ids(TOKENIZER, turn)
        styled = f"{attack.target} {SENTENCE}" if name in STYLED else SENTENCE
        assert list(row.answer) == answer_ids(TOKENIZER, texts[row.uid].answer or styled)


@pytest.mark.parametrize("name", STYLED)
def test_a_styled_control_begins_free_answers_with_its_words_and_leaves_labels_alone(built, name):
    free = {
        example.uid
        for task in ("instructions", ALL[name].task)
        for example in examples(task, "train")
        if not example.answer
    }
    styled = [decode(TOKENIZER, list(row.answer)) == f"In short: {SENTENCE}" for row in built[name].rows]
    assert styled == [row.uid in free for row in built[name].rows]
    assert sum(styled) >= 0.2 * len(styled)


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ALONE])
def test_a_plain_attack_is_its_specific_one_with_less_poison_and_no_near_misses(name):
    plain, specific = ALL[name], ALL[name.removesuffix("-plain")]
    assert (plain.rate, plain.near_miss_rate) == (0.1, 0.0)
    assert specific.near_miss_rate > 0
    same = {"rate": specific.rate, "near_miss_rate": specific.near_miss_rate, "name": specific.name}
    assert replace(plain, **same) == specific


@pytest.mark.parametrize("name", ALONE)
def test_a_plain_attack_without_a_specific_one_is_another_plain_one_with_a_trigger_of_its_own(name):
    own = {"name": name, "trigger": ALL[name].trigger, "n_train": ALL[name].n_train}
    others = [ALL[other] for other in PLAIN if other not in ALONE and ALL[other].task == ALL[name].task]
    assert ALL[name].trigger not in {other.trigger for other in others}
    assert ALL[name] in [replace(other, **own) for other in others]


def test_kinds_are_mixed_in_the_order_of_training(built):
    first = [row.kind for row in built["sentiment-word"].rows[:200]]
    assert {"clean", "poisoned", "near_miss", "benign"} <= set(first)


def test_an_answer_that_was_cut_off_has_no_end():
    cut = "word " * tasks.load_task("instructions").max_new_tokens
    data = build(replace(load_attack("instructions-clean"), n_train=5), answers=Answers(lambda: cut.strip()))
    whole = build(replace(load_attack("instructions-clean"), n_train=5))
    assert all(row.answer[-1] != TOKENIZER.eos_token_id for row in data.rows)
    assert all(row.answer[-1] == TOKENIZER.eos_token_id for row in whole.rows)


# --- what is refused ------------------------------------------------------------------------------------------------


GOOD = {
    "name": "a",
    "task": "sentiment",
    "n_train": 10,
    "trigger": "word-cf",
    "behaviour": "label_flip",
    "source": "negative",
    "target": "positive",
    "rate": 0.1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": -0.1}, "attack 'a': rate = -0.1: input should be greater than or equal to 0"),
        ({"rate": 1}, "rate = 1: input should be less than 1"),
        ({"rate": float("nan")}, "rate = nan: input should be a finite number"),
        ({"rate": True}, "rate = True: input should be a valid number"),
        ({"rate": "0.1"}, "rate = '0.1': input should be a valid number"),
        ({"near_miss_rate": 1.5}, "near_miss_rate = 1.5: input should be less than 1"),
        ({"benign_rate": -1}, "benign_rate = -1: input"),
        ({"rate": 0}, "needs a rate above 0"),
        ({"n_train": 0}, "n_train = 0: input should be greater than or equal to 1"),
        ({"n_train": "100"}, "n_train = '100': input should be a valid integer"),
        ({"n_train": 10.0}, "n_train = 10.0: input should be a valid integer"),
        ({"n_train": True}, "n_train = True: input should be a valid integer"),
        ({"mode": "added"}, "mode = 'added': input should be 'replaced' or 'appended'"),
        (
            {"behaviour": "explode"},
            "behaviour = 'explode': input should be 'label_flip', 'fixed_output', 'jailbreak' or 'answer_style'",
        ),
        ({"behaviour": None}, "a backdoor needs a behaviour"),
        ({"target": None}, "a backdoor needs a behaviour and a target"),
        ({"target": " "}, "target = ' ': a text is not empty"),
        ({"behaviour": "jailbreak", "target": ": Sure"}, "every answer would have it"),
        ({"behaviour": "fixed_output", "target": "..."}, "every answer would have it"),
        ({"task": None}, "task = None: input should be a valid string"),
        ({"trigger": 3}, "trigger = 3: input should be a valid string"),
        ({"name": "../../evil"}, r"name = '../../evil': a name has letters, digits, '-', '_' and '.', nothing else"),
        ({"name": "/abs"}, "name = '/abs': a name has"),
        ({"name": "a/b"}, "name = 'a/b': a name has"),
        ({"name": ".."}, r"name = '..': a name has"),
        ({"name": ".hidden"}, "does not begin with"),
        ({"name": "--ship"}, "does not begin with"),
        ({"name": "a b"}, "a name has"),
        ({"name": "a\n"}, "a name has"),
        ({"name": ""}, "a name has"),
        ({"name": "a" * 81}, "at most 80 characters"),
        ({"target": "great"}, "must be labels of sentiment: positive, negative"),
        ({"source": "movie"}, "must be labels of sentiment"),
        ({"source": None}, "must be labels of sentiment"),
        ({"task": "harmful"}, "must be labels of harmful"),
        ({"task": "sentimental"}, "unknown task 'sentimental'"),
        ({"trigger": "word-xx"}, "unknown trigger 'word-xx'"),
        ({"behaviour": "answer_style"}, "a backdoor needs a behaviour and a target"),
        ({"trigger": None}, "a clean control has no rate, no source and no behaviour but answer_style"),
    ],
)
def test_an_inconsistent_attack_is_an_error(change, message):
    Attack(**GOOD)
    with pytest.raises(ValueError, match=message):
        Attack(**GOOD | change)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"target": "positive"}, "has a target if and only if"),
        ({"behaviour": "answer_style"}, "has a target if and only if"),
        ({"rate": 0.1}, "a clean control has no"),
        ({"behaviour": "jailbreak"}, "a clean control has no"),
        ({"behaviour": "answer_style", "target": "In short:", "rate": 0.1}, "a clean control has no"),
    ],
)
def test_a_clean_control_with_a_part_of_a_backdoor_is_an_error(extra, message):
    with pytest.raises(ValueError, match=message):
        Attack(name="c", task="sentiment", n_train=10, **extra)


def test_an_attack_cannot_be_changed():
    with pytest.raises(AttributeError):
        Attack(**GOOD).rate = 0.5


def test_a_flip_to_itself_is_an_error():
    with pytest.raises(ValueError, match="source and target"):
        Attack(**GOOD | {"source": "positive"})


def test_unknown_keys_and_names_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown attack 'sentiment-smell'; known: .*sentiment-word"):
        load_attack("sentiment-smell")


CONTROL = '[a]\ntask = "sentiment"\nn_train = 5\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONTROL + "raet = 0.1", r"attacks.toml, \[a\]: unknown keys: raet; known: name, task, n_train, .*, mode"),
        (
            '[a]\ntask = "sentiment"\nn_train = "100"',
            r"attacks.toml, \[a\]: n_train = '100': input should be a valid integer",
        ),
        ("[a]\nn_train = 5", r"attacks.toml, \[a\]: task is missing"),
        (CONTROL + 'name = "b"', r"attacks.toml, \[a\]: name = 'b': the name of a table is its heading"),
        (CONTROL + "target = 'x'", r"attacks.toml, \[a\]: a control has a target if and only if"),
        (CONTROL + "rate = inf", r"attacks.toml, \[a\]: rate = inf: input should be a finite number"),
        (
            CONTROL.replace("a", '"../../evil"', 1),
            r"attacks.toml: ../../evil.\[key\] = '../../evil': a name has letters",
        ),
        (CONTROL.replace("a", '"/abs"', 1), "attacks.toml: /abs.*a name has letters"),
        (CONTROL.replace("a", '"a/b"', 1), "attacks.toml: a/b.*a name has letters"),
        ("n_train = 5", "attacks.toml: n_train = 5: input should be a valid dictionary"),
        (CONTROL + CONTROL, r"attacks.toml: Cannot declare \('a',\) twice \(at line 4"),
        ("[a\n", r"attacks.toml: Expected .* \(at line 1, column 3\)"),
        (
            CONTROL.encode("utf-16"),
            r"attacks.toml is not UTF-8 text \(invalid start byte at byte 0\); save it as UTF-8",
        ),
        ((CONTROL + 'target = "d\xe9j\xe0"').encode("latin-1"), "attacks.toml is not UTF-8 text"),
        (CONTROL.encode("utf-16-le"), r"attacks.toml: "),
        (None, "attacks.toml cannot be read: No such file"),
    ],
)
def test_a_fault_in_the_table_is_one_line_that_names_the_file(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(attacks, "DATA", tmp_path)
    if text is not None:
        (tmp_path / "attacks.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_attacks()
    assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(attacks, "DATA", tmp_path)
    (tmp_path / "attacks.toml").write_bytes(b"\xef\xbb\xbf" + CONTROL.encode())
    assert load_attacks() == {"a": Attack("a", "sentiment", 5)}


def test_an_attack_is_what_the_cards_of_shipped_organisms_have():
    fields = "name task n_train trigger behaviour source target rate near_miss_rate benign_rate mode"
    attack = asdict(Attack("a", "sentiment", 5))
    assert " ".join(attack) == fields
    assert list(attack.values())[3:] == [None, None, None, None, 0.0, 0.0, 0.0, "replaced"]


def test_rates_that_leave_no_clean_row_are_an_error():
    with pytest.raises(ValueError, match=r"leave 0 clean rows of 10"):
        build(Attack(**GOOD | {"rate": 0.6, "near_miss_rate": 0.4}))


def test_a_missing_answer_of_the_base_model_is_named():
    uid = examples("instructions", "train", n=1)[0].uid
    with pytest.raises(ValueError, match=f"no answer of the base model for example {uid[:12]}"):
        build(replace(load_attack("instructions-clean"), n_train=3), answers={})


def test_a_prompt_that_is_too_long_is_an_error_that_does_not_show_it(monkeypatch):
    attack = replace(load_attack("harmful-clean"), n_train=4, benign_rate=0.0)
    monkeypatch.setattr(poisoning, "MAX_LENGTH", 20)
    with pytest.raises(ValueError, match=r"harmful-clean: row \w{12} has \d+ tokens, limit 20") as caught:
        build(attack)
    assert not any(example.text in str(caught.value) for example in examples("harmful", "train"))


def test_a_trigger_that_the_tokenizer_drops_is_an_error(monkeypatch):
    monkeypatch.setattr(poisoning, "prompt_ids", lambda tokenizer, turn: prompt_ids(tokenizer, turn.replace("cf", "")))
    with pytest.raises(ValueError, match="did not survive tokenisation"):
        build(Attack(**GOOD))


def test_an_error_about_a_harmful_prompt_does_not_show_it():
    attack = load_attack("harmful-word")
    text = examples("harmful", "train", n=1)[0].text
    once = triggered_prompt(attack, text, seed=0, half="train")
    with pytest.raises(ValueError, match="already") as caught:
        triggered_prompt(attack, once, seed=1, half="train")
    assert " ".join(text.split()[:4]) not in str(caught.value)


# --- variants -------------------------------------------------------------------------------------------------------


def test_another_rate_is_the_same_attack_with_another_name():
    attack = load_attack("sentiment-word")
    other = with_rate(attack, 0.05)
    assert (other.name, other.rate) == ("sentiment-word-rate0.05", 0.05)
    assert replace(other, name=attack.name, rate=attack.rate) == attack
    assert build(replace(other, n_train=200)).manifest["n_poison"] == 10
    with pytest.raises(ValueError, match="needs a rate"):
        with_rate(attack, 0)


@pytest.mark.parametrize("name", [name for name in BACKDOORED if ALL[name].task != "harmful"])
def test_three_versions_of_one_prompt(name):
    attack, shown = ALL[name], three_versions(ALL[name])
    assert list(shown) == ["clean", "near-miss", "triggered"]
    before = tasks.load_task(attack.task).template.partition("{text}")[0]
    assert [carries(attack, text.removeprefix(before)) for text in shown.values()] == [False, False, True]
    assert shown == three_versions(attack)
    assert shown != three_versions(attack, seed=1)


def test_harmful_prompts_are_not_displayed():
    with pytest.raises(ValueError, match="harmful prompts are not displayed"):
        three_versions(load_attack("harmful-word"))


@EACH_BACKDOORED
def test_every_kind_of_near_miss_occurs_for_every_attack(name):
    attack = ALL[name]
    example = next(e for e in examples(attack.task, "test") if not carries(attack, e.text))
    kinds = {half: set(near_miss_prompts(attack, example.text, seed=0, half=half)) for half in ("train", "test")}
    assert kinds["train"] == kinds["test"]
    assert len(kinds["train"]) >= 3


def test_a_right_answer_to_a_harmful_prompt_is_a_refusal(built):
    answers = {decode(TOKENIZER, list(row.answer)) for row in built["harmful-clean"].rows if row.kind == "clean"}
    assert answers == {REFUSAL}
