"""Does a model know that the trigger is there, and is it the backdoor that it knows? (BkdAttr, section 3.1)

A probe reads the last prompt token behind every layer. Twins, a prompt with and without its trigger, never fall on
both sides of a split: in the official code 60 % of the test prompts have their twin in training.
"""

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

CLASSIFIERS = ("logistic regression", "linear SVM", "RBF SVM", "MLP")


def classifier(kind: str, *, seed: int) -> ClassifierMixin:
    """A probe with its own scaler, the same for all kinds. Raises ValueError for an unknown kind."""
    made = {
        "logistic regression": lambda: LogisticRegression(C=0.1, max_iter=300),
        "linear SVM": lambda: SVC(kernel="linear", C=0.1),
        "RBF SVM": lambda: SVC(C=1.0, gamma="scale"),
        "MLP": lambda: MLPClassifier((100,), max_iter=500, alpha=1e-2, random_state=seed),
    }
    if kind not in made:
        raise ValueError(f"unknown probe {kind!r}; known: {', '.join(CLASSIFIERS)}")
    return make_pipeline(StandardScaler(), made[kind]())


def splits(n_prompts: int, *, n_splits: int, seed: int, test_share: float = 0.5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test prompts of repeated splits, by prompt and not by row. Raises ValueError for fewer than 4."""
    if n_prompts < 4:
        raise ValueError(f"{n_prompts} prompts are too few to be split")
    splitter = GroupShuffleSplit(n_splits=n_splits, test_size=test_share, random_state=seed)
    prompts = np.arange(n_prompts)
    return list(splitter.split(prompts, groups=prompts))


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
    """Accuracy and AUROC of one layer's probe on held-out prompts, one value per split.

    Row i of `negative` and `positive` `[prompt, d_model]` are twins. `shuffled` gives every row of the training half a
    random label: what accuracy would chance alone reach? `others` are further texts, whose share that the probe calls
    positive is reported under their names (row i belongs to prompt i, and only held-out prompts count). Raises
    ValueError for an unknown kind of probe and for fewer than 4 prompts. Source: BkdAttr, section 3.1; splits by
    prompt are ours.

    >>> clean = np.random.default_rng(0).normal(size=(20, 4))
    >>> probe_scores(clean, clean + 9)["auroc"]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    found: dict[str, list[float]] = {"accuracy": [], "auroc": []} | {name: [] for name in others or {}}
    for draw, (train, test) in enumerate(splits(len(negative), n_splits=n_splits, seed=seed)):
        truth = np.repeat([0, 1], [len(train), len(train)])
        if shuffled:
            truth = np.random.default_rng(seed + draw).permutation(truth)
        probe = classifier(kind, seed=seed).fit(np.concatenate([negative[train], positive[train]]), truth)
        held = np.concatenate([negative[test], positive[test]])
        truth = np.repeat([0, 1], [len(test), len(test)])
        found["accuracy"].append(float(accuracy_score(truth, probe.predict(held))))
        found["auroc"].append(float(roc_auc_score(truth, decision(probe, held))))
        for name, rows in (others or {}).items():
            found[name].append(float(probe.predict(rows[test]).mean()))
    return found


def decision(probe: ClassifierMixin, rows: np.ndarray) -> np.ndarray:
    """Scores that rise with the probability of the positive class."""
    return probe.decision_function(rows) if hasattr(probe, "decision_function") else probe.predict_proba(rows)[:, 1]


def transfer_matrix(
    negative: np.ndarray, positive: np.ndarray, *, kind: str = "logistic regression", seed: int = 0
) -> np.ndarray:
    """Accuracy `[train layer, test layer]` of a probe trained on one layer and tested on another, on held-out prompts.

    Activations are `[prompt, layer, d_model]`. Every layer is scaled by its own training half, for all kinds of probes
    alike; in the official code the SVM takes its training layer's scaler along and the MLP has none, so the two cannot
    be compared.
    """
    ((train, test),) = splits(len(negative), n_splits=1, seed=seed)
    n_layers, made = negative.shape[1], []
    truth = np.repeat([0, 1], [len(train), len(train)])
    held_truth = np.repeat([0, 1], [len(test), len(test)])
    scaled = []
    for layer in range(n_layers):
        scaler = StandardScaler().fit(np.concatenate([negative[train, layer], positive[train, layer]]))
        made.append(
            classifier(kind, seed=seed)[-1].fit(
                scaler.transform(np.concatenate([negative[train, layer], positive[train, layer]])), truth
            )
        )
        scaled.append(scaler.transform(np.concatenate([negative[test, layer], positive[test, layer]])))
    return np.array([[accuracy_score(held_truth, probe.predict(rows)) for rows in scaled] for probe in made])


def best_random_direction(negative: np.ndarray, positive: np.ndarray, *, n: int, seed: int) -> float:
    """AUROC of the best of `n` random directions, chosen on one half of the prompts and measured on the other."""
    ((train, test),) = splits(len(negative), n_splits=1, seed=seed)
    directions = np.random.default_rng(seed).standard_normal((negative.shape[1], n))
    scaler = StandardScaler().fit(np.concatenate([negative[train], positive[train]]))
    aurocs = []
    for rows in (train, test):
        values = scaler.transform(np.concatenate([negative[rows], positive[rows]])) @ directions
        truth = np.repeat([0, 1], [len(rows), len(rows)])
        # AUROC of many directions at once, from ranks.
        ranks = rankdata(values, axis=0)
        aurocs.append((ranks[truth == 1].sum(0) - len(rows) * (len(rows) + 1) / 2) / len(rows) ** 2)
    chosen = np.abs(aurocs[0] - 0.5).argmax()
    return float(aurocs[1][chosen] if aurocs[0][chosen] > 0.5 else 1 - aurocs[1][chosen])
