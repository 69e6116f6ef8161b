"""The key-value cache of a prompt's first tokens, which no intervention changes, computed once.

The interventions of this companion act on the last prompt tokens, so running only these, and only the layers from the
edited one on, is exact. Rows that differ only in the edit share their prompt's keys and values."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import AttentionInterface, DynamicCache

from bkd_utils.models import compute, generation
from bkd_utils.models.context import check_fits
from bkd_utils.models.encoders import is_encoder
from bkd_utils.models.folders import ModelError
from bkd_utils.models.hooks import Anatomy, anatomy, editing
from bkd_utils.models.tokens import Ids

NAME = "bkd_shared_past"
# Input of the first layer that is run, where that is not the model's first layer.
Hidden = Float[Tensor, "row new d_model"] | None


@dataclass(frozen=True)
class Past:
    """Keys and values of all but the last token of some prompts, `[prompt, kv_head, pos, d_head]` in every layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Bool[Tensor, "prompt pos"]  # False at padding
    tail: Int[Tensor, "prompt 1"]  # the last token, which is still to be run
    position: Int[Tensor, " prompt"]  # the number of tokens before these

    def __len__(self) -> int:
        return len(self.tail)

    def part(self, rows: slice) -> "Past":
        """The cache of some of the prompts; nothing is copied."""
        keys, values = (tuple(tensor[rows] for tensor in tensors) for tensors in (self.keys, self.values))
        return Past(keys, values, self.mask[rows], self.tail[rows], self.position[rows])

    def rows(self, answer: Int[Tensor, "row answer"]) -> Int[Tensor, "row new"]:
        """The tokens to run: the tail, then all answer tokens but the last, whose logits are not needed. Each prompt
        may have several answers in a row."""
        tail = self.tail.repeat_interleave(len(answer) // len(self), dim=0)
        return torch.cat([tail, answer[:, :-1]], dim=1)


_past: ContextVar[Past] = ContextVar("past")


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **_):
    """Attention over the shared key-value cache and a row's own new tokens, without a copy of the cache per row."""
    past = _past.get()
    new, groups = query.shape[2], query.shape[1] // key.shape[1]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    tensors = (key, value, past.keys[module.layer_idx], past.values[module.layer_idx])
    key, value, old_keys, old_values = (tensor.repeat_interleave(groups, 1) for tensor in tensors)
    # The rows of a prompt stand together, so they fold into its query positions: [prompt, head, repeat x new, d_head].
    folded = query.unflatten(0, (len(past), -1)).transpose(1, 2).flatten(2, 3)
    before = folded @ old_keys.transpose(-1, -2) * scaling
    now = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        before, now = (softcap * torch.tanh(scores / softcap) for scores in (before, now))
    before = before.masked_fill(~past.mask[:, None, None], torch.finfo(before.dtype).min)
    before = before.unflatten(2, (-1, new)).transpose(1, 2).flatten(0, 1)
    # An attention sink is a learned score that takes its share of the softmax and belongs to no token.
    sinks = [] if s_aux is None else [s_aux.view(1, -1, 1, 1).expand(len(now), -1, new, 1).to(now)]
    weights = torch.cat([before, now + attention_mask, *sinks], dim=-1).softmax(-1)
    before, now = weights[..., : before.shape[-1]], weights[..., before.shape[-1] :][..., :new]
    folded = before.unflatten(0, (len(past), -1)).transpose(1, 2).flatten(2, 3)
    output = (folded @ old_values).unflatten(2, (-1, new)).transpose(1, 2).flatten(0, 1)
    return (output + now @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)


@torch.no_grad()
def prompt_past(model: Module, prompts: Ids) -> Past:
    """Run all tokens but the last of every prompt once. Raises ValueError for prompts without further tokens,
    ModelError for prompts longer than a sliding window and for encoders, whose first tokens read the last ones."""
    if is_encoder(model):
        raise ModelError("an encoder reads a prompt in both directions, so no part of it can be run before the rest")
    shortest = min(map(len, prompts), default=0)
    if shortest < 2:
        raise ValueError(f"need prompts of more than 1 token, got {len(prompts)}, the shortest of {shortest}")
    check_fits(model, max(map(len, prompts)), window=True)
    rows = [list(prompt[:-1]) for prompt in prompts]
    prefix, _ = generation.run_prefix(model, generation.reusable_prefix(model, rows))
    inputs = generation.inputs_after(model, prefix, rows)
    model.base_model(**inputs)
    layers = inputs["past_key_values"].layers
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if len(kept) != len(anatomy(model).layers) or any(keys is None for keys, _ in kept):
        raise ModelError("some of its layers have no key-value cache of their own")
    keys, values = zip(*kept, strict=True)
    last = torch.tensor([[prompt[-1]] for prompt in prompts], device=model.device)
    return Past(keys, values, inputs["attention_mask"].bool(), last, position=inputs["attention_mask"].sum(1))


@torch.inference_mode()
def continued(
    model: Module, past: Past, *, max_new_tokens: int, end_id: generation.Ends, during_prompt: Callable = nullcontext
) -> list[list[int]]:
    """Greedy answers to prompts with a cache; the context `during_prompt()` is left before answer tokens run."""
    cache = _copied(model, past, 1, first=0)
    mask = torch.cat([past.mask.long(), torch.ones_like(past.tail)], dim=1)
    with during_prompt():
        logits = generation.next_logits(model, past.tail, mask, cache)
    return generation.decode_from(model, logits, cache, mask, max_new_tokens, end_id)


def forward(
    model: Module, past: Past, rows: Int[Tensor, "row new"], *, layer: int = 0, hidden: Hidden = None
) -> Float[Tensor, "row new vocab"]:
    """Logits at every token of `rows`, in which all rows of a prompt stand together. With `layer` and its input
    `hidden`, only the layers from there on run. Gradients flow if enabled. Raises ValueError if the rows are no
    multiple of the prompts, ModelError if they are longer than a sliding window."""
    if len(rows) % len(past):
        raise ValueError(f"{len(rows)} rows for {len(past)} prompts")
    parts, new, repeats = anatomy(model), rows.shape[1], len(rows) // len(past)
    check_fits(model, past.position.max().item() + new, window=True)
    where = past.position.repeat_interleave(repeats)[:, None] + torch.arange(new, device=rows.device)
    inputs = {"input_ids": rows, "position_ids": where}
    if not _shares_past(parts):
        mask = torch.cat([past.mask.repeat_interleave(repeats, dim=0), torch.ones_like(rows).bool()], dim=1).long()
        with _from_layer(parts, layer, hidden):
            cache = _copied(model, past, repeats, first=layer)
            return model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    dtype = next(model.parameters()).dtype
    causal = torch.full((new, new), torch.finfo(dtype).min, dtype=dtype, device=rows.device).triu(1)
    with _from_layer(parts, layer, hidden), _sharing(model, past):
        return model(**inputs, attention_mask=causal.expand(len(rows), 1, new, new), use_cache=False).logits


def _shares_past(parts: Anatomy) -> bool:
    """Does attention go through the interface of transformers, so that `_attend` can take its place, and may it?"""
    attention = parts.attentions[0]
    # Latent attention keeps something smaller than keys and values.
    latent = getattr(attention, "kv_lora_rank", None) is not None
    fits = hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS")
    return fits and not latent and not compute.PLAIN


def _copied(model: Module, past: Past, repeats: int, *, first: int) -> DynamicCache:
    """The past with a copy for every row, from layer `first` on, for attention that takes no shared one."""
    cache = DynamicCache(config=model.config)
    for layer, tensors in enumerate(zip(past.keys, past.values, strict=True)):
        copies = (tensor.repeat_interleave(repeats, dim=0) for tensor in tensors)
        cache.update(*(copies if layer >= first else tensors), layer)
    return cache


@contextmanager
def _sharing(model: Module, past: Past) -> Iterator[None]:
    """While this lasts, attention of the model is `_attend` with this past."""
    before, token = model.config._attn_implementation, _past.set(past)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _past.reset(token)


class _Skipped(Module):
    """Stands for a layer that does not run. It has the layer's attributes and place, because models look at both."""

    def __init__(self, layer: Module, *, as_tuple: bool) -> None:
        super().__init__()
        self.__dict__ |= {"layer": layer, "as_tuple": as_tuple}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        return (hidden_states, None) if self.as_tuple else hidden_states


@functools.cache
def _takes_tuples(decoder: type[Module]) -> bool:
    """Does a decoder take the first of what each layer returns? Its source says so."""
    source = inspect.getsource(decoder.forward)
    return "= outputs[0]" in source or "= layer_outputs[0]" in source


@contextmanager
def _from_layer(parts: Anatomy, layer: int, hidden: Hidden) -> Iterator[None]:
    """While this lasts, the layers before `layer` do not run, and it starts with `hidden`."""
    as_tuple = _takes_tuples(type(parts.owner))
    skipped = [_Skipped(one, as_tuple=as_tuple) for one in parts.layers[:layer]]
    with ExitStack() as stack:
        stack.callback(setattr, parts.owner, parts.attribute, getattr(parts.owner, parts.attribute))
        setattr(parts.owner, parts.attribute, ModuleList([*skipped, *parts.layers[layer:]]))
        if hidden is not None:
            stack.enter_context(editing([parts.layers[layer]], lambda _, __: hidden))
        yield
