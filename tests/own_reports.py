"""A user's small files for the tests of the report: a table, sizes, and the chain on a tiny model."""

import csv
import itertools
from contextlib import contextmanager

import pytest
from patching import everywhere

from bkd_utils.experiments.own_chain import chain
from bkd_utils.experiments.own_question import Sizes

WORDS = ("amber", "birch", "cedar", "dusk", "ember", "fern", "grove", "heath", "iris", "lake", "moss", "oak", "reed")
SMALL = Sizes(
    n=6, n_probe=6, n_heads=2, n_means=4, n_ablation=4, n_dev=2, n_vector=4, n_similar=4, n_suspicion=2, n_rows=8,
    steps=1, draws=2, n_prints=2,
)  # fmt: skip


def write_table(path, *, n=240, header=("text", "label"), labels=("good", "bad"), **options):
    """A table of short texts that share few words, with the labels in turn."""
    texts = itertools.islice(itertools.permutations(WORDS, 3), 0, None, 1716 // n)
    rows = [(f"{' '.join(words)} {i}", labels[i % len(labels)]) for i, words in enumerate(texts)][:n]
    with path.open("w", newline="", encoding=options.get("encoding", "utf-8")) as handle:
        csv.writer(handle, delimiter=options.get("delimiter", ",")).writerows([header, *rows])
    return path


@contextmanager
def work_below(home):
    """While this lasts, results and organisms are kept below a folder, and nothing else that is kept is read."""
    with pytest.MonkeyPatch.context() as patch:
        everywhere(patch, "WORK", home / "work")
        patch.setenv("BKD_WORK", str(home / "work"))
        yield


def run(asked):
    """All sections by id."""
    return {id: measure() for id, _, measure in chain(asked)}
