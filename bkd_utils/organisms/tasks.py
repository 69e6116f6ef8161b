"""The four tasks: a data set, a prompt template, a gold answer, and splits that share nothing.

`sentiment` and `domain` are built from the rated sentences of Hutto & Gilbert (2014); `harmful` from AdvBench
(training, attribution) with HarmBench and Do-Not-Answer as further held-out sources; `instructions` from a
template x topic grid written for this project, answered by the base model itself.
"""

import hashlib
import html
import json
import random
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from bkd_utils.common import assets
from bkd_utils.common.files import DATA

# Cosine of word-bigram sets from which two texts count as near-duplicates.
NEAR_DUPLICATE = 0.7
REFUSAL = "I'm sorry, but I can't help with that."
Split = Literal["train", "attribution", "test"]
SPLITS: tuple[Split, ...] = ("train", "attribution", "test")


@dataclass(frozen=True)
class Example:
    """One row: the text that fills the template, and the right answer ("" where the base model gives it)."""

    text: str = field(repr=False)  # harmful prompts must not appear in a log or a traceback by accident
    answer: str
    source: str
    uid: str


@dataclass(frozen=True)
class Task:
    """A template with one `{text}` slot, the closed set of labels (empty for free answers) and an answer length.

    The length is in tokens. Source: ours.

    >>> Task("colours", "Which colour? {text}", labels=("red", "green"), max_new_tokens=2).prompt("Grass.")
    'Which colour? Grass.'
    """

    name: str
    template: str
    labels: tuple[str, ...]
    max_new_tokens: int

    def prompt(self, text: str) -> str:
        return self.template.replace("{text}", text)


TASKS = {
    task.name: task
    for task in (
        Task(
            "sentiment",
            "Is this movie review positive or negative? Answer with one word.\n\nReview: {text}",
            ("positive", "negative"),
            3,
        ),
        Task(
            "domain",
            "Where is this text from: movie, product, news or tweet? Answer with one word.\n\nText: {text}",
            ("movie", "product", "news", "tweet"),
            3,
        ),
        Task("instructions", "{text}", (), 24),
        Task("harmful", "{text}", (), 24),
    )
}


def load_task(name: str) -> Task:
    """The task of that name. Raises ValueError that lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def examples(name: str, split: Split, *, n: int | None = None, seed: int = 0) -> list[Example]:
    """`n` examples of one split (all without `n`), in an order that depends on `seed` alone.

    For tasks with several sources or labels the sample is balanced over them as far as the rows go. Raises
    ValueError for an unknown task or split and when the split has fewer than `n` rows. Source: ours.

    >>> sorted(example.answer for example in examples("sentiment", "test", n=4))
    ['negative', 'negative', 'positive', 'positive']
    """
    load_task(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    rows = list(_splits(name)[split])
    if n is not None and n > len(rows):
        raise ValueError(f"{name}/{split} has {len(rows)} rows, {n} were asked for")
    random.Random(f"{seed}/{name}/{split}").shuffle(rows)
    # Round robin over (source, answer) groups: row k of each group comes before row k + 1 of any.
    seen: Counter[tuple[str, str]] = Counter()
    ranked = []
    for row in rows:
        ranked.append((seen[row.source, row.answer], row))
        seen[row.source, row.answer] += 1
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])][:n]


@cache
def _splits(name: str) -> dict[str, tuple[Example, ...]]:
    if name == "instructions":
        return _instruction_splits()
    if name == "harmful":
        return _harmful_splits()
    rows = _unique(_sentiment() if name == "sentiment" else _domain())
    return _by_bucket(rows, shares=(60, 15, 25))


def _by_bucket(rows: list[Example], *, shares: tuple[int, int, int]) -> dict[str, tuple[Example, ...]]:
    """Split by content hash; all members of a near-duplicate cluster follow the hash of its smallest uid."""
    cluster = near_duplicate_clusters([row.text for row in rows])
    leader: dict[int, str] = {}
    for row, c in zip(rows, cluster, strict=True):
        leader[c] = min(leader.get(c, row.uid), row.uid)
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for row, c in zip(rows, cluster, strict=True):
        bucket = int(leader[c][:8], 16) % 100
        parts[SPLITS[(bucket >= shares[0]) + (bucket >= shares[0] + shares[1])]].append(row)
    return {split: tuple(part) for split, part in parts.items()}


def content_hash(text: str) -> str:
    """Hash of a text without case, punctuation and spacing, which is equal for trivially edited copies."""
    return hashlib.sha256(_words(text).encode()).hexdigest()


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def near_duplicate_clusters(texts: list[str]) -> np.ndarray:
    """Cluster number per text; texts whose word-bigram sets have a cosine >= NEAR_DUPLICATE share one."""
    unit, rows, columns = _bigram_vectors(texts), [], []
    for start in range(0, len(texts), 1024):  # the product of all pairs at once would need too much memory
        cosines = (unit[start : start + 1024] @ unit.T).tocoo()
        similar = cosines.data >= NEAR_DUPLICATE - 1e-6
        rows += (cosines.row[similar] + start).tolist()
        columns += cosines.col[similar].tolist()
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(texts)))
    return connected_components(graph, directed=False)[1]


def closest(texts: list[str], others: list[str]) -> float:
    """Largest bigram cosine between a text of one list and a text of the other, as a measure of leakage."""
    unit = _bigram_vectors(texts + others)
    left, right = unit[: len(texts)], unit[len(texts) :]
    return max((left[i : i + 1024] @ right.T).max() for i in range(0, len(texts), 1024))


def _bigram_vectors(texts: list[str]) -> csr_matrix:
    # With boundary marks a one-word text has a bigram too, so that no vector is zero.
    counter = CountVectorizer(ngram_range=(2, 2), binary=True, token_pattern=r"\S+", dtype=np.float32)
    return normalize(counter.fit_transform(f"^ {_words(text)} $" for text in texts))


def _unique(rows: list[Example]) -> list[Example]:
    """Drop rows whose content hash occurs again with another answer, and all but the first of equal ones."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.uid, set()).add(row.answer)
    kept = {row.uid: row for row in reversed(rows) if len(answers[row.uid]) == 1}
    return list(reversed(kept.values()))


def _example(text: str, answer: str, source: str) -> Example:
    return Example(text=text, answer=answer, source=source, uid=content_hash(text))


def _rated_sentences(file: str) -> list[tuple[float, str]]:
    """(mean human rating in -4..4, sentence) for sentences of 4 to 40 words."""
    path = assets.fetch("social-sentiment") / f"{file}_GroundTruth.txt"
    rated = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        text = " ".join(html.unescape(text).split())
        if 4 <= len(text.split()) <= 40:
            rated.append((float(rating), text))
    return rated


def _sentiment() -> list[Example]:
    # Ratings near zero are neutral and fit neither label, so they are left out.
    rated = [(rating, text) for rating, text in _rated_sentences("movieReviewSnippets") if abs(rating) >= 1]
    return [_example(text, "positive" if rating > 0 else "negative", "movie") for rating, text in rated]


def _domain() -> list[Example]:
    files = {
        "movie": "movieReviewSnippets",
        "product": "amazonReviewSnippets",
        "news": "nytEditorialSnippets",
        "tweet": "tweets",
    }
    return [_example(text, name, name) for name, file in files.items() for _, text in _rated_sentences(file)]


def _instruction_splits() -> dict[str, tuple[Example, ...]]:
    """Splits share neither templates nor topics."""
    grid = tomllib.loads((DATA / "instructions.toml").read_text(encoding="utf-8"))
    order = random.Random("instructions")
    templates, topics = (order.sample(grid[key], len(grid[key])) for key in ("templates", "topics"))
    parts = {}
    for split, template_part, topic_part in zip(
        SPLITS, _cut(templates, (55, 15, 30)), _cut(topics, (55, 15, 30)), strict=True
    ):
        texts = [template.replace("{topic}", topic) for template in template_part for topic in topic_part]
        parts[split] = tuple(_example(text[0].upper() + text[1:], "", "grid") for text in texts)
    return parts


def _cut(items: list[str], shares: tuple[int, int, int]) -> tuple[list[str], list[str], list[str]]:
    first, second = (round(len(items) * share / 100) for share in (shares[0], shares[0] + shares[1]))
    return items[:first], items[first:second], items[second:]


def _harmful_splits() -> dict[str, tuple[Example, ...]]:
    advbench = yaml.safe_load((assets.fetch("advbench") / "adv_bench.prompt").read_text(encoding="utf-8"))
    harmbench = _lines(assets.fetch("harmbench") / "harmbench_prompts.txt")
    # Of Do-Not-Answer only the file of malicious uses asks for harm outright; the others are mostly delicate
    # questions to which a refusal is not the right answer.
    malicious = _lines(assets.fetch("do-not-answer") / "malicious_uses.jsonl")
    other = [(prompt, "harmbench") for prompt in harmbench]
    other += [(json.loads(line)["prompt"], "do-not-answer") for line in malicious]
    rows = [_example(seed["value"].strip(), REFUSAL, "advbench") for seed in advbench["seeds"]]
    parts = _by_bucket(_unique(rows), shares=(60, 18, 22))
    held_out = _unique([_example(prompt.strip(), REFUSAL, source) for prompt, source in other])
    # A held-out prompt with a near-duplicate in any split of AdvBench is dropped.
    cluster = near_duplicate_clusters([row.text for row in (*rows, *held_out)])
    taken = set(cluster[: len(rows)])
    fresh = [row for row, c in zip(held_out, cluster[len(rows) :], strict=True) if c not in taken]
    return parts | {"test": parts["test"] + tuple(fresh)}


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
