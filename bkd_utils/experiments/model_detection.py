"""Notebook 07: is this model backdoored? Numbers per model, without the trigger and without a reference model."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES, reaction
from bkd_utils.attention_alignment.suspicion import robust_z
from bkd_utils.common.statistics import pairwise_wins
from bkd_utils.experiments.head_safety import check_unseen, probed_prompts, unseen_examples
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError
from bkd_utils.models.generation import first_logits
from bkd_utils.models.identity import model_identity
from bkd_utils.models.loading import Loaded, read_card, shipped_organisms
from bkd_utils.models.tokens import end_id, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.making import make
from bkd_utils.organisms.poisoning import training_uids
from bkd_utils.organisms.training import load_recipe
from bkd_utils.organisms.triggers import load_trigger

READINGS_OF_MODELS = ("last row", "head outputs")


def population(
    names: Sequence[str] = (), *, model: str = DEFAULT_MODEL, recipe: str = "seed", device: str = "auto"
) -> dict[str, dict]:
    """Organism -> card, of shipped organisms, or of ones trained here for other weights. If none is named, these are
    all that ship. Only those that are trained here need the recipe. Raises ModelError for a name that is not
    shipped."""
    known, own = shipped_organisms(), shipped_organisms(base=model_identity(model))
    if unknown := [name for name in names if name not in known]:
        raise ModelError(f"unknown organism {unknown[0]!r}; shipped: {', '.join(known)}")
    found = {}
    for name in names or known:
        card = read_card(name, "attack", "seed")
        if name not in own:
            attack = load_attack(card["attack"]["name"])
            how = {"recipe": load_recipe(recipe, task=attack.task), "seed": card["seed"]}
            folder = make(attack, model=model, **how, device=device, n=16)
            name, card = folder.name, read_card(folder)
        found[name] = card
    return found


def count_unseen(card: Mapping) -> int:
    """How many examples of the training split of its task an organism was not trained on."""
    pool = {example.uid for example in tasks.examples(card["task"], "train")}
    return len(pool - training_uids(Attack(**card["attack"]), seed=card["seed"]))


@organism_stage
def fingerprint_model(loaded: Loaded, *, task: str, n: int = 6, rounds: int = 1, seed: int = 0) -> dict[str, float]:
    """Numbers that might betray a backdoor, from `n` clean prompts of the model's task and surrogates on them. The
    prompts are `unseen_examples` of the model itself, so that organisms of one task need not have the same ones. For
    each reading of similarity: its `level` on clean prompts, its mean `reaction` to surrogates, and the `outlier` of
    both, which is the largest robust z of a head in its layer. `answer moves`: by how much surrogates change the
    distribution of the first answer token (total variation, mean). Raises ValueError for too few prompts."""
    spec = tasks.load_task(task)
    chosen = unseen_examples(loaded, None, task=task, n=n, seed=seed)
    check_unseen(loaded, [example.uid for example in chosen], attack=None, seed=seed)
    texts = [example.text for example in chosen]
    clean = [prompt_ids(loaded.tokenizer, spec.prompt(text)) for text in texts]
    probed, how = [], {"rounds": rounds, "seed": seed}
    for family in SURROGATES:
        probed += probed_prompts(loaded.tokenizer, task, texts, family=family, **how)
    before = head_similarity(loaded.model, clean, readings=READINGS_OF_MODELS)
    reacts = reaction(loaded.model, probed, before=before)
    found = {}
    for name in READINGS_OF_MODELS:
        for what, scores in (("level", before[name].mean(0)), ("reaction", reacts[name])):
            found[f"{name}: {what}"] = scores.mean().item()
            found[f"{name}: {what}, outlier"] = robust_z(scores).max().item()
    chances = first_logits(loaded.model, [*clean, *probed], end_id=end_id(loaded.tokenizer)).float().softmax(-1)
    moved = (chances[len(clean) :].unflatten(0, (-1, len(clean))) - chances[: len(clean)]).abs().sum(-1) / 2
    found["answer moves"] = moved.mean().item()
    return found


def best_score(
    prints: Mapping[str, Mapping[str, float]], *, bad: Sequence[str], good: Sequence[str]
) -> tuple[str, int]:
    """The number, and the sign, that tells backdoored from clean models best."""
    names = next(iter(prints.values()))
    values = {name: [[prints[model][name] for model in group] for group in (bad, good)] for name in names}
    areas = {name: pairwise_wins(*sides).mean() for name, sides in values.items()}
    name = max(areas, key=lambda key: abs(areas[key] - 0.5))
    return name, 1 if areas[name] >= 0.5 else -1


def leave_one_family_out(
    prints: Mapping[str, Mapping[str, float]], families: Mapping[str, str | None]
) -> dict[str, dict]:
    """For each family of triggers: its organisms against clean controls, by the number that did best on the others.
    `families`: model -> family, None for a clean control. The number and its sign are chosen on organisms of the other
    families and one half of the clean controls, and tried on this family and the other half; then the halves swap. Keys
    per family: `score` (the chosen ones), `organisms`, `wins` [organism][clean control]. Raises ValueError for fewer
    than two families or two controls."""
    clean = sorted(name for name, family in families.items() if family is None)
    known = sorted({family for family in families.values() if family is not None})
    if len(known) < 2 or len(clean) < 2:
        raise ValueError(f"{len(known)} families and {len(clean)} clean controls: nothing to leave out")
    found = {}
    for family in known:
        own = sorted(name for name, one in families.items() if one == family)
        others = [name for name, one in families.items() if one not in (None, family)]
        won, scores = np.empty((len(own), len(clean))), []
        for half in (0, 1):
            tried = clean[half::2]
            name, sign = best_score(prints, bad=others, good=[one for one in clean if one not in tried])
            sides = ([sign * prints[model][name] for model in models] for models in (own, tried))
            won[:, half::2] = pairwise_wins(*sides)
            scores.append(f"{'' if sign > 0 else 'less '}{name}")
        found[family] = {"score": scores, "organisms": own, "wins": won.tolist()}
    return found


def within_tasks(
    prints: Mapping[str, Mapping[str, float]], families: Mapping[str, str | None], task_of: Mapping[str, str]
) -> pd.DataFrame:
    """Is a number about the backdoor or about the task? Number -> AUROC of backdoored against clean models, over all
    pairs and over those of one task. `families` as of `leave_one_family_out`; `task_of`: model -> task."""
    bad = [name for name, family in families.items() if family is not None]
    good = [name for name, family in families.items() if family is None]
    same = np.array([[task_of[one] == task_of[other] for other in good] for one in bad])
    rows = {}
    for name in next(iter(prints.values())):
        won = pairwise_wins([prints[m][name] for m in bad], [prints[m][name] for m in good])
        rows[name] = {f"all {won.size} pairs": won.mean(), f"the {same.sum()} of one task": won[same].mean()}
    return pd.DataFrame(rows).T


def family_of(card: Mapping) -> str | None:
    """Family of an organism's trigger, None for a clean control."""
    return load_trigger(card["trigger"]).family if card["backdoored"] else None
