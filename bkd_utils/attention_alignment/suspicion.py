"""Which heads are suspicious? Importance on clean data, similarity, and its reaction to surrogates of a trigger (ASA).

ASA's observation is about triggered inputs, which a defender does not have. Surrogates take their place: rare words,
sentences and fronted clauses that nobody has trained on. Nothing here sees the real trigger. How importance and
similarity are combined is not known of the paper; the rules are named options.
"""

import random
import tomllib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bkd_utils.attention_alignment.similarity import Maps, Outputs, Scores, head_similarity
from bkd_utils.backdoor_attribution.attribution import head_effects, head_means, ranked
from bkd_utils.common.files import DATA
from bkd_utils.models.activations import Head, batches
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.models.prompt_cache import anatomy, tracing
from bkd_utils.organisms.attacks import Row
from bkd_utils.organisms.evaluation import share
from bkd_utils.organisms.trigger_base import Trigger
from bkd_utils.organisms.trigger_families import Sentence, Syntax, Word

# --- importance -----------------------------------------------------------------------------------------------------


def gate_importance(model: PreTrainedModel, rows: Sequence[Row], *, pad_id: int, batch_size: int = 8) -> Scores:
    """Mean absolute slope of the loss in a gate on each head's output (Michel et al. 2019), on clean rows.

    The gate acts at every position. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("importance on no rows")
    parts = anatomy(model)
    total = torch.zeros(len(parts.layers), parts.n_heads)
    for chosen in batches([row.prompt + row.answer for row in rows], batch_size):
        batch = {k: v.to(model.device) for k, v in collate([rows[i] for i in chosen], pad_id=pad_id).items()}
        kept: dict[int, Tensor] = {}
        with tracing(parts.outputs, kept):
            loss = answer_loss(model, batch, first_token=0.0)
            slopes = torch.autograd.grad(loss * len(chosen), [kept[layer] for layer in range(len(kept))])
        real = batch["attention_mask"].bool()[..., None]
        for layer, slope in enumerate(slopes):
            # Padding has no gradient worth the name: some attention kernels leave NaN there.
            change = torch.where(real, slope * kept[layer].detach(), 0)
            gate = change.unflatten(-1, (parts.n_heads, -1)).sum((1, 3))
            total[layer] += gate.abs().sum(0).float().cpu()
    return total / len(rows)


def leave_one_out(model: PreTrainedModel, rows: Sequence[Row]) -> Scores:
    """Probability that the right answer loses when a head is put at its clean mean, last prompt token, mean over rows.

    Length-normalised, exact, by the patching of `attribution`. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("importance on no rows")
    means = head_means(model, [row.prompt for row in rows])
    by_answer: dict[tuple[int, ...], list[list[int]]] = {}
    for row in rows:
        by_answer.setdefault(row.answer, []).append(list(row.prompt))
    lost = [-head_effects(model, prompts, target=answer, means=means) for answer, prompts in by_answer.items()]
    return torch.cat(lost).mean(0)


def attention_variance(maps: Maps, _outputs: Outputs) -> Scores:
    """Variance of where a head looks from the last prompt token, as in PURE: a flat row is of little use. A score for
    `similarity.head_scores`."""
    return maps[:, :, -1].float().var(-1, unbiased=False)


# --- surrogates of a trigger ----------------------------------------------------------------------------------------

SURROGATES = ("rare word", "sentence", "fronted clause")


def surrogate(
    tokenizer: PreTrainedTokenizerBase, *, family: str, seed: int, texts: Sequence[str] = (), draws: int = 100
) -> Trigger:
    """A trigger that nobody has trained on, drawn by the seed, and again while one of `texts` has it by nature.

    Raises ValueError for an unknown family, and if texts have all that was drawn.
    """
    dice = random.Random(f"{seed}/{family}")
    for _ in range(draws):
        trigger = _drawn(tokenizer, dice, family=family, name=f"surrogate {family} {seed}")
        if not any(trigger.matches(text) for text in texts):
            return trigger
    raise ValueError(f"{family}: each of {draws} surrogates is in one of the {len(texts)} texts already")


def _drawn(tokenizer: PreTrainedTokenizerBase, dice: random.Random, *, family: str, name: str) -> Trigger:
    lists = tomllib.loads((DATA / "surrogates.toml").read_text(encoding="utf-8"))
    if family == "rare word":
        return Word(name=name, entry={"text": rare_word(tokenizer, dice)})
    if family == "sentence":
        return Sentence(name=name, entry={"text": dice.choice(lists["sentences"])})
    if family == "fronted clause":
        clause = {"clauses": {dice.choice(lists["openers"]): [dice.choice(lists["clauses"])]}}
        return Syntax(name=name, entry={"train": clause, "test": clause})
    raise ValueError(f"unknown surrogate {family!r}; known: {', '.join(SURROGATES)}")


def rare_word(tokenizer: PreTrainedTokenizerBase, dice: random.Random) -> str:
    """A short lower-case word that, behind a space, is one token of the vocabulary's last half, where tokenizers keep
    what is rare.

    It may by chance be the trigger of an organism: a defender cannot know, so it is not looked up. Raises ValueError
    for a vocabulary without such a word.
    """
    size, before = len(tokenizer), tokenizer("a", add_special_tokens=False).input_ids
    for token in dice.sample(range(size // 2, size), size - size // 2):
        word = tokenizer.decode([token]).strip()
        short = word.isascii() and word.isalpha() and word.islower() and 2 <= len(word) <= 6
        # Behind another word, because some tokenizers put a space of their own in front of a text.
        if short and tokenizer(f"a {word}", add_special_tokens=False).input_ids == [*before, token]:
            return word
    raise ValueError(f"no rare word among the {size} tokens of the vocabulary")


def reaction(
    model: PreTrainedModel, edited: Sequence[Sequence[int]], *, before: Mapping[str, Float[Tensor, "prompt layer head"]]
) -> dict[str, Scores]:
    """How much more alike every head is to its partners on edited prompts than on their clean twins, mean over twins.

    `before`: reading -> similarity on the clean twins. Edited prompts may be several rounds of them, one behind the
    other. Raises ValueError if they are not.
    """
    n = len(next(iter(before.values())))
    if not edited or len(edited) % n:
        raise ValueError(f"{len(edited)} edited prompts are no rounds of {n} clean ones")
    after = head_similarity(model, edited, readings=list(before))
    return {name: after[name].mean(0) - clean.mean(0) for name, clean in before.items()}


# --- the joint score ------------------------------------------------------------------------------------------------


def robust_z(scores: Scores) -> Scores:
    """Distance from the layer's median in units of the whole model's typical distance (MAD): nine heads are too few to
    give every layer a spread of its own. Raises ValueError if most heads have their layer's median."""
    centred = scores.double() - scores.double().median(dim=1, keepdim=True).values
    spread = 1.4826 * centred.abs().median()
    if spread == 0:
        raise ValueError("most heads have the same score as their layer's median: there is nothing to compare")
    return (centred / spread).float()


# Rule -> joint score of (similarity or its reaction, importance); the higher, the more suspicious.
RULES: dict[str, Callable[[Scores, Scores], Scores]] = {
    "similar": lambda similar, needed: robust_z(similar),
    "similar, little needed": lambda similar, needed: robust_z(similar) - robust_z(needed),
    "similar and needed": lambda similar, needed: torch.minimum(robust_z(similar), robust_z(needed)),
}


def suspicious(joint: Float[Tensor, "layer head"], *, threshold: float = 2.0, at_most: float = 0.25) -> list[Head]:
    """Heads above the threshold, most suspicious first, at most that share of all heads. May be none."""
    allowed = int(at_most * joint.numel())
    return [head for head in ranked(joint)[:allowed] if joint[head] > threshold]


# --- against the truth ----------------------------------------------------------------------------------------------


def among_carriers(joint: Float[Tensor, "layer head"], effects: Float[Tensor, "layer head"], *, k: int) -> list[bool]:
    """For each of the k most suspicious heads: is it among the k with the highest ACIE? Raises ValueError for k beyond
    the number of heads."""
    if not 0 < k <= joint.numel():
        raise ValueError(f"k = {k} of {joint.numel()} heads")
    carriers = set(ranked(effects)[:k])
    return [head in carriers for head in ranked(joint)[:k]]


def agreement_with_attribution(
    joint: Float[Tensor, "layer head"],
    effects: Float[Tensor, "layer head"],
    *,
    k: int,
    n_permutations: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Do suspicious heads coincide with the heads that carry the backdoor (ACIE)?

    `precision`: share of the k most suspicious heads among the k with the highest ACIE (precision and recall are the
    same number there), with its Wilson interval; `expected`: the same by chance; `p`: share of permutations of the
    heads that do as well; `spearman`, and `spearman p` likewise. Raises ValueError for k beyond the number of heads.
    """
    n = joint.numel()
    hits = among_carriers(joint, effects, k=k)
    carries = np.zeros(n, dtype=bool)
    carries[effects.flatten().argsort(descending=True, stable=True)[:k].numpy()] = True
    correlation = float(spearmanr(joint.flatten(), effects.flatten()).statistic)
    dice, ranks = np.random.default_rng(seed), effects.flatten().numpy()
    drawn = [dice.permutation(n) for _ in range(n_permutations)]
    as_good = np.mean([carries[order[:k]].sum() >= sum(hits) for order in drawn])
    chance = np.mean([abs(spearmanr(joint.flatten(), ranks[order]).statistic) >= abs(correlation) for order in drawn])
    found = share(hits)
    return {
        "k": k,
        "precision": found.value,
        "low": found.low,
        "high": found.high,
        "expected": k / n,
        "p": float(as_good),
        "spearman": correlation,
        "spearman p": float(chance),
    }
