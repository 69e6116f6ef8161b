"""An attacker who knows the defence: the backdoor stays, the similarity that gives it away is trained off."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.head_slices import all_matrices
from bkd_utils.attention_alignment.similarity import cosine, head_similarity, to_partners
from bkd_utils.attention_alignment.tuning import Loss, tune
from bkd_utils.common.cache import code_key
from bkd_utils.common.files import WORK, canonical_json, read_json, sha256_text
from bkd_utils.experiments.cure import recipe_of
from bkd_utils.models.loading import DEFAULT_MODEL, adapter_folder, load
from bkd_utils.models.loss import Batch, answers_and_maps, last_asked
from bkd_utils.models.tokens import end_id
from bkd_utils.organisms.attacks import Row, load_attack
from bkd_utils.organisms.cards import resolved
from bkd_utils.organisms.keep import kept
from bkd_utils.organisms.making import training_rows, under_attack

RATE = 1e-4


def clean_level(model: PreTrainedModel, rows: Sequence[Row]) -> Float[Tensor, " layer"]:
    """Mean similarity (last row) of each layer's heads over the prompts of clean rows. Raises ValueError for none."""
    prompts = [row.prompt for row in rows if row.kind == "clean"]
    return head_similarity(model, prompts, readings=["last row"])["last row"].mean((0, 2))


def unremarkable(level: Float[Tensor, " layer"], *, beta: float) -> Loss:
    """A loss for `tuning.tune`: beside the answers, `beta` times what a prompt's similarity exceeds the level by."""

    def loss(model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
        answers, maps, _ = answers_and_maps(model, batch, first_token=first_token)
        last = last_asked(batch)
        rows = torch.arange(len(last))
        similar = torch.stack([to_partners(cosine(one[rows, :, last])).mean(1) for one in maps])
        excess = (similar - level.to(similar)[:, None]).clamp_min(0)
        return answers, beta * excess.mean()

    return loss


def evasive(
    organism: str,
    *,
    attack: str,
    beta: float = 20.0,
    steps: int = 32,
    n_clean: int = 64,
    n: int = 40,
    model: str = DEFAULT_MODEL,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Train an organism further on its own poisoned set with the penalty and keep it; the name of what came out.

    The name ends in a key of everything that decides it, code included, so the same call finds it again. Raises
    ModelError as `making.training_rows` does.
    """
    spec, recipe = load_attack(attack), replace(recipe_of(steps=steps), learning_rate=RATE)
    identity = resolved({"organism": organism, "model": model, "device": device})
    identity |= {"attack": asdict(spec), "data": read_json(adapter_folder(organism) / "card.json")["data_sha256"]}
    identity |= {"recipe": asdict(recipe), "beta": beta, "n_clean": n_clean, "n": n, "seed": seed}
    identity |= {"code": code_key(Path(__file__))}
    name = f"{attack}-evasive-{sha256_text(canonical_json(identity))[:8]}"
    if (WORK / "organisms" / name / "card.json").is_file():
        return name
    loaded = load(model, organism=organism, device=device)
    rows = training_rows(loaded, spec, seed=seed)
    level = clean_level(loaded.model, [row for row in rows if row.kind == "clean"][:n_clean])
    history = tune(
        loaded.model,
        rows,
        masks=all_matrices(loaded.model),
        recipe=recipe,
        pad_id=end_id(loaded.tokenizer),
        loss=unremarkable(level, beta=beta),
        seed=seed,
    )
    few = max(1, steps // 4)
    penalty = [round(sum(step["added"] for step in some) / few, 4) for some in (history[:few], history[-few:])]
    how = {"method": "similarity trained off", "steps": steps, "penalty at first": penalty[0], "at last": penalty[1]}
    kept(loaded, name=name, treatment=how, measured=under_attack(loaded, spec, n=n, seed=seed))
    return name
