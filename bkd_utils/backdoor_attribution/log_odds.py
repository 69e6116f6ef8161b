"""Effects of heads on the log-odds of the backdoor's answer, at any token of a prompt (ours, beside BkdAttr's BAHA).

A probability near 0 or 1 hides what a head adds, and a head may act on the trigger where it stands.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.backdoor_attribution.attribution import HeadMeans, by_row, head_shape
from bkd_utils.common.validation import check_shape
from bkd_utils.models.hooks import anatomy, editing, reading
from bkd_utils.models.prompt_cache import forward, prompt_past
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Ids, check_prompts


@torch.no_grad()
def head_log_odds(
    model: PreTrainedModel,
    prompts: Ids,
    *,
    tails: Sequence[int],
    target: int,
    right: Sequence[int],
    means: HeadMeans,
) -> tuple[Float[Tensor, "prompt layer head"], Float[Tensor, " prompt"]]:
    """Change of the log-odds of the answer's first token when one head's output at one token is replaced by its mean.

    The log-odds, in nats, are those of the token `target` against `right[i]`; the second result is what they are
    without a change. The place is the first of the last `tails[i]` tokens of prompt i, so 1 is the last token. Raises
    ValueError for no prompts, a prompt of no more than `tails[i]` tokens and means of another shape, ModelError for an
    encoder. Source: ours.

    >>> means = head_means(model, [prompt[:-2] for prompt in prompts[:1]])  # at the third token from the end
    >>> change, _ = head_log_odds(model, prompts[:1], tails=[3], target=7, right=[8], means=means)
    >>> change.shape, bool(change.abs().max() < 1e-4)  # its own output in place of a head's changes nothing
    (torch.Size([1, 2, 4]), True)
    """
    check_prompts(prompts)
    require(model, "attribute")
    check_shape("means", means, **head_shape(model))
    given = zip(prompts, tails, right, strict=True)
    found = [_of_one(model, prompt, tail, (target, other), means) for prompt, tail, other in given]
    changes, clean = zip(*found, strict=True)
    return torch.stack(changes), torch.stack(clean)


def _of_one(
    model: PreTrainedModel, prompt: Sequence[int], tail: int, answers: tuple[int, int], means: HeadMeans
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, ""]]:
    parts, past, inputs = anatomy(model), prompt_past(model, [prompt], tail=tail), {}
    rows, each = past.tail.repeat_interleave(parts.n_heads, 0), torch.arange(parts.n_heads)

    def odds(rows: Int[Tensor, "row new"], **start: int | Tensor) -> Float[Tensor, " row"]:
        logits = forward(model, past, rows, skip=tail - 1, **start)[:, -1].float().cpu()
        return logits[:, answers[0]] - logits[:, answers[1]]

    def patched(layer: int, given: Tensor) -> Tensor:
        """In row h, what head h writes at the first token that runs is its mean."""
        z = by_row(given.clone(), tail)
        z.unflatten(-1, (parts.n_heads, -1))[each, 0, each] = means[layer].to(z)
        return z.view_as(given)

    with reading(parts.layers, inputs):
        (clean,) = odds(past.tail)
    changes = []
    for layer, stream in inputs.items():
        start = {"layer": layer, "hidden": stream.repeat_interleave(parts.n_heads, 0)}
        with editing([parts.outputs[layer]], lambda _, z, layer=layer: patched(layer, z)):
            changes.append(odds(rows, **start) - clean)
    return torch.stack(changes), clean
