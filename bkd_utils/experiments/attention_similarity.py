"""Do heads become alike when a trigger is there? One organism or base model, kept, with what else could do that beside.

Beside clean and triggered prompts stand look-alikes (near-misses) and prompts that are as long as the triggered ones
but longer by ordinary words: a trigger adds tokens, and length alone moves every similarity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bkd_utils.attention_alignment.guards import threshold
from bkd_utils.attention_alignment.similarity import READINGS, head_similarity
from bkd_utils.common.statistics import area_interval, share
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.loading import load
from bkd_utils.models.tokens import prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import prompt_versions

VERSIONS = ("clean", "triggered", "near-miss", "same length")


def lengthened(
    tokenizer: PreTrainedTokenizerBase, attack: Attack, texts: Sequence[str], *, lengths: Sequence[int]
) -> list[list[int]]:
    """Clean prompts brought to the given token counts (or one more) by the first words of other texts that fit.

    Text i borrows from text i + 1 on, if need be more than once, so that what is added is as ordinary as what is there.
    A prompt that is as long already stays as it is. Raises ValueError if no more words fit.
    """
    task, found = tasks.load_task(attack.task), []
    for i, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids = prompt_ids(tokenizer, task.prompt(text))
        words = " ".join([*texts[i + 1 :], *texts[:i]] * 4).split()
        for word in words:
            if len(ids) >= length:
                break
            longer = prompt_ids(tokenizer, task.prompt(f"{text} {word}"))
            if len(longer) <= length + 1:  # the last words may have several tokens
                text, ids = f"{text} {word}", longer
        if len(ids) < length:
            raise ValueError(f"no words to bring prompt {i} from {len(ids)} to {length} tokens")
        found.append(ids)
    return found


@organism_stage
def similarity_by_version(
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
    """Head similarity on held-out prompts in four versions; for input detection on clean prompts of two splits too.

    Key: `layers` reading -> version -> [prompt][layer], means over heads. With `n_reference`, the version "reference"
    is as many prompts of the attribution split, or all there are, to calibrate on, and "held out" are `n` of the test
    split to count refusals on. Both are whatever the task has: a defender knows neither the trigger, by which the four
    versions' examples are chosen, nor whose answers it changes.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    tokenizer = loaded.tokenizer
    shown = prompt_versions(tokenizer, spec, split="test", n=n, seed=seed)
    versions = {
        "clean": shown.clean,
        "triggered": shown.triggered,
        "near-miss": shown.near_miss,
        "same length": lengthened(
            tokenizer, spec, [row.text for row in shown.examples], lengths=list(map(len, shown.triggered))
        ),
    }
    if n_reference:
        task = tasks.load_task(spec.task)
        for version, split, count in (("reference", "attribution", n_reference), ("held out", "test", n)):
            chosen = tasks.examples(spec.task, split, seed=seed)[:count]
            versions[version] = [prompt_ids(tokenizer, task.prompt(example.text)) for example in chosen]
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


def separates(found: Mapping[str, Mapping], *, reading: str) -> dict:
    """How well similarity tells each version from clean prompts, in the layer chosen for the organism, on new prompts.

    `found`: model -> `similarity_by_version`, the organism under "organism". Keys: `layer`; model -> version ->
    AUROC above 0.5 if more similar than clean prompts, as `{value, n, low, high}` with n prompts a side. The
    interval is that of independent prompts, which makes it wide for twins.
    """
    layer, _ = best_layer(found["organism"], reading=reading)
    rows = halves(len(found["organism"]["layers"][reading]["clean"]))[1]
    result: dict = {"layer": layer}
    for name, one in found.items():
        result[name] = {}
        for version in VERSIONS[1:]:
            value = auroc(one, reading=reading, layer=layer, rows=rows, version=version)
            span = area_interval(value, n_bad=len(rows), n_good=len(rows))
            result[name][version] = {"value": value, "n": len(rows), **span}
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


def input_detection(found: Mapping, *, reading: str, rates: Sequence[float] = (0.05,)) -> dict[str, dict]:
    """Detection of triggered prompts by `input_scores`, every number as `{value, n, low, high}`.

    `auroc` against the clean twins (n prompts a side); for each rate, at the threshold that `guards.threshold` sets on
    the reference prompts, the share of triggered prompts `caught` and of held-out clean prompts `refused`, keys "caught
    at 5%". Raises ValueError for a rate below one reference prompt: of 60, one is 1.7 %.
    """
    clean, triggered, held_out, reference = (
        input_scores(found, reading=reading, version=version)
        for version in ("clean", "triggered", "held out", "reference")
    )
    truth = np.repeat([0, 1], [len(clean), len(triggered)])
    value = float(roc_auc_score(truth, np.concatenate([clean, triggered])))
    span = area_interval(value, n_bad=len(triggered), n_good=len(clean))
    result = {"auroc": {"value": value, "n": len(triggered), **span}}
    for rate in rates:
        limit = threshold(reference, frr=rate)
        result[f"caught at {rate:.0%}"] = asdict(share((triggered > limit).tolist()))
        result[f"refused at {rate:.0%}"] = asdict(share((held_out > limit).tolist()))
    return result
