"""Greedy decoding in which tokens shared by all prompts are run once. It is exact and saves half of an evaluation."""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm
from transformers import Cache, DynamicCache

from bkd_utils.models.context import attention_window, check_fits
from bkd_utils.models.encoders import is_encoder, prompt_inputs
from bkd_utils.models.hooks import decoder
from bkd_utils.models.tokens import Ids, batches, check_prompts, common_start, decode, labels_of, positions, prompt_ids

COUNTS_PADDING = ("mpt",)  # families that take distances between columns for distances between tokens
if TYPE_CHECKING:  # loading tests every model by generating with it
    from bkd_utils.models.loading import Loaded

OnBatch = Callable[[int], object] | None  # called with the number of rows just finished
Settled = Callable[[list[int]], bool] | None  # is an answer that begins like this of no further interest?
Ends = int | Sequence[int]  # the token or tokens at which decoding stops, see `Loaded.ends`
NO_END = -1


@torch.inference_mode()
def greedy(
    model: Module,
    prompts: Ids,
    *,
    max_new_tokens: int,
    end_id: Ends,
    batch_size: int = 32,
    on_batch: OnBatch = None,
    settled: Settled = None,
) -> list[list[int]]:
    """Most likely continuation of every prompt, without the end token, in the order of `prompts`. An answer ends where
    `settled` says so, too, and a batch when all of its answers have ended. The answer of a classifier is one number,
    that of its label. Raises ValueError for no prompts, an empty prompt or `max_new_tokens < 1`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, is {max_new_tokens}")
    answers: dict[int, list[int]] = {}
    for batch, logits, cache, mask in started(model, prompts, pad_id=0, batch_size=batch_size, on_batch=on_batch):
        if is_encoder(model):
            rows = logits.argmax(-1)[:, None].tolist()
        else:
            rows = decode_from(model, logits, cache, mask, max_new_tokens, end_id, settled)
        answers.update(zip(batch, rows, strict=True))
    return [answers[i] for i in range(len(prompts))]


@torch.inference_mode()
def first_logits(
    model: Module, prompts: Ids, *, end_id: int, on_batch: OnBatch = None
) -> Float[Tensor, "prompt vocab"]:
    """Logits of the first answer token of every prompt (of a classifier: of its labels), in the order of `prompts`.
    Raises as `greedy` does."""
    found: dict[int, Tensor] = {}
    for batch, logits, _, _ in started(model, prompts, pad_id=end_id, on_batch=on_batch):
        found.update(zip(batch, logits, strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


def started(
    model: Module, prompts: Ids, *, pad_id: int, batch_size: int = 32, on_batch: OnBatch = None
) -> Iterator[tuple[list[int], Tensor, Cache | None, Tensor]]:
    """Run batches of prompts; yields their indices, the logits at their last token, their key-value cache and mask."""
    check_prompts(prompts)
    prefix, _ = run_prefix(model, reusable_prefix(model, prompts))
    for batch in batches(prompts, batch_size):
        inputs = inputs_after(model, prefix, [prompts[i] for i in batch], pad_id=pad_id)
        mask, cache = inputs["attention_mask"], inputs.get("past_key_values")
        if cache is None:
            check_fits(model, mask.shape[1])
            yield batch, model(**inputs).logits, None, mask
        else:
            yield batch, next_logits(model, inputs["input_ids"], mask, cache), cache, mask
        if on_batch:
            on_batch(len(batch))


def shared_prefix(prompts: Ids) -> list[int]:
    """Longest common prefix that leaves every prompt at least one token of its own."""
    return common_start(*(prompt[:-1] for prompt in prompts))


def reusable_prefix(model: Module, prompts: Ids) -> list[int]:
    """The tokens shared by all prompts, or none where padding behind them would count or a cache cannot be repeated.
    What an encoder reads at the shared tokens depends on those behind them, so it has none."""
    if is_encoder(model):
        return []
    counts = attention_window(model) is not None or model.config.model_type in COUNTS_PADDING
    caches = DynamicCache(config=model.config).layers
    whole = counts or not all(hasattr(cache, "batch_repeat_interleave") for cache in caches)
    return [] if whole else shared_prefix(prompts)


def run_prefix(
    model: Module, prefix: list[int], **asked: bool
) -> tuple[Cache, tuple[Float[Tensor, "1 head query key"], ...]]:
    """Key-value cache of the tokens, batch of one, and their attention maps if `output_attentions=True` is passed."""
    cache = DynamicCache(config=model.config)  # layers with a sliding window keep a cache of their own kind
    if not prefix:
        return cache, ()
    ids = torch.tensor([prefix], device=model.device)
    output = decoder(model)(input_ids=ids, past_key_values=cache, use_cache=True, **asked)
    return cache, tuple(output.attentions or ())


def inputs_after(model: Module, prefix: Cache, rows: Ids, *, pad_id: int = 0) -> dict[str, Any]:
    """Keyword arguments of a model for rows that all begin with the tokens in the cache `prefix` (`run_prefix`): their
    own tokens, and a copy of the cache for each row. An encoder gets whole rows and no cache."""
    count = prefix.get_seq_length()
    inputs = prompt_inputs(model, [row[count:] for row in rows], pad_id=pad_id, n_cached=count)
    if is_encoder(model):
        return inputs
    return inputs | {"past_key_values": repeated(prefix, len(rows)), "use_cache": True}


def next_logits(
    model: Module, ids: Int[Tensor, "row new"], mask: Int[Tensor, "row pos"], cache: Cache
) -> Float[Tensor, "row vocab"]:
    """Logits at the last of the new tokens; `mask` covers cached and new tokens, `cache` is extended."""
    check_fits(model, mask.shape[1])
    new = positions(mask)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": new, "past_key_values": cache}
    return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


def repeated(cache: Cache, times: int) -> Cache:
    """A copy of a batch-of-one cache for a batch of `times` rows."""
    cache = copy.deepcopy(cache)
    if cache.get_seq_length():
        cache.batch_repeat_interleave(times)
    return cache


def decode_from(
    model: Module,
    logits: Float[Tensor, "row vocab"],
    cache: Cache,
    mask: Int[Tensor, "row pos"],
    n: int,
    end_id: Ends,
    settled: Settled = None,
) -> list[list[int]]:
    """Greedy answers of at most `n` tokens, from the logits at the last tokens of prompts in the key-value cache."""
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    ends, produced = torch.tensor(end_id, device=logits.device).view(-1), []
    stops = set(ends.tolist())
    while True:
        token = torch.where(done, ends[0], logits.argmax(-1))
        produced.append(token)
        done |= torch.isin(token, ends)
        if settled:
            done |= torch.tensor([settled(row) for row in torch.stack(produced, dim=1).tolist()], device=done.device)
        if done.all() or len(produced) == n:
            rows = torch.stack(produced, dim=1).tolist()
            return [list(takewhile(lambda token: token not in stops, row)) for row in rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = next_logits(model, token[:, None], mask, cache)


def openings(loaded: "Loaded", prompts: Ids, *, n: int) -> list[list[int]]:
    """The first `n` tokens of greedy answers, fewer where an answer ends before: those have the end that it chose."""
    rows = greedy(loaded.model, prompts, max_new_tokens=n, end_id=NO_END)
    ends = [next((i + 1 for i, token in enumerate(row) if token in loaded.ends), n) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def respond(
    loaded: "Loaded",
    user_turns: Sequence[str],
    *,
    max_new_tokens: int,
    label: str = "answers",
    batch_size: int = 32,
    until: Callable[[str], bool] | None = None,
) -> list[str]:
    """Greedy answers to user turns, in their order; shows a progress bar. An answer ends early where `until` is true.
    Raises ValueError for no turns, an empty one, or `max_new_tokens` below 1. Source: ours.

    >>> answers = respond(loaded, ["Name a colour.", "Name a small fruit."], max_new_tokens=4)
    >>> respond(loaded, ["Name a colour."], max_new_tokens=4) == answers[:1]  # a batch changes no answer
    True
    """
    prompts = [prompt_ids(loaded.tokenizer, turn) for turn in user_turns]
    limits = {"max_new_tokens": max_new_tokens, "end_id": loaded.ends, "batch_size": batch_size}
    if until:
        limits["settled"] = lambda ids: until(decode(loaded.tokenizer, ids))
    with tqdm(total=len(prompts), desc=label, unit="prompt", mininterval=2, leave=False) as bar:
        rows = greedy(loaded.model, prompts, **limits, on_batch=bar.update)
    return [decode(loaded.tokenizer, row) for row in rows]


def trace(loaded: "Loaded", user_turn: str, *, max_new_tokens: int) -> list[tuple[str, float]]:
    """The greedy answer token by token, each with the probability that the model gave it."""
    prompt = prompt_ids(loaded.tokenizer, user_turn)
    if labels := labels_of(loaded.tokenizer):
        chances = first_logits(loaded.model, [prompt], end_id=0)[0].float().softmax(-1)
        return [(labels[int(chances.argmax())], chances.max().item())]
    answer = openings(loaded, [prompt], n=max_new_tokens)[0]
    ids = torch.tensor([prompt + answer], device=loaded.device)
    with torch.inference_mode():
        probabilities = loaded.model(ids).logits[0, len(prompt) - 1 : -1].float().softmax(-1)
    return [(loaded.tokenizer.decode([token]), probabilities[i, token].item()) for i, token in enumerate(answer)]
