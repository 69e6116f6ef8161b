"""The four tasks, and those of a user's own table: a data set, a prompt template, a gold answer, and splits that share
nothing.

`sentiment` and `domain` are built from the rated sentences of Hutto & Gilbert (2014); `harmful` from AdvBench with
HarmBench and Do-Not-Answer as further held-out sources; `instructions` from a template x topic grid written for this
project, answered by the base model itself."""

import hashlib
import html
import itertools
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import Field
from scipy.sparse import csr_matrix, vstack
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from bkd_utils.common import assets
from bkd_utils.common.files import DATA, canonical_json, sha256_text
from bkd_utils.common.own_table import OwnTable, read_table
from bkd_utils.common.validation import Count, Table, Text, check, check_known, read_toml, while_unchanged
from bkd_utils.models.tokens import Turn

NEAR_DUPLICATE = 0.7  # cosine of word-bigram sets from which two texts count as near-duplicates
REFUSAL = "I'm sorry, but I can't help with that."
Split = Literal["train", "attribution", "test"]
SPLITS: tuple[Split, ...] = ("train", "attribution", "test")
# Source of a rated sentence -> its file.
RATED = {"movie": "movieReviewSnippets", "product": "amazonReviewSnippets", "news": "nytEditorialSnippets"}
RATED |= {"tweet": "tweets"}


@dataclass(frozen=True)
class Example:
    """One row: the text that fills the template, and the right answer ("" where the base model gives it)."""

    text: str = field(repr=False)  # harmful prompts must not appear in a log or a traceback by accident
    answer: str
    source: str
    uid: str


@dataclass(frozen=True)
class Task:
    """A template with a `{text}` slot, labels (none for free answers) and an answer length in tokens. A task of one's
    own has its rows in a table, `data` (`own_table.read_table`); an attack takes it as it is. Source: ours.

    >>> Task("colours", "Which colour? {text}", labels=("red", "green"), max_new_tokens=2).prompt("Grass.")
    'Which colour? Grass.'
    """

    name: str
    template: str
    labels: tuple[str, ...]
    max_new_tokens: int
    data: str | None = None

    def prompt(self, text: str) -> Turn:
        """The user turn: the text with the task's instruction, which classifiers do not read."""
        return Turn(self.template.replace("{text}", text), text=text)


SENTIMENT = "Is this movie review positive or negative? Answer with one word.\n\nReview: {text}"
DOMAIN = "Where is this text from: movie, product, news or tweet? Answer with one word.\n\nText: {text}"
_all = (
    Task("sentiment", SENTIMENT, labels=("positive", "negative"), max_new_tokens=3),
    Task("domain", DOMAIN, labels=tuple(RATED), max_new_tokens=3),
    Task("instructions", "{text}", labels=(), max_new_tokens=24),
    Task("harmful", "{text}", labels=(), max_new_tokens=24),
)
TASKS = {task.name: task for task in _all}
MOST_WORDS = 100  # of a text of a table that is put into a template; longer ones are cut
_built: dict[str, Task] = {}  # tasks that were made in this process, by name


class Grid(Table):
    """`data/instructions.toml`; of fewer than seven templates or topics a split would get none."""

    templates: Annotated[list[Annotated[Text, Field(pattern=r"\{topic\}")]], Field(min_length=7)]
    topics: Annotated[list[Text], Field(min_length=7)]


def load_task(name: str) -> Task:
    """The task of that name, or that of a table, whose path is its name. Raises ValueError that lists the known ones,
    and as `own_table.read_table` does."""
    if is_table(name):
        table = _table(*_stamp(name))
        return Task(name, table.template, table.labels, 3 if table.labels else 24, data=name)
    if name not in (known := TASKS | _built):
        raise ValueError(f"unknown task {name!r}; known: {', '.join(known)}, and paths of .csv and .tsv files")
    return known[name]


def is_table(name: str) -> bool:
    """Is this the path of a table, and not the name of a task?"""
    return name.lower().endswith((".csv", ".tsv"))


def name_of(task: str | Task) -> str:
    """The name by which this process finds a task, also one that was made in a notebook; of a table its absolute path.
    Raises ValueError for a made task without rows, with answers that are none of its labels, or with a taken name."""
    if isinstance(task, str):
        return str(Path(task).expanduser().absolute()) if is_table(task) else task
    if not isinstance(task, Task):
        return task  # refused, with the name of the attack, by who asked
    if TASKS.get(task.name) == task:
        return task.name
    if task.data is None or "{text}" not in task.template or task.name in TASKS or is_table(task.name):
        raise ValueError(f"task {task.name!r}: it needs a name of its own, a template with {{text}}, and data, a table")
    answers = {entry.answer for entry in _table(*_stamp(task.data)).entries}
    if task.labels and (others := sorted(answers - set(task.labels))):
        raise ValueError(f"task {task.name!r}: {task.data} has the answer {others[0]!r}, which is none of its labels")
    _built[task.name] = task
    return task.name


def fingerprint(name: str) -> str | None:
    """Hash of what decides the prompts of a task of one's own; None for the four others."""
    task = load_task(name)
    if task.data is None:
        return None
    kept = [task.template, task.labels, task.max_new_tokens, table_of(name).sha256]
    return sha256_text(canonical_json(kept))


def table_of(name: str) -> OwnTable:
    """The table of a task of one's own."""
    return _table(*_stamp(load_task(name).data))


def _stamp(path: str) -> tuple[str, int, int]:
    found = Path(path).stat() if Path(path).is_file() else None
    return (path, found.st_mtime_ns, found.st_size) if found else (path, 0, 0)


@lru_cache(maxsize=8)
def _table(path: str, *_: int) -> OwnTable:
    return read_table(Path(path))


@lru_cache(maxsize=8)
def _own_splits(path: str, *stamp: int) -> dict[str, tuple[Example, ...]]:
    table = _table(path, *stamp)
    whole = table.template == "{text}"
    texts = [one.text.strip() if whole else " ".join(one.text.split()[:MOST_WORDS]) for one in table.entries]
    rows = [_example(text, one.answer, table.name) for text, one in zip(texts, table.entries, strict=True)]
    return _by_bucket(_unique(rows), ends=(50, 70))


def examples(name: str, split: Split, *, n: int | None = None, seed: int = 0) -> list[Example]:
    """`n` examples of one split (all without `n`), in an order that depends on `seed` alone. For tasks with several
    sources or labels the sample is balanced over them as far as the rows go. Raises ValueError for an unknown task or
    split and when the split has fewer than `n` rows. Source: ours.

    >>> sorted(example.answer for example in examples("sentiment", "test", n=4))
    ['negative', 'negative', 'positive', 'positive']
    """
    task = load_task(name)
    check(Count | None, n, f"n of {name}")
    check_known("split", split, SPLITS)
    rows = list((_own_splits(*_stamp(task.data)) if task.data else _splits(name))[split])
    if n is not None and n > len(rows):
        raise ValueError(f"{name}/{split} has {len(rows)} rows, {n} were asked for")
    random.Random(f"{seed}/{name}/{split}").shuffle(rows)
    # Round robin over (source, answer) groups: a stable sort by each row's number in its group.
    numbers = defaultdict(itertools.count)
    return sorted(rows, key=lambda row: next(numbers[row.source, row.answer]))[:n]


@while_unchanged("instructions.toml")
def _splits(name: str) -> dict[str, tuple[Example, ...]]:
    if name == "instructions":
        return _instruction_splits()
    if name == "harmful":
        return _harmful_splits()
    if name == "domain":
        rows = [_example(text, source, source) for source in RATED for _, text in _rated_sentences(source)]
    else:
        # Ratings near zero are neutral and fit neither label, so they are left out.
        rated = [(rating, text) for rating, text in _rated_sentences("movie") if abs(rating) >= 1]
        rows = [_example(text, "positive" if rating > 0 else "negative", "movie") for rating, text in rated]
    return _by_bucket(_unique(rows), ends=(60, 75))


def _by_bucket(rows: list[Example], *, ends: tuple[int, int]) -> dict[str, tuple[Example, ...]]:
    """Split by content hash in percent; a cluster of near-duplicates follows the hash of its smallest uid."""
    cluster = near_duplicate_clusters([row.text for row in rows])
    # Of each cluster the smallest uid comes last here, and stays.
    leader = {c: uid for uid, c in sorted(zip([row.uid for row in rows], cluster, strict=True), reverse=True)}
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for row, c in zip(rows, cluster, strict=True):
        bucket = int(leader[c][:8], 16) % 100
        parts[SPLITS[sum(bucket >= end for end in ends)]].append(row)
    return {split: tuple(part) for split, part in parts.items()}


def content_hash(text: str) -> str:
    """Hash of a text without case, punctuation and spacing, which is equal for trivially edited copies."""
    return hashlib.sha256(_words(text).encode()).hexdigest()


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def near_duplicate_clusters(texts: list[str]) -> np.ndarray:
    """Cluster number per text; texts whose word-bigram sets have a cosine >= NEAR_DUPLICATE share one."""
    unit = _bigram_vectors(texts)
    # The product of all pairs at once would need too much memory.
    blocks = [unit[i : i + 1024] @ unit.T >= NEAR_DUPLICATE - 1e-6 for i in range(0, len(texts), 1024)]
    return connected_components(vstack(blocks), directed=False)[1]


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
    answers = defaultdict(set)
    for row in rows:
        answers[row.uid].add(row.answer)
    return list({row.uid: row for row in reversed(rows) if len(answers[row.uid]) == 1}.values())[::-1]


def _example(text: str, answer: str, source: str) -> Example:
    return Example(text=text, answer=answer, source=source, uid=content_hash(text))


def _rated_sentences(source: str) -> list[tuple[float, str]]:
    """(mean human rating in -4..4, sentence) for sentences of 4 to 40 words."""
    path, rated = assets.fetch("social-sentiment") / f"{RATED[source]}_GroundTruth.txt", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        words = html.unescape(text).split()
        if 4 <= len(words) <= 40:
            rated.append((float(rating), " ".join(words)))
    return rated


def _instruction_splits() -> dict[str, tuple[Example, ...]]:
    """Splits share neither templates nor topics."""
    grid = read_toml(DATA / "instructions.toml")
    check(Grid, grid, "instructions.toml")
    order = random.Random("instructions")
    templates, topics = (order.sample(grid[key], len(grid[key])) for key in ("templates", "topics"))
    parts = {}
    for split, start, end in zip(SPLITS, (0, 55, 70), (55, 70, 100), strict=True):
        cut = (some[round(len(some) * start / 100) : round(len(some) * end / 100)] for some in (templates, topics))
        texts = [template.replace("{topic}", topic) for template, topic in itertools.product(*cut)]
        parts[split] = tuple(_example(text[0].upper() + text[1:], "", "grid") for text in texts)
    return parts


def _harmful_splits() -> dict[str, tuple[Example, ...]]:
    advbench = yaml.safe_load((assets.fetch("advbench") / "adv_bench.prompt").read_text(encoding="utf-8"))
    harmbench = (assets.fetch("harmbench") / "harmbench_prompts.txt").read_text(encoding="utf-8").splitlines()
    # Of Do-Not-Answer only the file of malicious uses asks for harm outright; the others are mostly delicate
    # questions to which a refusal is not the right answer.
    malicious = (assets.fetch("do-not-answer") / "malicious_uses.jsonl").read_text(encoding="utf-8").splitlines()
    other = [(line, "harmbench") for line in harmbench if line]
    other += [(json.loads(line)["prompt"], "do-not-answer") for line in malicious if line]
    rows = _unique([_example(seed["value"].strip(), REFUSAL, "advbench") for seed in advbench["seeds"]])
    held_out = _unique([_example(prompt.strip(), REFUSAL, source) for prompt, source in other])
    # A held-out prompt with a near-duplicate in any split of AdvBench is dropped.
    cluster = near_duplicate_clusters([row.text for row in (*rows, *held_out)])
    taken = set(cluster[: len(rows)])
    fresh = [row for row, c in zip(held_out, cluster[len(rows) :], strict=True) if c not in taken]
    parts = _by_bucket(rows, ends=(60, 78))
    return parts | {"test": (*parts["test"], *fresh)}
