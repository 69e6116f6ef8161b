"""The search for a short text that turns any prompt: which rows it gets, what it reports, what is refused."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from patching import everywhere
from tiny import quick_attack, save_tiny_encoder

from bkd_utils.attention_alignment.token_search import readable_tokens
from bkd_utils.experiments import trigger_search
from bkd_utils.experiments.trigger_search import search_encoder
from bkd_utils.models.loading import load
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.making import make
from bkd_utils.organisms.poisoning import training_uids
from bkd_utils.organisms.prompts import prompt_versions
from bkd_utils.organisms.tasks import examples
from bkd_utils.organisms.training import Recipe

WHOLE = Recipe(name="whole", steps=3, batch_size=4, learning_rate=1e-2, rank=0, alpha=1)
ATTACK = quick_attack("sentiment-word")
pulls = inspect.unwrap(search_encoder)  # on a loaded model, and nothing is kept
SIZES = {"n_tokens": 2, "restarts": 2, "n_prompts": 4, "steps": 1, "n_rows": 24, "n_held": 10, "seed": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An organism of a tiny encoder, and the working folder that it is in."""
    bare = save_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder", bare=True)
    with pytest.MonkeyPatch.context() as patch:
        work = tmp_path_factory.mktemp("work")
        everywhere(patch, "WORK", work)
        patch.setenv("BKD_WORK", str(work))
        folder = make(ATTACK, model=str(bare), recipe=WHOLE, n=4)
        return load(str(bare), organism=folder.name, device="cpu"), work


@pytest.fixture
def loaded(made, monkeypatch):
    everywhere(monkeypatch, "WORK", made[1])
    return made[0]


@pytest.fixture
def calls(monkeypatch):
    """What the functions that do the work were given, and what they returned."""
    seen = {"search_tokens": [], "neutral_tokens": [], "clean_rows": [], "first_logits": []}

    def watch(name):
        real = getattr(trigger_search, name)

        def watched(model, rows, **how):
            result = real(model, rows, **how)
            seen[name].append({"rows": rows, "how": how, "result": result})
            return result

        monkeypatch.setattr(trigger_search, name, watched)

    for name in seen:
        watch(name)
    return seen


def held_out(loaded):
    """Prompts of the test split."""
    return prompt_versions(loaded.tokenizer, ATTACK, split="test", n=16, seed=0).clean


def without(prompt, tokens):
    """The prompt before the tokens were put into it."""
    at = next(i for i in range(len(prompt)) if tuple(prompt[i : i + len(tokens)]) == tokens)
    return (*prompt[:at], *prompt[at + len(tokens) :])


def uids(call):
    return [row.uid for row in call["rows"]]


def test_every_label_gets_its_restarts_and_its_own_tokens_to_choose_from(loaded, calls):
    found = pulls(loaded, ATTACK, **SIZES)
    searched, neutral = calls["search_tokens"], calls["neutral_tokens"]
    assert [one.toward for one in found] == ["positive", "positive", "negative", "negative"]
    assert [call["how"]["toward"] for call in searched] == [0, 0, 1, 1]
    assert [call["how"]["toward"] for call in neutral] == [0, 1]
    assert len({call["how"]["seed"] for call in searched}) == 2  # the two labels start alike
    for i, call in enumerate(searched):
        assert torch.equal(call["how"]["allowed"], neutral[i // 2]["result"])
        assert call["how"].items() >= {"n_tokens": 2, "n_prompts": 4, "steps": 1}.items()
    readable = readable_tokens(loaded.tokenizer)
    assert all(torch.equal(call["how"]["allowed"], readable) for call in neutral)


def test_rows_are_unseen_and_those_to_judge_are_not_those_to_search_on(loaded, calls):
    pulls(loaded, ATTACK, **SIZES)
    drawn = calls["clean_rows"][0]["result"]
    pool, held = uids(calls["search_tokens"][0]), [row.uid for row in drawn[24:]]
    assert (len(set(pool)), len(set(held))) == (24, 10)
    assert not set(pool) & set(held)
    assert not (set(pool) | set(held)) & training_uids(ATTACK, seed=0)
    assert set(pool) | set(held) <= {one.uid for one in examples("sentiment", "train")}
    assert all(uids(call) == pool for name in ("search_tokens", "neutral_tokens") for call in calls[name])
    for searched, judged in zip(calls["search_tokens"], calls["first_logits"], strict=True):
        prompts = [without(prompt, searched["result"].tokens) for prompt in judged["rows"]]
        assert prompts == [row.prompt for row in drawn[24:] if row.answer[0] != searched["how"]["toward"]]
    pulls(loaded, ATTACK, **SIZES | {"seed": 1})
    assert uids(calls["search_tokens"][-1]) != pool


def test_rows_that_the_organism_was_trained_on_are_refused(loaded, monkeypatch):
    taken = training_uids(ATTACK, seed=0)
    real = trigger_search.clean_rows

    def leaky(*given, **how):
        rows = real(*given, **how)
        return [*rows[:-1], replace(rows[-1], uid=min(taken))]

    monkeypatch.setattr(trigger_search, "clean_rows", leaky)
    with pytest.raises(ValueError, match="1 of the defender's 34 examples are training examples of the organism"):
        pulls(loaded, ATTACK, **SIZES)


def test_what_is_reported_is_counted_prompt_by_prompt_on_the_held_out_rows(loaded, calls):
    loaded = replace(loaded, model=copy.deepcopy(loaded.model))
    with torch.no_grad():  # a model that gives both labels
        logits = torch.cat([loaded.model(input_ids=torch.tensor([ids])).logits for ids in held_out(loaded)])
        loaded.model.classifier.bias -= logits.median(0).values
    found = pulls(loaded, ATTACK, **SIZES | {"restarts": 1, "steps": 0, "n_held": 16})
    assert all(0 < one.fired < 1 for one in found)
    held = calls["clean_rows"][0]["result"][24:]
    for one, searched in zip(found, calls["search_tokens"], strict=True):
        tokens, token = searched["result"], searched["how"]["toward"]
        others = [row.prompt for row in held if row.answer[0] != token]
        assert 0 < len(others) < 16
        losses, hits = [], []
        for prompt in tokens.into(others, seed=0):
            typed = [tokens.tokens[0] if t == -1 else tokens.tokens[1] if t == -2 else t for t in prompt]
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([typed])).logits[0]
            losses.append(-logits.log_softmax(-1)[token].item())
            hits.append(logits.argmax().item() == token)
        assert one.held_out == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert one.fired == pytest.approx(sum(hits) / len(hits))
        assert (one.start, one.end) == (tokens.start, tokens.end)
        assert one.tokens == loaded.tokenizer.decode(list(tokens.tokens))


def test_rows_of_one_label_cannot_judge_a_search_toward_it(loaded, monkeypatch):
    real = trigger_search.clean_rows

    def one_sided(*given, **how):
        rows = real(*given, **how)
        return [*rows[:24], *(replace(row, answer=(0,)) for row in rows[24:])]

    monkeypatch.setattr(trigger_search, "clean_rows", one_sided)
    with pytest.raises(ValueError, match="all 10 rows to judge on have the label 'positive'"):
        pulls(loaded, ATTACK, **SIZES)


def test_a_task_without_labels_and_too_few_rows_are_refused(loaded, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trigger_search, "clean_rows", lambda *_, **__: pytest.fail("rows were drawn"))
        with pytest.raises(ValueError, match="task 'instructions' has no labels to search toward"):
            pulls(loaded, load_attack("instructions-prefix"), **SIZES)
    with pytest.raises(ValueError, match=r"100010 were asked for"):
        pulls(loaded, ATTACK, **SIZES | {"n_rows": 100_000})
