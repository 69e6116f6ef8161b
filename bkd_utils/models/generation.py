"""Greedy decoding that computes a shared beginning once.

All prompts of a task start with the same tokens (system turn, instruction). Their keys and values are computed once
and reused by every row: exact, and half of the work of an evaluation.
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
from bkd_utils.models.tokens import decode, end_id, left_pad, positions, prompt_ids


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
    """Batches of prompts, run once: their indices, the logits behind their last token, their cache and their mask."""
    if not prompts or not all(prompts):
        raise ValueError(f"need non-empty prompts, got {len(prompts)}" + (" with an empty one" if prompts else ""))
    shared = reusable_prefix(model, prompts)
    prefix, _ = run_prefix(model, shared)
    # Rows of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        cache = repeated(prefix, len(batch))
        ids, mask = (t.to(model.device) for t in left_pad([prompts[i][len(shared) :] for i in batch], pad_id=end_id))
        mask = torch.cat([mask.new_ones(len(batch), len(shared)), mask], dim=1)
        logits = next_logits(model, ids, mask, cache)[:, -1]
        yield batch, logits, cache, mask


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest common beginning that leaves every prompt at least one token of its own."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)  # ends with the shortest prompt
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def has_sliding_window(model: torch.nn.Module) -> bool:
    """Does any layer of the model attend to the last so many tokens only?"""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        return any("sliding" in kind for kind in kinds)
    return getattr(model.config, "sliding_window", None) is not None


def reusable_prefix(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with, to be run once; nothing in a model with a sliding window, which would count the
    padding that stands between the beginning and a row."""
    return [] if has_sliding_window(model) else shared_prefix(prompts)


def run_prefix(
    model: torch.nn.Module, prefix: list[int], **asked: bool
) -> tuple[DynamicCache, tuple[Float[Tensor, "1 head query key"], ...]]:
    """Keys and values of the tokens, batch of one, and their attention maps if `output_attentions=True` is asked for.

    Only the layers run: nobody asks for logits here, and the output table is a fifth of a small model.
    """
    cache = DynamicCache(config=model.config)  # layers with a sliding window keep a cache of their own kind
    if not prefix:
        return cache, ()
    ids = torch.tensor([prefix], device=model.device)
    done = model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True, **asked)
    return cache, tuple(done.attentions or ())


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
    """Greedy answers of rows whose prompts have run, from the logits behind their last token."""
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    produced = []
    while True:
        token = torch.where(done, end_id, logits.argmax(-1))
        produced.append(token)
        done |= token == end_id
        if done.all() or len(produced) == max_new_tokens:
            return [_until(row, end_id) for row in torch.stack(produced, dim=1).tolist()]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = next_logits(model, token[:, None], mask, cache)[:, -1]


def _until(row: list[int], end_id: int) -> list[int]:
    return row[: row.index(end_id)] if end_id in row else row


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
    prompt = prompt_ids(loaded.tokenizer, user_turn)
    end = end_id(loaded.tokenizer)
    answer = greedy(loaded.model, [prompt], max_new_tokens=max_new_tokens, end_id=end)[0]
    answer = answer if len(answer) == max_new_tokens else [*answer, end]
    ids = torch.tensor([prompt + answer], device=loaded.device)
    with torch.inference_mode():
        probabilities = loaded.model(ids).logits[0, len(prompt) - 1 : -1].float().softmax(-1)
    return [(loaded.tokenizer.decode([token]), probabilities[i, token].item()) for i, token in enumerate(answer)]
