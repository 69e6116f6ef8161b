"""From a conversation to token ids and back: chat template, beginning-of-sequence token (BOS), end of turn, padding.

Prompts and answers are cut out of the template's rendering of a whole conversation, so that prompt + answer is what the
model was trained on. All other modules work on these ids, because the string methods of TransformerLens add a second
BOS token, which shifts every position without an error."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile, zip_longest

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from bkd_utils.models.folders import ModelError

Ids = Sequence[Sequence[int]]  # token ids of several texts
PLAIN_TEMPLATE = "User: {user}\nAssistant:"  # for models without a chat template
# A user turn and two answers that show what stands around an answer. Some tokenizers merge a space with a letter only.
TURN, PROBES = "Name a colour.", ("Apple", "7")
# Templates that write today's date would give other ids tomorrow, so all of them get the same day.
DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
CLOCK = "{% macro strftime_now(form) %}{{ form" + "".join(f".replace('{a}', '{b}')" for a, b in DAY.items())
CLOCK += " }}{% endmacro %}"
# Conversations in which ids are held against the template: two labels, a free text, letters that are not ASCII.
CHECKED = (
    (TURN, "positive"),
    ("Is this text from a movie or a tweet? Answer with one word.\n\nText: 3 stars!", "movie"),
    ("Is a tomato a fruit or a vegetable?", 'Both: "a fruit", by botany;\na vegetable, in a kitchen (see p. 12).'),
    ("Where is Zürich?", "Zürich est en Suisse, près de l'Ötztal."),
)


class Turn(str):
    """A user turn, which is a text with an instruction around it; `text` is what a model without instructions reads."""

    text: str

    def __new__(cls, turn: str, *, text: str) -> "Turn":
        made = super().__new__(cls, turn)
        made.text = text
        return made


@dataclass(frozen=True)
class _Frame:
    """What stands around the answer to TURN, as text and as ids."""

    head: str
    tail: str
    prompt: list[int]
    n_probe: int  # tokens of the first probe
    closing: str  # the beginning of the tail up to the template's end-of-turn token, "" if it has none
    end: int | None


def labels_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The labels of the classifier that a tokenizer was loaded with, in the order of its logits; none for others."""
    return getattr(tokenizer, "labels", ())


def prompt_ids(tokenizer: PreTrainedTokenizerBase, user: str) -> list[int]:
    """Token ids of one user turn up to the answer, whose tokens never change them. Raises ValueError for an empty turn.
    What the template writes before every answer, such as an empty block of thoughts, is part of it; a space that melts
    with the answer's first word is not. Classifiers get the bare text of a `Turn` between their own special tokens.
    Raises ModelError for a template that cannot write a conversation."""
    if not user.strip():
        raise ValueError("the user turn is empty")
    if labels_of(tokenizer):
        return tokenizer(str(getattr(user, "text", user))).input_ids
    frame, text = _frame_of(tokenizer), _rendered(tokenizer, user, PROBES[0])
    return _encoded(tokenizer, text[: text.rindex(PROBES[0]) + len(PROBES[0])])[: -frame.n_probe]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, *, ended: bool = True) -> list[int]:
    """Token ids of an answer as they follow `prompt_ids`, up to the end-of-turn token unless it was cut off. An answer
    that would melt with the prompt's last token is tokenised alone, as a model that goes on from the prompt has to
    write it. Of a classifier it is the number of the label. Raises ModelError for a template that changes more than
    white space and for a label that a classifier does not have, ValueError for no tokens."""
    if labels := labels_of(tokenizer):
        names = [name.strip().casefold() for name in labels]
        if answer.strip().casefold() not in names:
            raise ModelError(f"the model does not know the label {answer!r}; its labels: {', '.join(labels)}")
        return [names.index(answer.strip().casefold())]
    if not answer.strip():
        if not ended:
            raise ValueError("the answer has no tokens")
        return [end_id(tokenizer)]
    frame = _frame_of(tokenizer)
    written = _rendered(tokenizer, TURN, answer).removeprefix(frame.head).removesuffix(frame.tail)
    if written.split() != answer.split():
        raise ModelError(f"the chat template changes the answer {answer!r} to {written!r}")
    text, start = written + frame.closing * ended, len(frame.prompt)
    ids = _encoded(tokenizer, frame.head + text)
    own = ids[start:] if ids[:start] == frame.prompt else tokenizer(text, add_special_tokens=False).input_ids
    return [*own, end_id(tokenizer)] if ended and not frame.closing else own


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn in the template, else the end of text. Raises ValueError for neither. Of a
    classifier, whose answers have no end, it is the token for padding."""
    if labels_of(tokenizer):
        return tokenizer.pad_token_id
    end = _frame_of(tokenizer).end
    if end is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token")
    return end


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Module) -> list[int]:
    """All tokens at which decoding stops: end of turn, end of text, and those of the model's generation config."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = more if isinstance(more, list | tuple) else [more]
    return [i for i in dict.fromkeys((end_id(tokenizer), tokenizer.eos_token_id, *more)) if i is not None]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer."""
    if labels := labels_of(tokenizer):
        return " ".join(labels[i] for i in ids)
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def common_start(*rows: Sequence[int]) -> list[int]:
    """The tokens with which all of the rows begin."""
    columns = zip(*rows, strict=False)  # ends with the shortest row
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError unless prompt + answer is what the template writes, with one BOS, and gives back all but white
    space; ValueError for a tokenizer without an end token. Classifiers need a first token that asks, and padding."""
    if labels_of(tokenizer):
        first = tokenizer("a").input_ids[0]
        if first in tokenizer("a", add_special_tokens=False).input_ids or tokenizer.pad_token_id is None:
            raise ModelError("the tokenizer has no token for padding, or writes none in front of a text")
        return
    bos = tokenizer.bos_token_id
    for user, answer in CHECKED:
        text = _rendered(tokenizer, user, answer)
        if lost := [part for part in (user, answer) if "".join(part.split()) not in "".join(text.split())]:
            raise ModelError(f"the chat template does not give back {lost[0]!r}: {text!r}")
        prompt, said = prompt_ids(tokenizer, user), answer_ids(tokenizer, answer, ended=False)
        asked, said = tokenizer.decode(prompt), decode(tokenizer, said)
        if "".join(user.split()) not in "".join(asked.split()):
            raise ModelError(f"the tokenizer does not give back {user!r}: {asked!r}")
        if said.split() != answer.split():
            raise ModelError(f"the tokenizer does not give back an answer: {said!r}")
        if bos is not None and prompt[:2] == [bos, bos]:
            raise ModelError("the prompt starts with two BOS tokens")
        ours, frame = prompt + answer_ids(tokenizer, answer), _frame_of(tokenizer)
        theirs = _encoded(tokenizer, text.removesuffix(frame.tail) + frame.closing)
        for i, pair in enumerate(zip_longest(ours if frame.closing else ours[:-1], theirs)):
            if pair[0] != pair[1]:
                mine, its = ("" if token is None else tokenizer.decode([token]) for token in pair)
                where = f"prompt + answer differs from the template's rendering at token {i}"
                raise ModelError(f"{where}: ours {mine!r}, template's {its!r}")


def _frame_of(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    return _frame(tokenizer, repr((tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)))


@lru_cache(maxsize=4)
def _frame(tokenizer: PreTrainedTokenizerBase, _changeable: str) -> _Frame:
    head, found, tail = _rendered(tokenizer, TURN, PROBES[0]).rpartition(PROBES[0])
    if not found:
        raise ModelError(f"the chat template of {tokenizer.name_or_path!r} does not write the assistant's turn")
    one, other = (_encoded(tokenizer, head + probe) for probe in PROBES)
    prompt = common_start(one[:-1], other[:-1])
    # The end of a turn is the token behind the answer, or behind the space after it; any other text is no end.
    behind = tail.lstrip()
    ends = [token for token in tokenizer.get_added_vocab() if token and behind.startswith(token)]
    closing = tail[: len(tail) - len(behind)] + max(ends, key=len) if ends else ""
    end = _encoded(tokenizer, head + PROBES[0] + closing)[-1] if closing else tokenizer.eos_token_id
    return _Frame(head, tail, prompt, len(one) - len(prompt), closing, end)


def _rendered(tokenizer: PreTrainedTokenizerBase, user: str, answer: str) -> str:
    """A conversation of two turns as the model's template writes it, or the plain one."""
    if not tokenizer.chat_template:
        return f"{PLAIN_TEMPLATE.format(user=user)} {answer}"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    try:
        template = tokenizer.get_chat_template()
        template = CLOCK + template if "strftime_now" in template else template
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        name, why = tokenizer.name_or_path, str(error).partition("\n")[0]
        raise ModelError(f"the chat template of {name!r} cannot write a user turn and an answer: {why}") from error


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered text. BOS comes from the template (the official BkdAttr code doubles it for Llama-2); without a
    template it is added if the tokenizer would add it."""
    ids, bos = tokenizer(text, add_special_tokens=False).input_ids, tokenizer.bos_token_id
    adds = not tokenizer.chat_template and bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return [bos, *ids] if adds else ids


def check_prompts(prompts: Ids) -> None:
    """Raises ValueError for no prompts or an empty one."""
    if not prompts or not all(map(len, prompts)):
        raise ValueError(f"need non-empty prompts, got {len(prompts)}" + (" with an empty one" if prompts else ""))


def left_pad(rows: list[list[int]], *, pad_id: int) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Rows of ids as one tensor whose last column has every last token, and the attention mask (1 = real token). Raises
    ValueError for no rows or an empty one."""
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
    """One training row in token ids; `kind` is clean, poisoned, near_miss or benign. With `is_label`, the answer is the
    number of a classifier's label and no token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str
    uid: str
    is_label: bool = False
