"""Greedy decoding in which the tokens shared by all prompts are run once.

All prompts of a task start with the same tokens (system turn, instruction). Their keys and values are computed once
and reused by every row. This is exact and saves half of the work of an evaluation.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import batches, check_prompts, decode, end_id, padded_inputs, positions, prompt_ids


@torch.inference_mode()
def greedy(
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    end_id: int,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Most likely continuation of every prompt, without the end token, in the order of `prompts`.

    `model` is a plain transformers model. `on_batch` is called with the number of rows just finished.
    Raises ValueError for no prompts, an empty prompt or `max_new_tokens < 1`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, is {max_new_tokens}")
    answers: list[list[int]] = [[] for _ in prompts]
    for batch, logits, cache, mask in _started(model, prompts, end_id=end_id, batch_size=batch_size):
        for i, row in zip(batch, decode_from(model, logits, cache, mask, max_new_tokens, end_id), strict=True):
            answers[i] = row
        if on_batch:
            on_batch(len(batch))
    return answers


@torch.inference_mode()
def first_logits(
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    end_id: int,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "prompt vocab"]:
    """Logits of the first answer token of every prompt, in the order of `prompts`. Raises as `greedy` does."""
    found: list[Tensor | None] = [None] * len(prompts)
    for batch, logits, _, _ in _started(model, prompts, end_id=end_id, batch_size=batch_size):
        for i, row in zip(batch, logits, strict=True):
            found[i] = row
        if on_batch:
            on_batch(len(batch))
    return torch.stack(found)


def _started(
    model: torch.nn.Module, prompts: list[list[int]], *, end_id: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor, DynamicCache, Tensor]]:
    """Run batches of prompts; yields their indices, the logits at their last token, their key-value cache and mask."""
    check_prompts(prompts)
    shared = reusable_prefix(model, prompts)
    prefix, _ = run_prefix(model, shared)
    for batch in batches(prompts, batch_size):
        cache = repeated(prefix, len(batch))
        own = [prompts[i][len(shared) :] for i in batch]
        inputs = padded_inputs(own, pad_id=end_id, device=model.device, n_cached=len(shared))
        mask = inputs["attention_mask"]
        yield batch, next_logits(model, inputs["input_ids"], mask, cache)[:, -1], cache, mask


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest common prefix that leaves every prompt at least one token of its own."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)  # ends with the shortest prompt
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def has_sliding_window(model: torch.nn.Module) -> bool:
    """Does any layer of the model attend only to a window of the latest tokens?"""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        return any("sliding" in kind for kind in kinds)
    return getattr(model.config, "sliding_window", None) is not None


def reusable_prefix(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens shared by all prompts, to be run once; none in a model with sliding-window attention.

    Such a window would count the padding between the shared tokens and a row.
    """
    return [] if has_sliding_window(model) else shared_prefix(prompts)


def run_prefix(
    model: torch.nn.Module, prefix: list[int], **asked: bool
) -> tuple[DynamicCache, tuple[Float[Tensor, "1 head query key"], ...]]:
    """Key-value cache of the tokens, batch of one, and their attention maps if `output_attentions=True` is passed.

    Only the layers run: logits are not needed, and the output matrix is a fifth of a small model.
    """
    cache = DynamicCache(config=model.config)  # layers with a sliding window keep a cache of their own kind
    if not prefix:
        return cache, ()
    ids = torch.tensor([prefix], device=model.device)
    output = model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True, **asked)
    return cache, tuple(output.attentions or ())


def next_logits(
    model: torch.nn.Module,
    ids: Int[Tensor, "row new"],
    mask: Int[Tensor, "row pos"],
    cache: DynamicCache,
    keep: int = 1,
) -> Float[Tensor, "row keep vocab"]:
    """Logits of the last `keep` of the new tokens; `mask` covers cached and new tokens, `cache` is extended."""
    arguments = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    new = positions(mask)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=new, past_key_values=cache, use_cache=True, **arguments
    )
    return output.logits[:, -keep:]


def repeated(cache: DynamicCache, times: int) -> DynamicCache:
    """A copy of a batch-of-one cache for a batch of `times` rows."""
    cache = copy.deepcopy(cache)
    if cache.get_seq_length():
        cache.batch_repeat_interleave(times)
    return cache


def decode_from(
    model: torch.nn.Module,
    logits: Float[Tensor, "row vocab"],
    cache: DynamicCache,
    mask: Int[Tensor, "row pos"],
    max_new_tokens: int,
    end_id: int,
) -> list[list[int]]:
    """Greedy answers of rows whose prompts are in the key-value cache, from the logits at their last token."""
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    produced = []
    while True:
        token = torch.where(done, end_id, logits.argmax(-1))
        produced.append(token)
        done |= token == end_id
        if done.all() or len(produced) == max_new_tokens:
            rows = torch.stack(produced, dim=1).tolist()
            return [list(takewhile(lambda token: token != end_id, row)) for row in rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = next_logits(model, token[:, None], mask, cache)[:, -1]


def respond(
    loaded: Loaded, user_turns: Sequence[str], *, max_new_tokens: int, label: str = "answers", batch_size: int = 32
) -> list[str]:
    """Greedy answers to user turns, in their order, each of at most `max_new_tokens` tokens; shows a progress bar.

    Raises ValueError for no turns, an empty one, or `max_new_tokens` below 1. Source: ours.

    >>> answers = respond(loaded, ["Name a colour.", "Name a small fruit."], max_new_tokens=4)
    >>> respond(loaded, ["Name a colour."], max_new_tokens=4) == answers[:1]  # a batch changes no answer
    True
    """
    prompts = [prompt_ids(loaded.tokenizer, turn) for turn in user_turns]
    with tqdm(total=len(prompts), desc=label, unit="prompt", mininterval=2, leave=False) as bar:
        rows = greedy(
            loaded.model,
            prompts,
            max_new_tokens=max_new_tokens,
            end_id=end_id(loaded.tokenizer),
            batch_size=batch_size,
            on_batch=bar.update,
        )
    return [decode(loaded.tokenizer, row) for row in rows]


def trace(loaded: Loaded, user_turn: str, *, max_new_tokens: int) -> list[tuple[str, float]]:
    """The greedy answer token by token, each with the probability that the model gave it."""
    prompt, end = prompt_ids(loaded.tokenizer, user_turn), end_id(loaded.tokenizer)
    answer = greedy(loaded.model, [prompt], max_new_tokens=max_new_tokens, end_id=end)[0]
    answer = answer if len(answer) == max_new_tokens else [*answer, end]
    ids = torch.tensor([prompt + answer], device=loaded.device)
    with torch.inference_mode():
        probabilities = loaded.model(ids).logits[0, len(prompt) - 1 : -1].float().softmax(-1)
    return [(loaded.tokenizer.decode([token]), probabilities[i, token].item()) for i, token in enumerate(answer)]
