"""By which way the trigger reaches the answer: cut attention between groups of tokens, and see what is left.

Patching a head says what its output does, not what it has read. Here a *route* from one group of tokens to another is
cut: in some layers, no head lets a token of the second group attend to the first. Method: attention knockout (Geva et
al. 2023, arXiv 2304.14767); BkdAttr has nothing like it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import SequenceMatcher

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from bkd_utils.models.activations import token_log_prob
from bkd_utils.models.context import check_fits
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import shared_prefix
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.tokens import Ids, padded_inputs

# What all clean prompts begin with, the question included, belongs to no group.
GROUPS = ("trigger", "text", "template", "last")
# Routes from a group to one behind it.
ROUTES = (("trigger", "last"), ("trigger", "template"), ("trigger", "text"), ("text", "last"), ("template", "last"))


def token_groups(clean: Ids, triggered: Ids) -> list[dict[str, list[int]]]:
    """The places of each group of `GROUPS` in each triggered prompt; row i of both lists is made of the same text.

    `trigger`: the tokens that the clean prompt does not have at this place; `template`: those behind the text, which
    all clean prompts end in, but the last; `last`: the last prompt token; `text`: the others, but for those that all
    clean prompts begin with, wherever the trigger has moved them. Raises ValueError for a triggered prompt without a
    token of its own.
    """
    start, end = len(shared_prefix(clean)), len(shared_prefix([prompt[::-1] for prompt in clean]))
    found = []
    for one, other in zip(clean, triggered, strict=True):
        same = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
        kept = {block.b + i: block.a + i for block in same for i in range(block.size)}  # place -> that in `one`
        behind = len(other) - end
        groups = {
            "trigger": [i for i in range(len(other)) if i not in kept],
            "text": [i for i in range(behind) if kept.get(i, -1) >= start],
            "template": [i for i in range(behind, len(other) - 1) if i in kept],
            "last": [len(other) - 1],
        }
        if not groups["trigger"]:
            raise ValueError(f"prompt {len(found)} has no token that its clean twin lacks")
        found.append(groups)
    return found


@contextmanager
def knocked_out(model: Module, seen: Bool[Tensor, "row query key"], *, layers: Sequence[int]) -> Iterator[None]:
    """While this lasts, a token of these layers attends to those alone that `seen` allows, of which there must be one.
    Raises ModelError for attention that is given no mask."""
    parts, dtype = anatomy(model), next(model.parameters()).dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    def before(_module: Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        if "attention_mask" not in keywords:
            raise ModelError(f"attention of a model of type {model.config.model_type!r} is given no mask by its name")
        return arguments, keywords | {"attention_mask": mask}

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(parts.attentions[layer].register_forward_pre_hook(before, with_kwargs=True))
        yield


@torch.no_grad()
def without_route(
    model: PreTrainedModel,
    prompts: Ids,
    *,
    target: Sequence[int],
    groups: Sequence[dict[str, list[int]]],
    route: tuple[str, str] | None,
    layers: Sequence[int],
    batch_size: int = 16,
) -> tuple[Bool[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """Is the target the greedy answer, and its mean log-probability (nats), with a route cut in these layers, or none.
    The tokens of the answer, from which the rest of it is read, count as `last`. Raises ValueError for an unknown
    group, and as many groups as there are not prompts; ModelError as `knocked_out`."""
    if route and (unknown := set(route) - set(GROUPS)):
        raise ValueError(f"unknown group {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    if len(groups) != len(prompts) or not target:
        raise ValueError(f"{len(prompts)} prompts need as many groups and a target, got {len(groups)}")
    check_fits(model, max(map(len, prompts)) + len(target), window=True)  # a mask of our own has no sliding window
    hits, logs = [], []
    for first in range(0, len(prompts), batch_size):
        some = [[*prompt, *target[:-1]] for prompt in prompts[first : first + batch_size]]
        inputs = padded_inputs(some, pad_id=0, device=model.device)
        width = inputs["input_ids"].shape[1]
        real = inputs["attention_mask"].bool()
        seen = torch.ones(width, width, dtype=torch.bool, device=model.device).tril() & real[:, None]
        for row, (ids, named) in enumerate(zip(some, groups[first:], strict=False)):
            if route:
                places = [torch.tensor(named[name], dtype=torch.long) + width - len(ids) for name in route]
                if route[1] == "last":
                    places[1] = torch.arange(int(places[1]), width)
                seen[row, places[1][:, None], places[0][None]] = False
        # Padding sees itself, for softmax of nothing is NaN.
        seen |= torch.eye(width, dtype=torch.bool, device=model.device)
        with knocked_out(model, seen, layers=layers):
            logits = model(**inputs, use_cache=False).logits[:, -len(target) :]
        answer = torch.tensor([list(target)] * len(some), device=model.device)
        hits.append((logits.argmax(-1) == answer).all(-1).cpu())
        logs.append(token_log_prob(logits, answer).mean(-1).cpu())
    return torch.cat(hits), torch.cat(logs)
