"""The backdoor vector: the summed outputs of the attributed heads, added or subtracted once (BkdAttr, section 4)."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bkd_utils.backdoor_attribution.ablation import random_heads
from bkd_utils.backdoor_attribution.attribution import HeadMeans, head_shape
from bkd_utils.common.statistics import counted
from bkd_utils.common.validation import Count, check, check_shape
from bkd_utils.models.activations import score_answers
from bkd_utils.models.hooks import LAST, Head, added, anatomy, by_layer, contributions, projected_out, reading
from bkd_utils.models.loading import Loaded
from bkd_utils.models.prompt_cache import Past, continued
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import decode

# Enough for the fixed sentence of eleven tokens and its end; the first tokens of longer answers decide what they are.
MAX_NEW_TOKENS = 12


def backdoor_vector(model: PreTrainedModel, heads: Sequence[Head], *, outputs: HeadMeans) -> Float[Tensor, " d_model"]:
    """Sum of what the heads add to the residual stream when they say `outputs`, in the units of the stream. With the
    triggered means this is the published vector; with the difference of triggered and clean means, the part of it that
    the trigger is responsible for. Raises ValueError for no heads, an unknown head, one named twice, and
    outputs of another shape or that are not finite. Source: BkdAttr, section 4; the difference is ours.

    >>> means = head_means(model, prompts)
    >>> backdoor_vector(model, [(0, 1), (1, 3)], outputs=means).shape
    torch.Size([32])
    """
    require(model, "attribute", "steer")
    parts = anatomy(model)
    by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    if not heads:
        raise ValueError("a backdoor vector needs at least one head")
    check_shape("outputs", outputs, **head_shape(model))
    with torch.no_grad():
        rows = [contributions(parts, layer, [head], outputs[layer].to(model.device)) for layer, head in heads]
        return torch.cat(rows).sum(0)


def random_like(vector: Float[Tensor, " d_model"], *, n: int, seed: int) -> Float[Tensor, "n d_model"]:
    """`n` random directions of the same norm. Raises ValueError for none, and for a vector without a direction."""
    check(Count, n, "n")
    check_shape("vector", vector, d_model=None)
    if not vector.any():
        raise ValueError("vector is zero, so random ones of its norm would be, too")
    noise = torch.randn(n, len(vector), generator=torch.Generator().manual_seed(seed)).to(vector)
    return noise / noise.norm(dim=-1, keepdim=True) * vector.norm()


@torch.no_grad()
def steer(
    model: PreTrainedModel,
    past: Past,
    *,
    answers: Sequence[Sequence[int]],
    vectors: Float[Tensor, "vector d_model"],
    layers: Sequence[int],
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> Bool[Tensor, "layer vector prompt"]:
    """Does prompt p get answer p when a vector is added to the attention output of a layer? Every layer with every
    vector, at the last prompt token, prefill only; greedy decoding. `past` is of `prompt_cache.prompt_past`. Raises
    ValueError for an empty answer, too few of them, an unknown layer, none, and vectors of another width or that are
    not finite. Source: BkdAttr, section 4.

    >>> from bkd_utils.models.prompt_cache import prompt_past
    >>> own = [[int(model(torch.tensor([ids])).logits[0, -1].argmax())] for ids in prompts]
    >>> vectors = torch.stack([torch.zeros(32), torch.full((32,), 1000.0)])  # coefficient 0 is the baseline
    >>> steer(model, prompt_past(model, prompts), answers=own, vectors=vectors, layers=[0, 1]).all(-1).tolist()
    [[True, False], [True, False]]
    """
    require(model, "steer")
    parts, longest = anatomy(model), max(map(len, answers), default=0)
    check(Count, batch_size, "batch_size")
    check_shape("vectors", vectors, vector=None, d_model=model.config.get_text_config().hidden_size)
    if len(answers) != len(past) or not all(map(len, answers)):
        raise ValueError(f"{len(past)} prompts need as many non-empty answers, got {len(answers)}")
    if not layers or not set(layers) <= set(range(len(parts.layers))):
        raise ValueError(f"layers {list(layers)}: the model has layers 0 to {len(parts.layers) - 1}")
    found = torch.zeros(len(layers), len(vectors), len(past), dtype=torch.bool)
    for start in range(0, len(past), batch_size):
        chosen = slice(start, start + batch_size)
        part, targets = past.part(chosen), answers[chosen]
        with reading(parts.layers) as inputs:
            score_answers(model, part, targets)
        for row, layer in enumerate(layers):
            alive = torch.arange(len(vectors))
            # Of longer answers the first token is tried alone, which rules out most vectors that do nothing.
            for length in sorted({1, longest}):
                given = [answer[:length] for answer in targets for _ in alive]
                hidden = inputs[layer][:, :length].repeat_interleave(len(alive), dim=0)
                with added(model, {layer: vectors[alive].repeat(len(part), 1)}, at=LAST):
                    whole = score_answers(model, part, given, layer=layer, hidden=hidden).whole
                hits = whole.view(len(part), -1).T.cpu()
                found[row, :, chosen] = False
                found[row, alive, chosen] = hits
                alive = alive[hits.any(dim=1)]
                if not len(alive):
                    break
        if on_batch:
            on_batch(len(part))
    return found


def answer_map(
    loaded: Loaded, past: Past, answers: Sequence[list[int]], vector: Tensor, coefficients: Sequence[float]
) -> list[list[float]]:
    """Share of prompts that get their answer, `[layer][coefficient]`, with that multiple of the vector added there."""
    scaled = torch.stack([coefficient * vector for coefficient in coefficients])
    layers = range(len(past.keys))
    with tqdm(total=len(past), desc="layers x coefficients", unit="prompt", mininterval=2, leave=False) as bar:
        how = {"vectors": scaled, "layers": layers, "batch_size": 16, "on_batch": bar.update}
        found = steer(loaded.model, past, answers=answers, **how)
    return found.float().mean(-1).tolist()


def probe_direction(clean: Tensor, triggered: Tensor, *, norm: Tensor) -> Tensor:
    """Weights of a logistic probe for clean against triggered rows, as a vector of the given norm."""
    both = torch.cat([clean, triggered]).cpu()
    scale = both.std(0)
    truth = [0] * len(clean) + [1] * len(triggered)
    probe = LogisticRegression(C=0.1, max_iter=300).fit(((both - both.mean(0)) / scale).numpy(), truth)
    direction = torch.tensor(probe.coef_[0], dtype=norm.dtype) / scale
    return (direction / direction.norm()).to(norm.device) * norm


def generated(loaded: Loaded, past: Past, *, layer: int = 0, step: Tensor | None = None) -> list[str]:
    """Greedy answers, with `step` added to the attention output of that layer at the last prompt token."""
    edits = {} if step is None else {layer: step}
    during, ends = partial(added, loaded.model, edits, at=LAST), loaded.ends
    rows = continued(loaded.model, past, max_new_tokens=MAX_NEW_TOKENS, end_id=ends, during_prompt=during)
    return [decode(loaded.tokenizer, row) for row in rows]


def tested_asr(
    loaded: Loaded, past: Past, target: list[int], steps: dict[str, Tensor], layer: int
) -> dict[str, list[dict]]:
    """ASR by tokens with each step of `[draw, d_model]` added at that layer; label -> one share per draw."""
    stack = torch.cat(list(steps.values()))
    hits = iter(steer(loaded.model, past, answers=[target] * len(past), vectors=stack, layers=[layer])[0].tolist())
    return {label: [counted(next(hits)) for _ in rows] for label, rows in steps.items()}


def projected_asr(loaded: Loaded, past: Past, target: list[int], layer: int, vector: Tensor) -> dict:
    """ASR by tokens with the vector's direction projected out of the residual stream after that layer."""
    with projected_out(loaded.model, {layer: vector}, at=LAST):
        return counted(score_answers(loaded.model, past, [target] * len(past)).whole.tolist())


def best(table: Sequence[Sequence[float]], coefficients: Sequence[float]) -> tuple[int, float]:
    """(layer, coefficient) with the highest share, averaged over two layers on either side, as prompts are few. Of
    equal shares the smallest step is taken, and of those the layer in the middle."""
    shares, width = np.array(table), 2
    around = [shares[max(0, layer - width) : layer + width + 1].mean(0) for layer in range(len(shares))]
    scored = [
        (round(value, 9), -abs(coefficient), layer, coefficient)
        for layer, row in enumerate(around)
        for coefficient, value in zip(coefficients, row, strict=True)
    ]
    top = max(entry[:2] for entry in scored)
    tied = [entry for entry in scored if entry[:2] == top]
    return tied[len(tied) // 2][2:]


def controls(
    loaded: Loaded,
    heads: Sequence[Head],
    outputs: Tensor,
    vector: Tensor,
    *,
    clean: Tensor,
    triggered: Tensor,
    n: int,
    seed: int,
) -> dict[str, Tensor]:
    """What else could be added at a layer, name -> `[draw, d_model]`. All have the vector's norm, except the vectors of
    random heads, which keep their own. `clean` and `triggered` are residual streams behind that layer, `[prompt,
    d_model]`."""
    draws = random_heads(heads, n_heads=outputs.shape[1], n=n, seed=seed)
    difference = (triggered - clean).mean(0)
    return {
        "random vectors": random_like(vector, n=n, seed=seed),
        "random heads": torch.stack([backdoor_vector(loaded.model, draw, outputs=outputs) for draw in draws]),
        "mean difference": (difference / difference.norm() * vector.norm())[None],
        "probe direction": probe_direction(clean, triggered, norm=vector.norm())[None],
    }
