"""Cure one organism and measure what is left of backdoor and model; kept."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from bkd_utils.alignment import head_slices, reset, touched, tune
from bkd_utils.attacks import Attack, load_attack
from bkd_utils.attribution import head_effects, head_means, ranked
from bkd_utils.cards import organism_stage
from bkd_utils.models import DEFAULT_MODEL, Loaded, load
from bkd_utils.organisms import measure_loaded
from bkd_utils.pairs import pairs, target_ids
from bkd_utils.prompts import end_id
from bkd_utils.similarity import head_similarity
from bkd_utils.suspect import clean_rows
from bkd_utils.training import Recipe

RECIPE = Recipe(name="cure", steps=48, batch_size=16, learning_rate=2e-4, rank=1, alpha=1)


@organism_stage
def cured(
    organism: str,
    *,
    attack: str,
    heads: Sequence[Sequence[int]],
    alignment: str = "mean",
    beta: float = 1.0,
    unit: str = "KV group",
    redraw: bool = False,
    n_rows: int = 256,
    steps: int = RECIPE.steps,
    learning_rate: float = RECIPE.learning_rate,
    model: str = DEFAULT_MODEL,
    n: int = 60,
    n_attribution: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """Align and fine-tune the given heads on `n_rows` clean rows, then measure.

    Keys: `after` as of `organisms.measure`; `heads` touched, `parameters` touched; `history`; `similarity`
    and `acie` of the tuned heads before and after: has the mechanism gone, or only the symptom? Raises as `tune` does.
    """
    chosen = [tuple(head) for head in heads]
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    rows = clean_rows(loaded, spec.task, n=n_rows, seed=seed)
    masks = head_slices(loaded.model, chosen, unit=unit)
    recipe = replace(RECIPE, steps=steps, learning_rate=learning_rate)
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    mechanism = [_mechanism(loaded, spec, chosen, n=n_attribution, seed=seed)]
    if redraw:
        reset(loaded.model, masks, seed=seed)
    history = tune(
        loaded.model, rows, masks=masks, recipe=recipe, pad_id=end_id(loaded.tokenizer),
        suspicious=chosen, alignment=alignment, beta=beta, seed=seed,
    )  # fmt: skip
    mechanism.append(_mechanism(loaded, spec, chosen, n=n_attribution, seed=seed))
    return {
        "after": measure_loaded(loaded, spec, n=n, seed=seed),
        "heads": len(chosen),
        "parameters": sum(touched(before, loaded.model).values()),
        "history": history,
        **{key: [side[key] for side in mechanism] for key in mechanism[0]},
    }


def _mechanism(loaded: Loaded, attack: Attack, heads: Sequence[tuple[int, int]], *, n: int, seed: int) -> dict:
    """On triggered prompts: mean similarity (last row) of the heads; and the highest ACIE of any head of the model."""
    shown = pairs(loaded.tokenizer, attack, split="attribution", n=n, seed=seed)
    similar = head_similarity(loaded.model, shown.triggered, readings=["last row"])["last row"].mean(0)
    layer, head = torch.tensor(heads).T
    means = head_means(loaded.model, shown.triggered)
    # The first target token decides, and costs a tenth.
    effects = head_effects(loaded.model, shown.clean, target=target_ids(loaded.tokenizer, attack)[:1], means=means)
    top = ranked(effects.mean(0))[0]
    return {"similarity": similar[layer, head].mean().item(), "acie": effects.mean(0)[top].item()}
