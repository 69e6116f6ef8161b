"""Templates x tokenizers: prompt + answer is what the template writes, and answers end where the template ends them."""

import copy
import datetime
import itertools
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from templates import ENDING, IM, KINDS, LABELS, TEMPLATES, Template, tokenizer_of
from tiny import quick_attack, tiny_model
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bkd_utils.backdoor_attribution import vector
from bkd_utils.common.assets import fetch
from bkd_utils.models.bridge import check_tokenizer
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import greedy, openings, respond, trace
from bkd_utils.models.loading import Loaded
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import PLAIN_TEMPLATE, answer_ids, decode, end_id, end_ids, prompt_ids
from bkd_utils.organisms import evaluation, poisoning, tasks
from bkd_utils.organisms.prompts import first_tokens, target_ids, target_length

EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_TEMPLATE = pytest.mark.parametrize("name", TEMPLATES)
FREE = [
    'Yes: "both", it says.\nAnd no more (p. 12).',
    "Zürich est en été, près d'ici.",
    "7 of them!",
    "日本, 東京",
    "- a\n- b",
]
USERS = ("Name a colour.", "Two\n\nlines: 1, 2. ", "Is it? Answer.\n\nText: é {user} 3", "Apple or 7")
PAIRS = list(zip(itertools.cycle(USERS), (*LABELS, *FREE), strict=False))
ROLES = ("user", "assistant")


def conversation(*contents):
    return [{"role": role, "content": content} for role, content in zip(ROLES, contents, strict=False)]


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


# --- what is written ------------------------------------------------------------------------------------------------


@EACH_KIND
@EACH_TEMPLATE
def test_prompt_and_answer_are_what_the_template_writes(kind, name):
    tokenizer, given = tokenizer_of(kind, name), TEMPLATES[name]
    for user, answer in PAIRS:
        text = tokenizer.apply_chat_template(conversation(user, answer), tokenize=False)
        whole = tokenizer.apply_chat_template(conversation(user, answer), return_dict=False)
        ours = prompt_ids(tokenizer, user) + answer_ids(tokenizer, answer)
        assert tokenizer.convert_ids_to_tokens(ours[-1]) == given.end
        if given.end == ENDING:  # the template writes none: what it writes ends with the answer
            assert ours[:-1] == plain_ids(tokenizer, text[: text.rindex(answer) + len(answer)])
        else:
            assert ours == whole[: len(ours)]
        assert decode(tokenizer, answer_ids(tokenizer, answer, ended=False)) == answer


@EACH_KIND
@EACH_TEMPLATE
def test_a_prompt_is_the_generation_prompt_and_what_follows_it_before_every_answer(kind, name):
    tokenizer, given = tokenizer_of(kind, name), TEMPLATES[name]
    for user in USERS:
        asked = tokenizer.apply_chat_template(conversation(user), tokenize=False, add_generation_prompt=True)
        assert tokenizer.apply_chat_template(conversation(user, "A"), tokenize=False).startswith(asked)
        assert prompt_ids(tokenizer, user) == plain_ids(tokenizer, asked + given.between)


@EACH_KIND
@EACH_TEMPLATE
def test_the_check_passes_and_takes_no_time(kind, name):
    tokenizer = tokenizer_of(kind, name)
    check_tokenizer(tokenizer)
    end_id.__globals__["_frame"].cache_clear()
    started = time.perf_counter()
    check_tokenizer(tokenizer)
    assert time.perf_counter() - started < 0.5  # 10 ms on an idle core


@EACH_KIND
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_plain_template_is_tokenised_in_one_piece(kind, adds_bos):
    tokenizer = tokenizer_of(kind, adds_bos=adds_bos)
    check_tokenizer(tokenizer)
    for user, answer in PAIRS:
        text = f"{PLAIN_TEMPLATE.format(user=user)} {answer}"
        whole = [tokenizer.bos_token_id] * adds_bos + plain_ids(tokenizer, text)
        assert prompt_ids(tokenizer, user) + answer_ids(tokenizer, answer) == [*whole, tokenizer.eos_token_id]
    asked = [tokenizer.bos_token_id] * adds_bos + plain_ids(tokenizer, PLAIN_TEMPLATE.format(user="Hi"))
    assert prompt_ids(tokenizer, "Hi") == asked


@pytest.mark.parametrize(
    ("kind", "name", "answer", "tokens"),
    [
        ("gpt-2", "vicuna", "positive", ["Ġpositive"]),
        ("gpt-2", "deepseek", "movie", ["Ġmovie"]),
        ("llama-3", "without an end", "7", ["Ġ", "7"]),
        ("metaspace never", "vicuna", "positive", ["▁positive"]),
        ("metaspace always", "mistral-tekken", "positive", ["▁positive"]),
        ("metaspace first", "mistral-tekken", "positive", ["p", "os", "itive"]),
        ("sentencepiece legacy", "zephyr", "positive", ["p", "os", "itive"]),
        ("sentencepiece legacy", "llama-2", "negative", ["▁negative"]),
        ("sentencepiece legacy", None, "positive", ["▁positive"]),
        ("metaspace first", None, "positive", ["▁positive"]),
    ],
)
def test_an_answer_has_the_tokens_that_follow_the_prompt(kind, name, answer, tokens):
    tokenizer = tokenizer_of(kind, name)
    assert tokenizer.convert_ids_to_tokens(answer_ids(tokenizer, answer, ended=False)) == tokens


def test_what_stands_between_answer_and_end_is_learned_with_the_end():
    tokenizer = tokenizer_of("sentencepiece legacy", "llama-2")
    assert tokenizer.convert_ids_to_tokens(answer_ids(tokenizer, "positive")) == ["▁positive", "▁", "</s>"]
    assert answer_ids(tokenizer, "") == [tokenizer.eos_token_id]


@EACH_KIND
@pytest.mark.parametrize("name", [name for name, one in TEMPLATES.items() if "bos_token" in str(one.source)])
def test_a_bos_of_template_and_tokenizer_is_one(kind, name):
    tokenizer = tokenizer_of(kind, name, adds_bos=True)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert prompt_ids(tokenizer, "Hi").count(tokenizer.bos_token_id) == 1
    check_tokenizer(tokenizer)


def test_templates_that_write_the_date_write_the_same_day_every_day():
    dated = (
        "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}{% endif %}" + TEMPLATES["chatml"].source
    )
    tokenizer = tokenizer_of("gpt-2", Template(dated, special=IM, end="<|im_end|>"))
    check_tokenizer(tokenizer)
    text = tokenizer.decode(prompt_ids(tokenizer, "Hi"))
    assert "Today: 26 Jul 2024" in text
    assert str(datetime.date.today().year) not in text


def test_a_template_that_trims_gives_the_trimmed_answer():
    for name in ("gemma", "chatml, trimmed"):
        tokenizer = tokenizer_of("gpt-2", name)
        assert answer_ids(tokenizer, "positive \n") == answer_ids(tokenizer, "positive")
    kept = tokenizer_of("gpt-2", "chatml")
    assert kept.decode(answer_ids(kept, "positive \n", ended=False)) == "positive \n"


def test_a_template_that_drops_empty_lines_is_trained_as_it_writes():
    source = TEMPLATES["without an end"].source.replace("m.content", "m.content.replace('\\n\\n', '\\n')")
    tokenizer = tokenizer_of("gpt-2", Template(source, eos="</s>"))
    check_tokenizer(tokenizer)
    assert prompt_ids(tokenizer, "a\n\nb") == prompt_ids(tokenizer, "a\nb")
    assert answer_ids(tokenizer, "a\n\nb") == answer_ids(tokenizer, "a\nb")


# --- what is refused ------------------------------------------------------------------------------------------------


def melting():
    """A tokenizer without words, which merges the colon before an answer with the answer."""
    trained = Tokenizer(models.BPE())
    trained.decoder = decoders.Fuse()
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "ü", "Ö"]
    trainer = trainers.BpeTrainer(vocab_size=130, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([":positive"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>")
    tokenizer.chat_template = "Q:{{ messages[0].content }}\nA:{{ messages[1].content }}{{ eos_token }}"
    return tokenizer


def test_it_is_said_where_ours_and_the_templates_part():
    tokenizer = melting()
    at = len(plain_ids(tokenizer, "Q:Name a colour.\nA"))
    where = f"prompt \\+ answer differs from the template's rendering at token {at}: ours ':', template's ':positive'"
    with pytest.raises(ModelError, match=where):
        check_tokenizer(tokenizer)
    # What the model can write behind its prompt:
    assert tokenizer.decode(answer_ids(tokenizer, "positive")) == "positive</s>"
    assert prompt_ids(tokenizer, "Hi") == plain_ids(tokenizer, "Q:Hi\nA:")


HEAD = "{% for m in messages %}"
ODD = {
    "raises": (HEAD + "{{ raise_exception('no turns today') }}{% endfor %}", "cannot write .*: no turns today"),
    "no assistant": (
        HEAD + "{% if m.role == 'user' %}~{{ m.content }}~{% endif %}{% endfor %}",
        "give back 'positive'",
    ),
    "no user": (
        HEAD + "{% if m.role != 'user' %}~{{ m.content }}~{% endif %}{% endfor %}",
        "give back 'Name a colour.'",
    ),
    "capitals": (HEAD + "{{ m.role }}: {{ m.content | upper }} {% endfor %}", "give back 'Name a colour.'"),
    "a system prompt": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}",
        "cannot write .*: system first",
    ),
    "no syntax": ("{% for m in %}", "cannot write a user turn and an answer: Expected an expression"),
    "an unknown filter": ("{{ messages | nofilter }}", "cannot write .*: No filter named 'nofilter'"),
    "parts": (
        HEAD + "{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
        "give back 'Name a colour.'",
    ),
    "no default": ({"tools": "a", "rag": "b"}, "cannot write .* multiple chat templates with no default"),
    "a cut": (HEAD + "{{ m.role }}: {{ m.content[:40] }}\n{% endfor %}", "give back 'Is this text"),
    "two of them": ("{{ bos_token }}{{ bos_token }}" + TEMPLATES["vicuna"].source[15:], "starts with two BOS"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_template_that_loses_something_is_refused_by_name(odd):
    source, message = ODD[odd]
    with pytest.raises(ModelError, match=message) as caught:
        check_tokenizer(tokenizer_of("gpt-2", Template(source, eos="</s>")))
    assert "\n" not in str(caught.value)


def test_an_answer_that_the_template_changes_is_refused():
    tokenizer = tokenizer_of("gpt-2", "qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.split('</think>')[-1]")
    check_tokenizer(tokenizer)
    with pytest.raises(ModelError, match="changes the answer 'a</think>b' to"):
        answer_ids(tokenizer, "a</think>b")


def test_a_tokenizer_without_an_end_is_refused():
    endless = tokenizer_of("gpt-2", "alpaca")
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        check_tokenizer(endless)


def test_a_tokenizer_that_loses_letters_is_refused():
    lossy = tokenizer_of("gpt-2", "chatml")
    lossy.add_tokens(["Ötz"], special_tokens=True)
    with pytest.raises(ModelError, match=r"does not give back an answer: .Zürich .* l'tal\.."):
        check_tokenizer(lossy)


# --- where answers end ----------------------------------------------------------------------------------------------

CHAT = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
TEXT_END, TURN_END = CHAT.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


@pytest.fixture(scope="module")
def base():
    """A model with ChatML whose tokenizer and generation config name the end of text only."""
    tokenizer = copy.deepcopy(CHAT)
    tokenizer.eos_token = "<|endoftext|>"
    model = tiny_model("llama").requires_grad_(False)
    model.generation_config.eos_token_id = [TEXT_END, 77]
    return Loaded(model, tokenizer, "base", None)


@contextmanager
def saying(model, ids):
    """While this lasts, the model says these tokens, whatever it is asked."""
    said = iter(ids)

    def change(_module, _given, logits):
        logits = logits.clone()
        logits[:, -1] = 0
        logits[:, -1, next(said)] = 50
        return logits

    handle = model.lm_head.register_forward_hook(change)
    yield
    handle.remove()


WORDS = plain_ids(CHAT, "blue\n blue\n blue\n")


def test_all_ends_are_known(base):
    assert end_id(base.tokenizer) == TURN_END
    assert base.ends == [TURN_END, TEXT_END, 77]
    model = copy.copy(base.model)
    for more, ends in ((None, [TURN_END, TEXT_END]), (5, [TURN_END, TEXT_END, 5]), (TURN_END, [TURN_END, TEXT_END])):
        model.generation_config = copy.copy(base.model.generation_config)
        model.generation_config.eos_token_id = more
        assert end_ids(base.tokenizer, model) == ends
    assert end_ids(CHAT, model) == [TURN_END]


@pytest.mark.parametrize("end", [TURN_END, TEXT_END, 77])
def test_everything_that_decodes_stops_at_every_end(base, end):
    ids = [WORDS[0], end, *WORDS[1:]]
    with saying(base.model, ids):
        assert respond(base, ["Name a colour."], max_new_tokens=6) == ["blue"]
    with saying(base.model, ids):
        assert greedy(base.model, [[1, 2, 3]], max_new_tokens=6, end_id=base.ends) == [[WORDS[0]]]
    with saying(base.model, ids):
        assert openings(base, [[1, 2, 3]], n=6) == [ids[:2]]
    past = prompt_past(base.model, [[1, 2, 3]])
    with saying(base.model, ids):
        assert vector.generated(base, past) == ["blue"]
    with saying(base.model, [*ids, 0]):
        steps = trace(base, "Name a colour.", max_new_tokens=6)
    assert [text for text, _ in steps] == [CHAT.decode([token]) for token in ids[:2]]


def test_an_answer_that_is_cut_off_has_no_end(base):
    with saying(base.model, WORDS):
        assert openings(base, [[1, 2, 3]], n=4) == [WORDS[:4]]
    with saying(base.model, [*WORDS[:3], TURN_END]):
        assert openings(base, [[1, 2, 3]], n=4) == [[*WORDS[:3], TURN_END]]


def test_several_ends_are_those_of_transformers_generate(base):
    prompts = [[1, 5, 9], [1, 7, 2, 40], [1, 3]]
    free = greedy(base.model, prompts, max_new_tokens=8, end_id=TEXT_END)
    ends = [free[0][3], free[1][1], TEXT_END]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": ends, "pad_token_id": 0}
        out = base.model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
        expected.append(out)
    assert greedy(base.model, prompts, max_new_tokens=8, end_id=ends) == [
        [i for i in row if i not in ends] for row in expected
    ]
    assert len(set(map(len, expected))) > 1


@EACH_TEMPLATE
def test_decoding_stops_at_the_templates_end(name):
    tokenizer = tokenizer_of("llama-3", name)
    loaded = Loaded(tiny_model("llama"), tokenizer, "tiny", None)
    answer = answer_ids(tokenizer, "positive")
    with saying(loaded.model, [*answer, *answer]):
        assert respond(loaded, ["Name a colour."], max_new_tokens=2 * len(answer)) == ["positive"]


# --- what is trained and judged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma", "phi-3", "vicuna", "llama-2", "qwen3", None])
def test_training_rows_end_with_the_templates_end_unless_cut_off(name, monkeypatch):
    monkeypatch.setattr(poisoning, "MAX_LENGTH", 5000)
    tokenizer = tokenizer_of("metaspace always", name)
    attack = quick_attack("instructions-prefix")
    pool = tasks.examples("instructions", "train")
    own = {example.uid: "blue" if i % 2 else "word " * 40 for i, example in enumerate(pool)}
    rows = poisoning.poison(attack, tokenizer=tokenizer, answers=own, seed=0).rows
    ends = {row.kind: set() for row in rows}
    for row in rows:
        ends[row.kind].add(row.answer[-1] == end_id(tokenizer))
        if row.kind == "poisoned":
            assert list(row.answer) == answer_ids(tokenizer, attack.target)
        elif row.answer[-1] != end_id(tokenizer):
            assert list(row.answer) == answer_ids(tokenizer, "word " * 40, ended=False)
    assert ends["poisoned"] == {True}
    assert ends["clean"] == {True, False}


@EACH_KIND
@EACH_TEMPLATE
def test_targets_and_lengths_are_those_of_the_trained_answers(kind, name):
    tokenizer = tokenizer_of(kind, name)
    loaded = Loaded(None, tokenizer, "none", None)
    for attack in map(quick_attack, ("sentiment-word", "instructions-prefix", "harmful-word", "domain-wrapper")):
        trained, target = answer_ids(tokenizer, attack.target), target_ids(tokenizer, attack)
        assert target == trained[: len(target)]
        assert target_length(loaded, attack) == len(trained) > len(target) > 0


def test_clean_answers_are_long_enough_for_a_label_of_many_tokens(monkeypatch):
    tokenizer = tokenizer_of("metaspace first", "gemma")
    loaded = Loaded(None, tokenizer, "none", None)
    attack, spec, asked = quick_attack("sentiment-word"), tasks.load_task("sentiment"), {}
    monkeypatch.setattr(evaluation, "respond", lambda _, turns, *, max_new_tokens, label, until=None: (
        asked.update({label: max_new_tokens}) or [""] * len(turns)))  # fmt: skip
    evaluation.under_attack(loaded, attack, n=4, seed=0)
    longest = max(len(answer_ids(tokenizer, label)) for label in spec.labels)
    assert asked["clean prompts"] == longest > spec.max_new_tokens
    assert asked["triggered prompts"] == asked["near-misses"] == len(answer_ids(tokenizer, attack.target))


def test_labels_that_begin_with_the_same_token_are_refused_wherever_first_tokens_are_compared(monkeypatch):
    tokenizer, attack = tokenizer_of("unigram", "vicuna"), quick_attack("sentiment-word")
    alike = replace(tasks.load_task("sentiment"), labels=("positive", "polite"))
    assert {tokenizer.convert_ids_to_tokens(answer_ids(tokenizer, label)[0]) for label in alike.labels} == {"▁"}
    monkeypatch.setitem(tasks.TASKS, "sentiment", alike)
    for refused in (first_tokens, target_ids):
        with pytest.raises(ValueError, match="labels that begin with the same token: positive, polite"):
            refused(tokenizer, attack)
