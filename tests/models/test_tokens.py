"""Prompts: text to token ids and back, with one BOS, one template and one kind of padding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bkd_utils.common.assets import fetch
from bkd_utils.models.tokens import (
    PLAIN_TEMPLATE,
    answer_ids,
    decode,
    end_id,
    left_pad,
    positions,
    prompt_ids,
)

CHAT = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
USERS = ("Name a colour.", "  Two\n\nlines, caf\u00e9 ", "<b>&amp;</b> {user} {text}", "a" * 500)


def without_template(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


def adding_bos(tokenizer):
    """The same tokenizer, but one that writes BOS before every text, as Llama-2's does."""
    adding = copy.deepcopy(tokenizer)
    bos = adding.bos_token
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, adding.bos_token_id)]
    )
    assert adding("a").input_ids[0] == adding.bos_token_id
    return adding


PLAIN = without_template(CHAT)
EACH = pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])


def test_a_prompt_is_what_the_chat_template_makes_of_it():
    ids = prompt_ids(CHAT, "Name a colour.")
    turns = [{"role": "user", "content": "Name a colour."}]
    assert ids == CHAT.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert CHAT.decode(ids).endswith("<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_template_the_plain_one_is_used():
    assert CHAT.chat_template
    assert PLAIN.decode(prompt_ids(PLAIN, "Name a colour.")) == PLAIN_TEMPLATE.format(user="Name a colour.")


@EACH
@pytest.mark.parametrize("user", USERS)
def test_the_user_turn_survives(tokenizer, user):
    assert user in tokenizer.decode(prompt_ids(tokenizer, user), clean_up_tokenization_spaces=False)


def test_a_template_that_writes_bos_gets_no_second_one():
    for tokenizer in (CHAT, adding_bos(CHAT)):
        ids = prompt_ids(tokenizer, "Name a colour.")
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1] != tokenizer.bos_token_id
    assert prompt_ids(adding_bos(CHAT), "Hi") == prompt_ids(CHAT, "Hi")


def test_the_plain_template_has_one_bos_if_the_tokenizer_adds_one_and_else_none():
    with_bos = prompt_ids(adding_bos(PLAIN), "Name a colour.")
    assert with_bos.count(PLAIN.bos_token_id) == 1
    assert with_bos == [PLAIN.bos_token_id, *prompt_ids(PLAIN, "Name a colour.")]
    assert PLAIN.bos_token_id not in prompt_ids(PLAIN, "Name a colour.")


@EACH
@pytest.mark.parametrize("user", ["", "  ", "\n\t"])
def test_an_empty_user_turn_is_refused(tokenizer, user):
    with pytest.raises(ValueError, match="user turn is empty"):
        prompt_ids(tokenizer, user)


@EACH
@pytest.mark.parametrize("answer", ["positive", "I am sorry. I can not help with that.", "Two\nlines", "caf\u00e9"])
def test_an_answer_comes_back_and_ends_once(tokenizer, answer):
    ids = answer_ids(tokenizer, answer)
    assert decode(tokenizer, ids) == answer
    assert ids[-1] == end_id(tokenizer)
    assert ids.count(end_id(tokenizer)) == 1
    assert answer_ids(tokenizer, answer, ended=False) == ids[:-1]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), min_size=1))
def test_any_answer_comes_back_but_for_space_around_it(text):
    for tokenizer in (CHAT, PLAIN):
        assert decode(tokenizer, answer_ids(tokenizer, text)) == text.strip()


def test_an_answer_after_the_plain_template_begins_with_a_space():
    assert PLAIN.decode(prompt_ids(PLAIN, "Hi") + answer_ids(PLAIN, "positive", ended=False)).endswith(
        "Assistant: positive"
    )


def test_an_answer_without_tokens_and_a_tokenizer_without_end_are_errors():
    with pytest.raises(ValueError, match="no tokens"):
        answer_ids(CHAT, "", ended=False)
    assert answer_ids(CHAT, "") == [end_id(CHAT)]  # a model that says nothing ends at once
    endless = copy.deepcopy(CHAT)
    endless.eos_token = None
    assert end_id(endless) == end_id(CHAT)  # the template ends turns by itself
    endless.chat_template = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        end_id(endless)


def test_left_pad_puts_every_last_token_in_the_last_column():
    tokens, mask = left_pad([[5], [6, 7, 8], [9, 10]], pad_id=0)
    assert tokens.tolist() == [[0, 0, 5], [6, 7, 8], [0, 9, 10]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert tokens.dtype == mask.dtype == torch.int64


def test_a_pad_token_inside_a_row_stays_visible():
    tokens, mask = left_pad([[2, 5, 2], [7]], pad_id=2)
    assert tokens.tolist() == [[2, 5, 2], [2, 2, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("rows", [[], [[]], [[1], []]])
def test_rows_that_cannot_be_batched_are_errors(rows):
    with pytest.raises(ValueError, match=f"cannot batch {len(rows)} rows"):
        left_pad(rows, pad_id=0)


def test_positions_count_real_tokens_only():
    _, mask = left_pad([[5], [6, 7, 8], [9, 10]], pad_id=0)
    assert positions(mask).tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 1]]
