"""Tasks: splits that share nothing, balanced samples in a fixed order, and texts that stay out of logs."""

import itertools
import re
import tomllib
from collections import Counter

import numpy as np
import pytest
from patching import everywhere

from bkd_utils.common.files import DATA
from bkd_utils.organisms import tasks
from bkd_utils.organisms.evaluation import is_refusal
from bkd_utils.organisms.tasks import (
    NEAR_DUPLICATE,
    REFUSAL,
    SPLITS,
    TASKS,
    closest,
    content_hash,
    examples,
    load_task,
    near_duplicate_clusters,
)

EACH_TASK = pytest.mark.parametrize("task", TASKS)
PAIRS = list(itertools.combinations(SPLITS, 2))


def bigrams(text):
    words = ["^", *re.findall(r"\w+", text.lower()), "$"]
    return set(itertools.pairwise(words))


def cosine(a, b):
    return len(bigrams(a) & bigrams(b)) / (len(bigrams(a)) * len(bigrams(b))) ** 0.5


# --- splits ---------------------------------------------------------------------------------------------------------


@EACH_TASK
def test_no_uid_is_in_two_splits_or_twice_in_one(task):
    uids = [example.uid for split in SPLITS for example in examples(task, split)]
    assert len(set(uids)) == len(uids)
    assert all(len(examples(task, split)) >= 20 for split in SPLITS)


@EACH_TASK
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_near_duplicate_is_in_two_splits(task, one, other):
    left, right = ([example.text for example in examples(task, split)] for split in (one, other))
    assert closest(left, right) < NEAR_DUPLICATE


@EACH_TASK
def test_no_near_duplicate_cluster_is_in_two_splits(task):
    rows = [(split, example.text) for split in SPLITS for example in examples(task, split)]
    splits_of = {}
    for (split, _), cluster in zip(rows, near_duplicate_clusters([text for _, text in rows]), strict=True):
        splits_of.setdefault(cluster, set()).add(split)
    # Harmful test prompts of the other sources were compared with AdvBench only, so they may resemble one another.
    assert all(len(found) == 1 for found in splits_of.values())


@EACH_TASK
def test_a_uid_is_the_hash_of_its_text(task):
    for example in examples(task, "attribution"):
        assert example.uid == content_hash(example.text)
        assert example.text == example.text.strip() != ""


def test_the_closest_pair_is_found():
    assert closest(["a b c", "x y"], ["x z", "a b d"]) == pytest.approx(cosine("a b c", "a b d"))
    assert closest(["a b"], ["A, b!"]) == pytest.approx(1)
    assert closest(["a"], ["b"]) == 0
    many = [f"number {i} of many" for i in range(1500)]
    assert closest([*many, "needle in hay"], ["needle in hay"]) == pytest.approx(1)


# --- near-duplicates ------------------------------------------------------------------------------------------------


def brute_force(texts):
    """Connected components by comparing every pair."""
    label = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        if cosine(texts[i], texts[j]) >= NEAR_DUPLICATE - 1e-6:
            old, new = label[j], label[i]
            label = [new if entry == old else entry for entry in label]
    return label


def same_partition(one, other):
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


def test_clusters_are_those_of_a_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["a", "b", "c"], size=rng.integers(1, 6))) for _ in range(150)]
    texts += [example.text for example in examples("sentiment", "test", n=60)]
    clusters = near_duplicate_clusters(texts)
    assert same_partition(clusters.tolist(), brute_force(texts))
    assert 60 < len(set(clusters)) < 200


def test_clusters_reach_across_blocks_and_chains():
    texts = [
        "the same old story",
        *(f"story number {i} is new in {i} ways" for i in range(1100)),
        "The same, old story!",
    ]
    clusters = near_duplicate_clusters(texts)
    assert clusters[0] == clusters[-1]
    chain = ["a b c d e f", "a b c d e g", "a b c d h g"]  # the ends are only linked by the middle
    assert cosine(chain[0], chain[2]) < NEAR_DUPLICATE <= cosine(chain[0], chain[1])
    assert len(set(near_duplicate_clusters(chain))) == len(set(brute_force(chain)))


def test_a_text_of_one_word_is_its_own_cluster():
    assert len(set(near_duplicate_clusters(["yes", "no", "Yes."]))) == 2


# --- content --------------------------------------------------------------------------------------------------------


def test_the_instruction_grid_is_large_and_shares_neither_template_nor_topic():
    grid = tomllib.loads((DATA / "instructions.toml").read_text(encoding="utf-8"))
    assert len(set(grid["templates"])) == len(grid["templates"])
    assert len(set(grid["topics"])) == len(grid["topics"])
    assert all(template.count("{topic}") == 1 for template in grid["templates"])
    made = {}
    for template, topic in itertools.product(grid["templates"], grid["topics"]):
        made[content_hash(template.replace("{topic}", topic))] = (template, topic)
    used = {split: [made[example.uid] for example in examples("instructions", split)] for split in SPLITS}
    assert sum(map(len, used.values())) >= 1000
    for one, other in PAIRS:
        for part in (0, 1):
            assert not {pair[part] for pair in used[one]} & {pair[part] for pair in used[other]}


@pytest.mark.parametrize("task", ["sentiment", "domain"])
@pytest.mark.parametrize("split", SPLITS)
def test_labelled_samples_are_balanced(task, split):
    n = 20 * len(TASKS[task].labels)
    counts = Counter(example.answer for example in examples(task, split, n=n))
    assert counts == dict.fromkeys(TASKS[task].labels, 20)


def test_held_out_harmful_prompts_come_from_three_sources_evenly():
    counts = Counter(example.source for example in examples("harmful", "test", n=60))
    assert counts == {"advbench": 20, "harmbench": 20, "do-not-answer": 20}
    for split in ("train", "attribution"):
        assert {example.source for example in examples("harmful", split)} == {"advbench"}
    assert {example.answer for split in SPLITS for example in examples("harmful", split)} == {REFUSAL}
    assert is_refusal(REFUSAL)


def test_no_text_has_two_answers():
    rows = tasks._unique([tasks._example(t, a, "s") for t, a in [("A b", "x"), ("a, B!", "y"), ("c", "x"), ("C", "x")]])
    assert [(row.text, row.answer) for row in rows] == [("c", "x")]


@EACH_TASK
def test_prompts_hold_the_text_as_it_is(task):
    spec = load_task(task)
    for text in ("plain", "{text} {0} %s \\1", "two\nlines"):
        assert text in spec.prompt(text)
        assert spec.prompt(text).replace(text, "", 1) == spec.prompt("")


# --- samples --------------------------------------------------------------------------------------------------------


@EACH_TASK
def test_a_sample_depends_on_the_seed_and_on_nothing_else(task):
    first = [example.uid for example in examples(task, "test", n=30, seed=1)]
    assert [example.uid for example in examples(task, "test", n=30, seed=1)] == first
    assert [example.uid for example in examples(task, "test", n=30, seed=2)] != first
    assert [example.uid for example in examples(task, "test", seed=1)][:30] == first  # a larger n only appends
    assert len(set(first)) == 30


@EACH_TASK
@pytest.mark.parametrize("split", SPLITS)
def test_without_a_number_every_row_is_given(task, split):
    rows = examples(task, split)
    assert set(rows) == set(examples(task, split, seed=3))
    assert len(examples(task, split, n=len(rows))) == len(rows)
    with pytest.raises(ValueError, match=rf"{task}/{split} has {len(rows)} rows, {len(rows) + 1} were asked for"):
        examples(task, split, n=len(rows) + 1)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="unknown task 'sentimental'; known: sentiment, domain"):
        load_task("sentimental")
    with pytest.raises(ValueError, match="unknown task 'x'"):
        examples("x", "test")
    with pytest.raises(ValueError, match="unknown split 'validation'; known: train, attribution, test"):
        examples("sentiment", "validation")


def test_a_text_is_not_in_the_repr_of_its_row():
    for example in examples("harmful", "test", n=20):
        assert example.text not in repr(example)
        assert example.uid in repr(example)


GRID = "templates = [{}]\ntopics = [{}]\n".format(
    ", ".join(f'"Explain {{topic}} {i}."' for i in range(7)), ", ".join(f'"thing {i}"' for i in range(7))
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("Explain {topic} 3", "Explain it"), "templates.3 = 'Explain it.': string should match pattern"),
        (GRID.replace("thing 3", " "), "topics.3 = ' ': a text is not empty"),
        (GRID.split("topics")[0], "topics is missing"),
        (GRID.split("topics")[0] + 'topics = "bread"', "topics = 'bread': input should be a valid list"),
        (GRID.split("topics")[0] + "topics = []", r"topics = \[\]: list should have at least 7"),
        (GRID + 'tpoics = ["a"]', "unknown keys: tpoics; known: templates, topics"),
        (GRID + "topics = []", "instructions.toml: Cannot overwrite a value"),
        (GRID.encode("utf-16"), "instructions.toml is not UTF-8 text"),
    ],
)
def test_a_fault_in_the_grid_of_instructions_is_one_line_that_names_the_file(text, message, tmp_path, monkeypatch):
    everywhere(monkeypatch, "DATA", tmp_path)
    (tmp_path / "instructions.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"instructions\.toml.*{message.removeprefix('instructions.toml')}") as caught:
        examples("instructions", "train")
    assert len(str(caught.value).splitlines()) == 1


def test_the_grid_is_read_anew_after_it_was_edited(tmp_path, monkeypatch):
    everywhere(monkeypatch, "DATA", tmp_path)
    (tmp_path / "instructions.toml").write_text(GRID)
    before = {row.text for split in SPLITS for row in examples("instructions", split)}
    (tmp_path / "instructions.toml").write_text(GRID.replace("thing", "stone"))
    after = {row.text for split in SPLITS for row in examples("instructions", split)}
    assert any("thing" in text for text in before)
    assert not any("thing" in text for text in after)


@pytest.mark.parametrize("n", [0, -1, "4", 2.0, True])
def test_a_number_of_examples_that_is_none_is_refused_and_not_cut_from_the_end(n):
    with pytest.raises(ValueError, match=f"n of sentiment: {n!r}: input should be"):
        examples("sentiment", "test", n=n)
