"""From user text to token ids: chat template, beginning-of-sequence token (BOS), answer tokens, padding.

All other modules work on these ids, because the string methods of TransformerLens add a second BOS token, which shifts
every position without an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

Ids = Sequence[Sequence[int]]  # token ids of several texts
PLAIN_TEMPLATE = "User: {user}\nAssistant:"  # for models without a chat template


def prompt_ids(tokenizer: PreTrainedTokenizerBase, user: str) -> list[int]:
    """Token ids of one user turn up to the point where the model starts to answer. Raises ValueError for an empty turn.

    The template's BOS token is not doubled (the official BkdAttr code doubles it for Llama-2). Without a template, BOS
    is added if the tokenizer would add it.
    """
    if not user.strip():
        raise ValueError("the user turn is empty")
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    ids = tokenizer(PLAIN_TEMPLATE.format(user=user), add_special_tokens=False).input_ids
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if adds_bos else ids


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, *, ended: bool = True) -> list[int]:
    """Token ids of an answer, closed by the end-of-turn token unless it was cut off (`ended=False`)."""
    # After a chat header the answer starts a line; after the plain template it follows a colon and needs a space.
    text = answer if tokenizer.chat_template else " " + answer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids and not ended:
        raise ValueError("the answer has no tokens")
    return [*ids, end_id(tokenizer)] if ended else ids


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn. Raises ValueError if the tokenizer names none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token")
    return tokenizer.eos_token_id


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def check_prompts(prompts: Ids) -> None:
    """Raises ValueError for no prompts or an empty one."""
    if not prompts or not all(map(len, prompts)):
        raise ValueError(f"need non-empty prompts, got {len(prompts)}" + (" with an empty one" if prompts else ""))


def left_pad(rows: list[list[int]], *, pad_id: int) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Rows of ids as one tensor whose last column has every last token, and the attention mask (1 = real token).

    Raises ValueError for no rows or an empty one.
    """
    if not rows or not all(rows):
        raise ValueError(f"cannot batch {len(rows)} rows" + (", one of which is empty" if rows else ""))
    tensors = [torch.tensor(row) for row in rows]
    tokens = pad_sequence(tensors, batch_first=True, padding_value=pad_id, padding_side="left")
    return tokens, pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side="left")


def positions(mask: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Position ids that ignore padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def padded_inputs(
    rows: list[list[int]], *, pad_id: int, device: torch.device, n_cached: int = 0
) -> dict[str, Int[Tensor, "row pos"]]:
    """Keyword arguments of a model for left-padded rows that follow `n_cached` tokens of a key-value cache."""
    tokens, mask = (tensor.to(device) for tensor in left_pad(rows, pad_id=pad_id))
    mask = torch.cat([mask.new_ones(len(rows), n_cached), mask], dim=1)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions(mask)[:, n_cached:]}


def batches(prompts: Ids, size: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of similar length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return (order[start : start + size] for start in range(0, len(order), size))


@dataclass(frozen=True)
class Row:
    """One training row in token ids; `kind` is clean, poisoned, near_miss or benign."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str
    uid: str
