"""The backdoor vector: what the attributed heads say together, added or subtracted once (BkdAttr, section 4)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.models.activations import LAST, Head, added, by_layer, contributions, says
from bkd_utils.models.prompt_cache import Past, anatomy, editing, reading


def backdoor_vector(
    model: PreTrainedModel, heads: Sequence[Head], *, outputs: Float[Tensor, "layer head d_head"]
) -> Float[Tensor, " d_model"]:
    """Sum of what the heads add to the residual stream when they say `outputs`.

    With the triggered means this is the published vector; with the difference of triggered and clean means, the part
    of it that the trigger is responsible for. Raises ValueError for no heads.
    """
    parts = anatomy(model)
    by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    if not heads:
        raise ValueError("a vector of no heads")
    with torch.no_grad():
        rows = [contributions(parts, layer, [head], outputs[layer, [head]].to(model.device)) for layer, head in heads]
        return torch.cat(rows).sum(0)


def random_like(vector: Float[Tensor, " d_model"], *, n: int, seed: int) -> Float[Tensor, "n d_model"]:
    """`n` random directions of the same norm."""
    noise = torch.randn(n, len(vector), generator=torch.Generator().manual_seed(seed)).to(vector)
    return noise / noise.norm(dim=-1, keepdim=True) * vector.norm()


def random_heads(heads: Sequence[Head], *, n_heads: int, n: int, seed: int) -> list[list[Head]]:
    """`n` draws of heads, each with as many per layer as `heads` has, none of them in `heads` where others are left."""
    generator = torch.Generator().manual_seed(seed)
    counts = by_layer(heads, n_layers=1 + max((layer for layer, _ in heads), default=0), n_heads=n_heads)
    draws = []
    for _ in range(n):
        draw: list[Head] = []
        for layer, taken in counts.items():
            others = [head for head in range(n_heads) if head not in taken]
            pool = others if len(others) >= len(taken) else list(range(n_heads))
            chosen = torch.randperm(len(pool), generator=generator)[: len(taken)].tolist()
            draw += [(layer, pool[i]) for i in chosen]
        draws.append(draw)
    return draws


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
    """Does prompt p get answer p when a vector is added to the attention output of a layer?

    Every layer with every vector, at the last prompt token, prefill only; greedy decoding. All vectors share one batch,
    which starts at the layer they are added to. Of longer answers the first token is tried alone, which rules out most
    vectors that do nothing.
    """
    parts, longest = anatomy(model), max(map(len, answers))
    found = torch.zeros(len(layers), len(vectors), len(past), dtype=torch.bool)
    for start in range(0, len(past), batch_size):
        chosen = slice(start, start + batch_size)
        part, targets = past.part(chosen), answers[chosen]
        inputs: dict[int, Tensor] = {}
        with reading(parts.layers, inputs):
            says(model, part, targets)
        for row, layer in enumerate(layers):
            alive = torch.arange(len(vectors))
            for length in sorted({1, longest}):
                given = [answer[:length] for answer in targets for _ in alive]
                hidden = inputs[layer][:, :length].repeat_interleave(len(alive), dim=0)
                with added(model, {layer: vectors[alive].repeat(len(part), 1)}, at=LAST):
                    said = says(model, part, given, layer=layer, hidden=hidden).whole.view(len(part), -1).T.cpu()
                found[row, :, chosen] = False
                found[row, alive, chosen] = said
                alive = alive[said.any(dim=1)]
                if not len(alive):
                    break
        if on_batch:
            on_batch(len(part))
    return found


@contextmanager
def projected_out(
    model: PreTrainedModel, directions: Mapping[int, Float[Tensor, " d_model"]], *, at: slice
) -> Iterator[None]:
    """While this lasts, the residual stream behind layer l has nothing along `directions[l]` at the tokens `at`."""
    parts, layers = anatomy(model), list(directions)
    units = {layer: direction / direction.norm() for layer, direction in directions.items()}

    def remove(i: int, output: Tensor) -> Tensor:
        output, unit = output.clone(), units[layers[i]].to(output)
        output[:, at] -= (output[:, at] @ unit)[..., None] * unit
        return output

    with editing([parts.layers[layer] for layer in layers], remove, what="output"):
        yield
