"""Similarity of the heads of a layer, in their attention patterns or in their outputs (ASA's observation).

The paper, as far as it is known, gives the idea and no formula: which tensor, which measure, which partners is open.
Every reading here is a named option, and a head's score is its mean similarity to its partners, which are the other
heads of its layer unless the name says otherwise. `READINGS` holds them, name -> score of every head from the attention
maps and head outputs of one prompt:

- "last row": cosine of where heads look from the last prompt token; "last row, no sink" leaves the first token out;
  "last row, Jensen-Shannon" takes 1 less that distance; "last row, closest partner" takes the most similar head only;
  "last row, across layers" takes the heads of all other layers as partners
- "full map": cosine of whole attention maps; "full map, centred" takes off the mean map of all heads first;
  "full map, CKA" asks whether two heads tell the same tokens apart, wherever they look
- "head outputs": cosine of what heads add to the residual stream at the last prompt token

Rows in a causal map that all heads share (the first has one entry) and attention sinks make heads look alike for no
reason; `last row, no sink` and `full map, centred` are readings without that part. In an encoder the token that asks is
[CLS], whose row is put last in the maps that scores get; what "no sink" leaves out there is what tokens look at in it.

>>> maps, outputs = torch.full((2, 4, 3, 3), 1 / 3), torch.ones(2, 4, 8)  # heads that all do the same
>>> READINGS["last row"](maps, outputs).allclose(torch.ones(2, 4))
True
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from bkd_utils.models.compute import eager
from bkd_utils.models.encoders import asking_column
from bkd_utils.models.generation import OnBatch, inputs_after, reusable_prefix, run_prefix
from bkd_utils.models.hooks import anatomy, contributions, reading
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Ids, batches, check_prompts

Maps = Float[Tensor, "layer head query key"]
Outputs = Float[Tensor, "layer head d_model"]
Scores = Float[Tensor, "layer head"]


def cosine(rows: Float[Tensor, "layer head width"]) -> Float[Tensor, "layer head partner"]:
    """Cosine of every pair of heads of a layer, which is 0 for a row of zeros."""
    rows = rows.float()
    # Mixed precision would round the products to less than what tells heads apart.
    with torch.autocast(rows.device.type, enabled=False):
        dot = rows @ rows.transpose(-1, -2)
    # The product is divided by the norms, because a normalised copy of whole maps costs more than the product.
    length = dot.diagonal(dim1=-2, dim2=-1).clamp_min(1e-24).sqrt()
    return dot / (length[..., None] * length[..., None, :])


def jensen_shannon(rows: Float[Tensor, "layer head key"]) -> Float[Tensor, "layer head partner"]:
    """1 minus the Jensen-Shannon distance (base 2) of every pair of heads of a layer; rows are distributions."""
    rows = rows.float()
    middle = (rows[:, :, None] + rows[:, None]) / 2
    own, mixed = (-torch.xlogy(chances, chances).sum(-1) for chances in (rows, middle))
    divergence = mixed - (own[:, :, None] + own[:, None]) / 2
    return 1 - (divergence / torch.log(torch.tensor(2.0))).clamp(0, 1).sqrt()


def to_partners(similar: Float[Tensor, "layer head partner"]) -> Scores:
    """Mean over a head's partners in its layer. Raises ValueError for a layer of one head."""
    n_heads = similar.shape[-1]
    if n_heads < 2:
        raise ValueError("similarity needs at least two heads in a layer")
    return (similar.sum(-1) - similar.diagonal(dim1=-2, dim2=-1)) / (n_heads - 1)


def last_row(maps: Maps, _outputs: Outputs, *, measure: Callable = cosine, sink: bool = True) -> Scores:
    """Similarity of attention rows of the last prompt token; without `sink`, they are renormalised without token 0."""
    rows = maps[:, :, -1]
    if not sink:
        rows = rows[..., 1:] / rows[..., 1:].sum(-1, keepdim=True).clamp_min(1e-30)
    return to_partners(measure(rows))


def closest_partner(maps: Maps, _outputs: Outputs) -> Scores:
    """Similarity of the attention row of the last prompt token to that of the most similar head of the layer."""
    similar = cosine(maps[:, :, -1])
    to_partners(similar)  # raises for a layer of one head
    return similar.masked_fill(torch.eye(similar.shape[-1], device=similar.device).bool(), -1).amax(-1)


def across_layers(maps: Maps, _outputs: Outputs) -> Scores:
    """Similarity of attention rows of the last prompt token to those of the heads of all other layers. Raises
    ValueError for a model of one layer."""
    n_layers, n_heads = maps.shape[:2]
    if n_layers < 2:
        raise ValueError("similarity across layers needs at least two layers")
    similar = cosine(maps[:, :, -1].flatten(0, 1)[None])[0].view(n_layers, n_heads, n_layers, n_heads)
    own = torch.stack([similar[layer, :, layer].sum(-1) for layer in range(n_layers)])
    return (similar.sum((2, 3)) - own) / ((n_layers - 1) * n_heads)


def full_map(maps: Maps, _outputs: Outputs, *, centred: bool = False) -> Scores:
    """Similarity of whole attention maps as vectors; with `centred`, the mean map of all heads is subtracted first."""
    rows = maps.flatten(2).float()
    return to_partners(cosine(rows - rows.mean((0, 1)) if centred else rows))


def cka(maps: Maps, _outputs: Outputs) -> Scores:
    """Linear centred kernel alignment (CKA) of whole attention maps: do two heads distinguish the same tokens?"""
    rows = maps.float() - maps.float().mean(2, keepdim=True)
    return to_partners(cosine((rows @ rows.transpose(-1, -2)).flatten(2)))


READINGS: dict[str, Callable[[Maps, Outputs], Scores]] = {
    "last row": last_row,
    "last row, no sink": partial(last_row, sink=False),
    "last row, Jensen-Shannon": partial(last_row, measure=jensen_shannon),
    "last row, closest partner": closest_partner,
    "last row, across layers": across_layers,
    "full map": full_map,
    "full map, centred": partial(full_map, centred=True),
    "full map, CKA": cka,
    "head outputs": lambda _maps, outputs: to_partners(cosine(outputs)),
}


def head_similarity(
    model: PreTrainedModel, prompts: Ids, *, readings: Sequence[str] = tuple(READINGS), on_batch: OnBatch = None
) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """Similarity of every head to its partners on every prompt, by each of the readings (see the top of this module).
    At most 1, which is complete likeness. `on_batch` is called with the number of prompts just finished. Raises
    ValueError for no prompts, an empty one or an unknown reading. Source: ASA's observation; the formulas are ours.

    >>> found = head_similarity(model, prompts, readings=["last row"])["last row"]
    >>> found.shape, bool(found.max() <= 1 + 1e-5)
    (torch.Size([4, 2, 4]), True)
    """
    if not readings or (unknown := set(readings) - set(READINGS)):
        told = f"unknown reading {min(unknown)!r}" if readings else "no readings"
        raise ValueError(f"{told}; known: {', '.join(READINGS)}")
    if "head outputs" in readings:
        require(model, "steer")  # what heads add to the residual stream must be known
    return head_scores(model, prompts, scores={name: READINGS[name] for name in readings}, on_batch=on_batch)


@torch.no_grad()
def head_scores(
    model: PreTrainedModel, prompts: Ids, *, scores: Mapping[str, Callable[..., Scores]], on_batch: OnBatch = None
) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """Any scores of heads by the maps and outputs of one prompt. Raises ValueError for no prompts or an empty one. The
    last row of the maps is that of the token that asks (`encoders.asking_column`)."""
    check_prompts(prompts)
    require(model, "compare maps")
    parts, column = anatomy(model), asking_column(model)
    found = {name: torch.empty(len(prompts), len(parts.layers), parts.n_heads) for name in scores}
    with eager(model):
        cache, shared_maps = run_prefix(model, reusable_prefix(model, prompts), output_attentions=True)
        n_shared = cache.get_seq_length()
        for chosen in batches(prompts, 8):
            inputs = inputs_after(model, cache, [prompts[i] for i in chosen])
            with reading(parts.outputs) as z:
                attentions = model.base_model(**inputs, output_attentions=True).attentions
            last = {layer: kept[:, column].unflatten(-1, (parts.n_heads, -1)) for layer, kept in z.items()}
            outputs = torch.stack([contributions(parts, i, range(parts.n_heads), last[i]) for i in last], dim=1)
            for row, i in enumerate(chosen):
                n_own, real = len(prompts[i]) - n_shared, inputs["attention_mask"][row].bool()
                # Of the columns of the own tokens, which are padded in front or behind.
                maps = torch.stack([layer[row][:, real[n_shared:]][..., real] for layer in attentions])
                if shared_maps:
                    maps = torch.cat([pad(torch.cat(shared_maps), (0, n_own)), maps], dim=2)
                maps = maps.roll(-1, dims=2) if column == 0 else maps
                for name, score in scores.items():
                    found[name][i] = score(maps, outputs[row]).cpu()
            if on_batch:
                on_batch(len(chosen))
    return found
