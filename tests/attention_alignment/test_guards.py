"""ONION, STRIP and RAP against brute force on a tiny model; shuffled texts have shuffled scores."""

import numpy as np
import pytest
import torch
from tiny import save_tiny

from bkd_utils.attention_alignment import guards
from bkd_utils.attention_alignment.guards import (
    onion,
    rap,
    smaller_clusters,
    strip,
    surprise,
    threshold,
    without_words,
)
from bkd_utils.models import loading
from bkd_utils.models.tokens import prompt_ids

TEXTS = ["A slow film about snow.", "What a fine day it is!", "cf the plot was thin and long", "Good."]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def loaded(request, tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


def turn(text):
    return f"Review: {text}\nLabel:"


def alone(model, ids):
    """Probabilities behind every token of one row, by the plain model."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().softmax(-1)


def answer_to(loaded, text):
    """The likeliest first answer token."""
    return alone(loaded.model, prompt_ids(loaded.tokenizer, turn(text)))[-1].argmax().item()


# --- ONION ----------------------------------------------------------------------------------------------------------


def test_surprise_is_the_mean_log_loss_of_a_row_alone(loaded):
    rows = [loaded.tokenizer(text).input_ids[:9] for text in TEXTS[:3]]
    # Beside rows that share nothing: ones that share a beginning of every length, the row itself, and its beginning.
    rows += [rows[0][:i] + rows[0][i + 1 :] for i in range(len(rows[0]))] + [rows[0], rows[0][:4]]
    for found, row in zip(surprise(loaded.model, rows, pad_id=0), rows, strict=True):
        told = [-torch.log(alone(loaded.model, row)[i, row[i + 1]]).item() for i in range(len(row) - 1)]
        assert found == pytest.approx(np.mean(told), rel=1e-4)


def test_a_words_suspicion_is_what_the_perplexity_loses_without_it(loaded):
    text = TEXTS[2]
    start = loaded.tokenizer.bos_token_id

    def perplexity(words):
        ids = [start, *loaded.tokenizer(" ".join(words), add_special_tokens=False).input_ids]
        told = [-torch.log(alone(loaded.model, ids)[i, ids[i + 1]]).item() for i in range(len(ids) - 1)]
        return np.exp(np.mean(told))

    words = text.split()
    (found,) = onion(loaded, [text])
    assert len(found) == len(words)
    for i in (0, 3, len(words) - 1):
        assert found[i] == pytest.approx(perplexity(words) - perplexity(words[:i] + words[i + 1 :]), rel=1e-3)


def test_a_text_of_one_word_is_left_alone(loaded):
    assert onion(loaded, ["Good."])[0].tolist() == [0.0]
    assert [len(one) for one in onion(loaded, TEXTS)] == [len(text.split()) for text in TEXTS]


def test_words_above_the_threshold_go():
    suspicion = np.array([5.0, 0.1, -2.0])
    assert without_words("cf good film", suspicion, above=1.0) == "good film"
    assert without_words("cf good film", suspicion, above=9.0) == "cf good film"
    assert without_words("cf good film", suspicion, above=-3.0) == "cf good film"  # nothing would be left


# --- STRIP ----------------------------------------------------------------------------------------------------------


def test_strip_is_the_mean_entropy_over_a_texts_own_copies(loaded, monkeypatch):
    """Without replacements all copies are the text, so the score is that text's own entropy."""
    monkeypatch.setattr(guards, "REPLACED", 0.0)
    found = strip(loaded, TEXTS, turn=turn, pool=["some words"])
    for text, score in zip(TEXTS, found, strict=True):
        chances = alone(loaded.model, prompt_ids(loaded.tokenizer, turn(text)))[-1]
        assert score == pytest.approx((chances * chances.log()).sum().item(), rel=1e-4)


def test_shuffled_texts_have_shuffled_scores(loaded, monkeypatch):
    monkeypatch.setattr(guards, "STEPS", 2)
    order = [2, 0, 3, 1]
    shuffled = [TEXTS[i] for i in order]
    given = {"turn": turn, "pool": ["one two three four five"]}
    one, other = (strip(loaded, texts, **given) for texts in (TEXTS, shuffled))
    assert other == pytest.approx(one[order], rel=1e-4)
    assert len({round(float(score), 5) for score in one}) == len(TEXTS)
    for first, second in zip(onion(loaded, shuffled), [onion(loaded, TEXTS)[i] for i in order], strict=True):
        assert first == pytest.approx(second, rel=1e-3)
    given = {"turn": turn, "protected": answer_to(loaded, TEXTS[0]), "clean": TEXTS[:2], "word": "mb"}
    one, other = (rap(loaded, texts, **given) for texts in (TEXTS, shuffled))
    assert np.isfinite(one[0])
    assert other == pytest.approx(one[order], abs=1e-6)


def test_strip_mixes_in_the_pool(loaded):
    one, other = (strip(loaded, TEXTS, turn=turn, pool=[pool]) for pool in ("snow", "piano"))
    assert np.abs(one - other).max() > 1e-6


# --- RAP ------------------------------------------------------------------------------------------------------------


def test_an_untrained_word_takes_off_what_the_plain_model_says_of_texts_with_the_protected_answer(loaded, monkeypatch):
    """A word that is one token: its own embedding stands where its own embedding would. All others are not judged."""
    monkeypatch.setattr(guards, "STEPS", 0)
    assert len(loaded.tokenizer(" rain", add_special_tokens=False).input_ids) == 1
    answers = [answer_to(loaded, text) for text in TEXTS]
    assert len(set(answers)) > 1
    for protected in set(answers):
        found = rap(loaded, TEXTS, turn=turn, protected=protected, clean=TEXTS[:2], word="rain")
        for text, answer, score in zip(TEXTS, answers, found, strict=True):
            plain, marked = (
                alone(loaded.model, prompt_ids(loaded.tokenizer, turn(one)))[-1, protected].item()
                for one in (text, f"rain {text}")
            )
            assert score == (pytest.approx(marked - plain, abs=1e-6) if answer == protected else -np.inf)


def test_nothing_is_judged_where_no_text_has_the_protected_answer(loaded):
    assert 7 not in [answer_to(loaded, text) for text in TEXTS]
    assert rap(loaded, TEXTS, turn=turn, protected=7, clean=TEXTS[:2], word="mb").tolist() == [-np.inf] * len(TEXTS)


def test_training_takes_probability_off_and_leaves_the_model_alone(loaded, monkeypatch):
    monkeypatch.setattr(guards, "DROP", 1.0)
    monkeypatch.setattr(guards, "RATE", 0.5)
    likely = answer_to(loaded, TEXTS[0])
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    found = []
    for steps in (0, 30):
        monkeypatch.setattr(guards, "STEPS", steps)
        found += [*rap(loaded, TEXTS[:1], turn=turn, protected=likely, clean=TEXTS[:1], word="mb")]
    assert found[1] < found[0]
    assert all(torch.equal(before[name], parameter) for name, parameter in loaded.model.named_parameters())


# --- thresholds and training data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frr", [0.01, 0.05, 0.1, 0.3])
def test_the_threshold_is_the_lowest_score_that_no_larger_share_of_clean_texts_exceeds(frr):
    dice = np.random.default_rng(0)
    for n in (*range(round(1 / frr), round(1 / frr) + 30), 1000):
        if n * frr < 1:
            continue
        scores = dice.normal(size=n)
        limit = threshold(scores, frr=frr)
        assert limit in scores
        assert (scores > limit).mean() <= frr
        lower = scores[scores < limit].max()
        assert (scores > lower).mean() > frr


def test_of_24_texts_at_5_percent_one_is_refused_and_of_19_none_can_be():
    scores = np.arange(24.0)
    assert threshold(scores, frr=0.05) == 22
    assert threshold(scores[:20], frr=0.05) == 18
    with pytest.raises(ValueError, match=r"a threshold at 5.0% needs 20 clean texts, not 19"):
        threshold(scores[:19], frr=0.05)
    for frr in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"must lie between 0 and 1, is {frr}"):
            threshold(scores, frr=frr)


def test_the_smaller_cluster_of_each_label_is_flagged():
    dice = np.random.default_rng(0)
    hidden, labels = dice.normal(size=(90, 16)), np.repeat([0, 1], 45)
    few = np.zeros(90, dtype=bool)
    few[:8] = few[45:52] = True
    hidden[few] += 8
    assert smaller_clusters(hidden, labels).tolist() == few.tolist()
    order = dice.permutation(90)
    assert smaller_clusters(hidden[order], labels[order]).tolist() == few[order].tolist()


def test_nothing_to_go_by_is_an_error(loaded):
    with pytest.raises(ValueError, match="no clean words"):
        strip(loaded, TEXTS, turn=turn, pool=[])
    with pytest.raises(ValueError, match="no clean texts"):
        rap(loaded, TEXTS, turn=turn, protected=7, clean=[], word="mb")
    with pytest.raises(ValueError, match=r"at 5.0% needs 20 clean texts, not 0"):
        threshold(np.array([]), frr=0.05)
    with pytest.raises(ValueError, match="label 1 has 3 rows"):
        smaller_clusters(np.zeros((20, 12)), np.array([0] * 17 + [1] * 3))
