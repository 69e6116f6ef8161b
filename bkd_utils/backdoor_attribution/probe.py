"""Probes: can the trigger be detected in the residual stream, and is it more than the words? (BkdAttr, section 3.1)

A probe classifies the residual stream at the last prompt token after a layer. A prompt with and without its trigger is
on one side of a split; in the official code, 60 % of the test prompts have their other version in training."""

from collections.abc import Mapping

import numpy as np
from scipy.stats import rankdata
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from bkd_utils.common.validation import Count, check, check_known, check_shape

CLASSIFIERS = {
    "logistic regression": lambda seed: LogisticRegression(C=0.1, max_iter=300),
    "linear SVM": lambda seed: SVC(kernel="linear", C=0.1),
    "RBF SVM": lambda seed: SVC(C=1.0, gamma="scale"),
    "MLP": lambda seed: MLPClassifier((100,), max_iter=500, alpha=1e-2, random_state=seed),
}


def classifier(kind: str, *, seed: int) -> ClassifierMixin:
    """A classifier behind a scaler. Raises ValueError for an unknown kind."""
    check_known("probe", kind, CLASSIFIERS)
    return make_pipeline(StandardScaler(), CLASSIFIERS[kind](seed))


def check_twins(negative: np.ndarray, positive: np.ndarray, **axes: None) -> None:
    """Raise ValueError unless both have these axes and the same shape, and finite values."""
    check_shape("negative", negative, **axes)
    check_shape("positive", positive, **dict(zip(axes, negative.shape, strict=True)))


def splits(n_prompts: int, *, n_splits: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test halves of the prompts in repeated splits. ValueError for fewer than 4 prompts or 1 split."""
    check(Count, n_splits, "n_splits")
    if n_prompts < 4:
        raise ValueError(f"{n_prompts} prompts are too few to be split")
    splitter = GroupShuffleSplit(n_splits=n_splits, test_size=0.5, random_state=seed)
    return list(splitter.split(range(n_prompts), groups=range(n_prompts)))


def labelled(negative: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both classes and their labels, 0 and 1."""
    return np.concatenate([negative, positive]), np.repeat([0, 1], [len(negative), len(positive)])


def probe_scores(
    negative: np.ndarray,
    positive: np.ndarray,
    *,
    kind: str = "logistic regression",
    n_splits: int = 5,
    seed: int = 0,
    shuffled: bool = False,
    others: Mapping[str, np.ndarray] | None = None,
) -> dict[str, list[float]]:
    """Accuracy, AUROC and separation of one layer's probe on held-out prompts, one value per split. The separation (d')
    is the difference of the mean scores of positive and negative rows, in units of their pooled standard deviation. It
    goes on growing where accuracy and AUROC have reached 1.

    Row i of `negative` and `positive` `[prompt, d_model]` are twins. `shuffled` gives the training half random labels.
    `others` are further texts of the same prompts by name; what is reported is the share of them, on held-out prompts,
    that the probe calls positive. Raises ValueError for an unknown kind of probe, for fewer than 4 prompts, and for
    rows that differ in shape or are not finite. Source: BkdAttr, section 3.1; splits by prompt are ours.

    >>> clean = np.random.default_rng(0).normal(size=(20, 4))
    >>> probe_scores(clean, clean + 9)["auroc"]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    check_twins(negative, positive, prompt=None, width=None)
    for name, rows in (others or {}).items():
        check_shape(f"others {name!r}", rows, prompt=len(negative), width=negative.shape[1])
    found: dict[str, list[float]] = {name: [] for name in ("accuracy", "auroc", "separation", *(others or {}))}
    for draw, (train, test) in enumerate(splits(len(negative), n_splits=n_splits, seed=seed)):
        rows, truth = labelled(negative[train], positive[train])
        if shuffled:
            truth = np.random.default_rng(seed + draw).permutation(truth)
        probe = classifier(kind, seed=seed).fit(rows, truth)
        held, truth = labelled(negative[test], positive[test])
        found["accuracy"].append(float(accuracy_score(truth, probe.predict(held))))
        # An MLP has no decision function.
        scores = probe.predict_proba(held)[:, 1] if kind == "MLP" else probe.decision_function(held)
        found["auroc"].append(float(roc_auc_score(truth, scores)))
        apart, spread = (np.array([f(scores[truth == label]) for label in (0, 1)]) for f in (np.mean, np.var))
        found["separation"].append(float((apart[1] - apart[0]) / np.sqrt(max(spread.mean(), 1e-12))))
        for name, rows in (others or {}).items():
            found[name].append(float(probe.predict(rows[test]).mean()))
    return found


def transfer_matrix(
    negative: np.ndarray, positive: np.ndarray, *, kind: str = "logistic regression", seed: int = 0
) -> np.ndarray:
    """Accuracy `[train layer, test layer]` of a probe trained on one layer and tested on another, on held-out prompts.
    Activations are `[prompt, layer, d_model]`. Every layer is scaled by its own training half. In the official code the
    SVM keeps the scaler of its training layer and the MLP has none, so the two cannot be compared."""
    check_twins(negative, positive, prompt=None, layer=None, width=None)
    ((train, test),) = splits(len(negative), n_splits=1, seed=seed)
    probes, scaled = [], []
    for layer in range(negative.shape[1]):
        rows, truth = labelled(negative[train, layer], positive[train, layer])
        held, held_truth = labelled(negative[test, layer], positive[test, layer])
        scaler = StandardScaler().fit(rows)
        probes.append(classifier(kind, seed=seed)[-1].fit(scaler.transform(rows), truth))
        scaled.append(scaler.transform(held))
    return np.array([[accuracy_score(held_truth, probe.predict(rows)) for rows in scaled] for probe in probes])


def best_random_direction(negative: np.ndarray, positive: np.ndarray, *, n: int, seed: int) -> float:
    """AUROC of the best of `n` random directions, chosen on one half of the prompts and measured on the other."""
    check(Count, n, "n")
    check_twins(negative, positive, prompt=None, width=None)
    ((train, test),) = splits(len(negative), n_splits=1, seed=seed)
    directions = np.random.default_rng(seed).standard_normal((negative.shape[1], n))
    scaler = StandardScaler().fit(labelled(negative[train], positive[train])[0])
    aurocs = []
    for half in (train, test):
        rows, truth = labelled(negative[half], positive[half])
        # AUROC of many directions at once, from ranks.
        ranks = rankdata(scaler.transform(rows) @ directions, axis=0)
        aurocs.append((ranks[truth == 1].sum(0) - len(half) * (len(half) + 1) / 2) / len(half) ** 2)
    chosen = np.abs(aurocs[0] - 0.5).argmax()
    return float(aurocs[1][chosen] if aurocs[0][chosen] > 0.5 else 1 - aurocs[1][chosen])
