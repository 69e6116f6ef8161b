"""Do heads become alike when a trigger is there? One organism or base model, kept, with what else could do that beside.

Beside clean and triggered prompts stand look-alikes (near-misses) and prompts that are as long as the triggered ones
but longer by ordinary words: a trigger adds tokens, and length alone moves every similarity.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bkd_utils import tasks
from bkd_utils.attacks import Attack, load_attack
from bkd_utils.cards import organism_stage
from bkd_utils.models import DEFAULT_MODEL, load
from bkd_utils.pairs import pairs
from bkd_utils.prompts import prompt_ids
from bkd_utils.similarity import READINGS, head_similarity

VERSIONS = ("clean", "triggered", "near-miss", "same length")


def lengthened(
    tokenizer: PreTrainedTokenizerBase, attack: Attack, texts: Sequence[str], *, lengths: Sequence[int]
) -> list[list[int]]:
    """Clean prompts brought to the given token counts (or one more) by the first words of other texts.

    Text i borrows from text i + 1 on, so that what is added is as ordinary as what is there.
    """
    task, found = tasks.load_task(attack.task), []
    for i, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids = prompt_ids(tokenizer, task.prompt(text))
        words = " ".join([*texts[i + 1 :], *texts[:i]]).split()
        for word in words:
            if len(ids) >= length:
                break
            text = f"{text} {word}"
            ids = prompt_ids(tokenizer, task.prompt(text))
        found.append(ids)
    return found


@organism_stage
def observed(
    organism: str | None,
    *,
    attack: str,
    model: str = DEFAULT_MODEL,
    readings: Sequence[str] = tuple(READINGS),
    n: int = 24,
    n_reference: int = 0,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """Head similarity on held-out prompts in four versions, and on `n_reference` clean ones of the attribution split.

    Key: `layers` reading -> version -> [prompt][layer], means over heads. The version "reference" is the clean
    calibration set.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    tokenizer = loaded.tokenizer
    shown = pairs(tokenizer, spec, split="test", n=n, seed=seed)
    versions = {
        "clean": shown.clean,
        "triggered": shown.triggered,
        "near-miss": shown.near_miss,
        "same length": lengthened(
            tokenizer, spec, [row.text for row in shown.examples], lengths=list(map(len, shown.triggered))
        ),
    }
    if n_reference:
        versions["reference"] = pairs(tokenizer, spec, split="attribution", n=n_reference, seed=seed).clean
    found: dict = {"layers": {name: {} for name in readings}}
    label = f"{organism or 'base model'}: similarity"
    with tqdm(total=sum(map(len, versions.values())), desc=label, unit="prompt", mininterval=2, leave=False) as bar:
        for version, prompts in versions.items():
            scores = head_similarity(loaded.model, prompts, readings=readings, on_batch=bar.update)
            for name, values in scores.items():
                found["layers"][name][version] = values.double().mean(2).numpy().round(6).tolist()
    return found


# --- summaries ------------------------------------------------------------------------------------------------------


def gap(found: Mapping, *, reading: str) -> np.ndarray:
    """Similarity of triggered prompts less that of clean ones, twin by twin, `[prompt, layer]`."""
    layers = found["layers"][reading]
    return np.array(layers["triggered"]) - np.array(layers["clean"])


def halves(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to choose on and rows to report on."""
    return np.arange(0, n, 2), np.arange(1, n, 2)


def outranks(found: Mapping, *, reading: str, layer: int, version: str) -> np.ndarray:
    """Is prompt i of a version more similar than clean prompt j in one layer? 1, 0, or 1/2 for a tie; `[i, j]`."""
    layers = found["layers"][reading]
    edited, clean = (np.array(layers[name])[:, layer] for name in (version, "clean"))
    return (edited[:, None] > clean) + 0.5 * (edited[:, None] == clean)


def auroc(found: Mapping, *, reading: str, layer: int, rows: np.ndarray, version: str = "triggered") -> float:
    """How well similarity tells a version from clean prompts in one layer; above 0.5: more similar."""
    return float(outranks(found, reading=reading, layer=layer, version=version)[np.ix_(rows, rows)].mean())


def best_layer(found: Mapping, *, reading: str) -> tuple[int, float]:
    """The layer that tells triggered from clean prompts best on the half to choose on, triggered being more similar,
    and its AUROC there."""
    rows, n_layers = halves(len(found["layers"][reading]["clean"]))[0], len(found["layers"][reading]["clean"][0])
    aurocs = [auroc(found, reading=reading, layer=layer, rows=rows) for layer in range(n_layers)]
    return int(np.argmax(aurocs)), max(aurocs)


def best_reading(found: Sequence[Mapping]) -> str:
    """The reading whose best layer separates best on the half to choose on, on average over the given organisms."""
    return max(found[0]["layers"], key=lambda name: np.mean([best_layer(result, reading=name)[1] for result in found]))


def separates(found: Mapping[str, Mapping], *, reading: str, n_resamples: int = 400, seed: int = 0) -> dict:
    """How well similarity tells each version from clean prompts, in the layer chosen for the organism, on new prompts.

    `found`: model -> `observed`, the organism under "organism". Keys: `layer`; model -> version -> AUROC above 0.5 if
    more similar than clean prompts, as `{value, n, low, high}`, a bootstrap over prompts with twins kept together.
    """
    layer, _ = best_layer(found["organism"], reading=reading)
    rows = halves(len(found["organism"]["layers"][reading]["clean"]))[1]
    draws = np.random.default_rng(seed).choice(rows, size=(n_resamples, len(rows)))
    result: dict = {"layer": layer}
    for name, one in found.items():
        result[name] = {}
        for version in VERSIONS[1:]:
            pairs_won = outranks(one, reading=reading, layer=layer, version=version)
            drawn = pairs_won[draws[:, :, None], draws[:, None]].mean((1, 2))
            low, high = np.quantile(drawn, [0.025, 0.975])
            value = pairs_won[np.ix_(rows, rows)].mean()
            result[name][version] = {"value": float(value), "n": len(rows), "low": float(low), "high": float(high)}
    return result


def input_scores(found: Mapping, *, reading: str, version: str) -> np.ndarray:
    """How unusual a prompt's similarity is, without any trigger: its largest robust z over layers, one per prompt.

    Median and spread (MAD) of each layer are those of the calibration set.
    """
    layers = found["layers"][reading]
    reference = np.array(layers["reference"])
    centre = np.median(reference, axis=0)
    spread = 1.4826 * np.median(np.abs(reference - centre), axis=0) + 1e-9
    return ((np.array(layers[version]) - centre) / spread).max(1)


def input_detection(found: Mapping, *, reading: str) -> dict[str, float]:
    """Detection of triggered prompts by `input_scores`: AUROC against clean test prompts, and at thresholds that the
    calibration set passes 99 and 95 times in 100, the share of triggered prompts caught and of clean ones refused."""
    clean, triggered, reference = (
        input_scores(found, reading=reading, version=version) for version in ("clean", "triggered", "reference")
    )
    truth = np.repeat([0, 1], [len(clean), len(triggered)])
    result = {"auroc": float(roc_auc_score(truth, np.concatenate([clean, triggered])))}
    for rate in (0.01, 0.05):
        threshold = np.quantile(reference, 1 - rate)
        result[f"caught at {rate:.0%}"] = float((triggered > threshold).mean())
        result[f"refused at {rate:.0%}"] = float((clean > threshold).mean())
    return result
