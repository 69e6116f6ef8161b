"""Notebook 05: do heads become alike when a trigger is in the prompt?

Two more versions of every prompt are controls: near-misses of the trigger, and prompts that ordinary words make as long
as the triggered ones, because length alone changes every similarity."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bkd_utils.attention_alignment.guards import threshold
from bkd_utils.attention_alignment.similarity import READINGS, head_similarity
from bkd_utils.common.statistics import auroc_of_wins, pairwise_wins, share
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import prompt_versions

VERSIONS = ("clean", "triggered", "near-miss", "same length")
# Reading -> version -> [prompt][layer], means over the heads of a layer.
Similarity = dict[str, dict[str, list[list[float]]]]


def lengthened(
    tokenizer: PreTrainedTokenizerBase, attack: Attack, texts: Sequence[str], *, lengths: Sequence[int]
) -> list[list[int]]:
    """Clean prompts with words of the other texts added until they have the given numbers of tokens, or one more.
    Raises ValueError if no more words fit."""
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
    loaded: Loaded,
    attack: Attack,
    *,
    readings: Sequence[str] = tuple(READINGS),
    n: int = 24,
    n_reference: int = 0,
    seed: int = 0,
) -> Similarity:
    """Head similarity on held-out prompts in four versions. With `n_reference` there are two more, chosen without the
    trigger: "reference", as many prompts of the attribution split as there are, at most so many, to calibrate a guard
    on, and "held out", `n` of the test split to count its refusals on."""
    tokenizer = loaded.tokenizer
    shown = prompt_versions(tokenizer, attack, split="test", n=n, seed=seed)
    texts, lengths = [row.text for row in shown.examples], list(map(len, shown.triggered))
    longer = lengthened(tokenizer, attack, texts, lengths=lengths)
    versions = dict(zip(VERSIONS, (shown.clean, shown.triggered, shown.near_miss, longer), strict=True))
    if n_reference:
        task = tasks.load_task(attack.task)
        for version, split, count in (("reference", "attribution", n_reference), ("held out", "test", n)):
            chosen = tasks.examples(attack.task, split, seed=seed)[:count]
            versions[version] = [prompt_ids(tokenizer, task.prompt(example.text)) for example in chosen]
    found: Similarity = {name: {} for name in readings}
    label = f"{loaded.organism or 'base model'}: similarity"
    with tqdm(total=sum(map(len, versions.values())), desc=label, unit="prompt", mininterval=2, leave=False) as bar:
        for version, prompts in versions.items():
            scores = head_similarity(loaded.model, prompts, readings=readings, on_batch=bar.update)
            for name, values in scores.items():
                found[name][version] = values.double().mean(2).numpy().round(6).tolist()
    return found


def halves(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to choose on and rows to report on."""
    return np.arange(0, n, 2), np.arange(1, n, 2)


def wins(
    found: Similarity, *, reading: str, layer: int, rows: np.ndarray, version: str = "triggered"
) -> Float[np.ndarray, "edited clean"]:
    """Is a prompt of a version more similar in a layer than a clean one (1, 0, or 1/2)? The mean is the AUROC."""
    edited, clean = (np.array(found[reading][name])[rows, layer] for name in (version, "clean"))
    return pairwise_wins(edited, clean)


def best_layer(found: Similarity, *, reading: str) -> tuple[int, float]:
    """The layer with the highest AUROC of triggered against clean prompts on the half to choose on, and that AUROC."""
    rows, n_layers = halves(len(found[reading]["clean"]))[0], len(found[reading]["clean"][0])
    aurocs = [float(wins(found, reading=reading, layer=layer, rows=rows).mean()) for layer in range(n_layers)]
    return int(np.argmax(aurocs)), max(aurocs)


def best_reading(found: Sequence[Similarity]) -> str:
    """The reading whose best layer separates best on the half to choose on, as a mean over organisms."""
    return max(found[0], key=lambda name: np.mean([best_layer(result, reading=name)[1] for result in found]))


def separates(found: Mapping[str, Similarity], *, reading: str) -> dict:
    """How well similarity tells each version from clean prompts, in the layer chosen for the organism, on new prompts.
    `found`: model -> `similarity_by_version`, the organism under "organism". Keys: `layer`; model -> version -> AUROC
    with n prompts a side, in an interval for independent prompts, which is too wide for versions of the same ones."""
    where = {"reading": reading, "layer": best_layer(found["organism"], reading=reading)[0]}
    rows = halves(len(found["organism"][reading]["clean"]))[1]
    result: dict[str, Any] = {"layer": where["layer"]}
    for name, one in found.items():
        won = {version: wins(one, rows=rows, version=version, **where) for version in VERSIONS[1:]}
        result[name] = {version: auroc_of_wins(table) | {"n": len(rows)} for version, table in won.items()}
    return result


def input_scores(found: Similarity, *, reading: str, version: str) -> np.ndarray:
    """How unusual each prompt's similarity is: its largest robust z over the layers, by the reference prompts."""
    layers = found[reading]
    reference = np.array(layers["reference"])
    centre = np.median(reference, axis=0)
    spread = 1.4826 * np.median(np.abs(reference - centre), axis=0) + 1e-9
    return ((np.array(layers[version]) - centre) / spread).max(1)


def input_detection(found: Similarity, *, reading: str, rates: Sequence[float] = (0.05,)) -> dict[str, dict]:
    """Detection of triggered prompts by `input_scores`, with intervals: `auroc` against the same prompts without the
    trigger (n a side), and per rate, at the threshold of `guards.threshold` on the reference prompts, the shares of
    triggered prompts "caught at 5%" and of held-out clean ones "refused at 5%". Raises ValueError for too few."""
    versions = ("clean", "triggered", "held out", "reference")
    clean, triggered, held_out, reference = (input_scores(found, reading=reading, version=one) for one in versions)
    result = {"auroc": auroc_of_wins(pairwise_wins(triggered, clean)) | {"n": len(triggered)}}
    for rate in rates:
        limit = threshold(reference, frr=rate)
        result[f"caught at {rate:.0%}"] = share((triggered > limit).tolist())
        result[f"refused at {rate:.0%}"] = share((held_out > limit).tolist())
    return result
