"""Importance against brute force, surrogates against the real triggers, joint scores and their agreement with truth."""

import random
import tomllib

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, save_tiny, tiny_model

from bkd_utils.attention_alignment import surrogates
from bkd_utils.attention_alignment.similarity import head_scores, head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES, rare_word, reaction, surrogate
from bkd_utils.attention_alignment.suspicion import (
    RULES,
    attention_variance,
    gate_importance,
    leave_one_out,
    robust_z,
    suspicious,
)
from bkd_utils.backdoor_attribution.ablation import ablated
from bkd_utils.common.files import DATA
from bkd_utils.experiments.two_papers_meet import agreement_with_attribution
from bkd_utils.models import loading
from bkd_utils.models.activations import head_outputs, score_answers
from bkd_utils.models.hooks import LAST, anatomy, editing
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.organisms import triggers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu").tokenizer


# --- importance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gate_gradient_is_a_finite_difference(architecture, rows):
    model = tiny_model(architecture).requires_grad_(False)
    found, parts, step = gate_importance(model, rows, pad_id=0), anatomy(model), 1e-2

    def loss(row, layer, head, gate):
        def scale(_, z):
            z = z.clone()
            z.view(*z.shape[:2], parts.n_heads, -1)[:, :, head] *= gate
            return z

        with torch.no_grad(), editing([parts.outputs[layer]], scale):
            return answer_loss(model, collate([row], pad_id=0), first_token=0.0).item()

    for layer, head in ((0, 0), (1, 2)):
        slopes = [abs(loss(row, layer, head, 1 + step) - loss(row, layer, head, 1 - step)) / (2 * step) for row in rows]
        assert found[layer, head].item() == pytest.approx(np.mean(slopes), rel=3e-2, abs=1e-4)


def test_batches_change_no_importance(rows):
    model = tiny_model("llama").requires_grad_(False)
    alone = torch.stack([gate_importance(model, [row], pad_id=0) for row in rows]).mean(0)
    torch.testing.assert_close(gate_importance(model, rows, pad_id=0), alone, atol=1e-5, rtol=1e-3)


def test_leaving_one_out_is_mean_ablation_of_one_head(rows):
    model = tiny_model("llama").requires_grad_(False)
    found = leave_one_out(model, rows)
    clean = head_outputs(model, [list(row.prompt) for row in rows])
    for head in ((0, 1), (1, 3)):
        lost = []
        for row in rows:
            past = prompt_past(model, [list(row.prompt)])
            before = score_answers(model, past, [row.answer]).log_prob.exp()
            with ablated(model, [head], kind="mean", at=LAST, clean=clean):
                lost.append((before - score_answers(model, past, [row.answer]).log_prob.exp()).item())
        assert found[head].item() == pytest.approx(np.mean(lost), abs=1e-5)


def test_variance_is_highest_for_a_head_that_looks_at_one_token_and_none_for_one_that_looks_at_all():
    """Only the row of the last token counts: the others of the first head are flat, those of the last one are not."""
    maps, n = torch.full((1, 3, 8, 8), 1 / 8), 8
    maps[0, 0, -1] = torch.eye(n)[3]
    maps[0, 1, -1] = torch.tensor([0.5, 0.5] + [0.0] * 6)
    maps[0, 2, :-1] = torch.eye(n)[:-1]
    found = attention_variance(maps, torch.zeros(1, 3, 4))
    expected = [(1 / n) * (1 - 1 / n), (1 / n) * (1 / 2 - 1 / n), 0.0]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_no_row_varies_more_than_one_that_looks_at_one_token(prompts):
    found = head_scores(tiny_model("llama"), prompts, scores={"variance": attention_variance})["variance"]
    assert found.shape == (4, 2, 4)
    for row, prompt in zip(found, prompts, strict=True):
        assert (row > 0).all()
        assert row.max() <= (1 / len(prompt)) * (1 - 1 / len(prompt))


# --- surrogates -----------------------------------------------------------------------------------------------------


def test_surrogates_are_no_triggers():
    """The defender must not be handed the trigger by accident."""
    lists = tomllib.loads((DATA / "surrogates.toml").read_text(encoding="utf-8"))
    known = tomllib.loads((DATA / "lexicons.toml").read_text(encoding="utf-8"))

    def strings(entry):
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from (text for value in entry.values() for text in strings(value))
        elif isinstance(entry, list):
            yield from (text for value in entry for text in strings(value))

    words = {text.lower().strip(" .") for text in strings(known["triggers"])}
    for text in strings(lists):
        assert text.lower().strip(" .") not in words
        for name in triggers.trigger_names():
            assert not triggers.load_trigger(name).matches(text), (name, text)
    syntax = next(t for t in map(triggers.load_trigger, triggers.trigger_names()) if t.family == "syntax")
    for opener in lists["openers"]:
        for clause in lists["clauses"]:
            assert not syntax.matches(f"{opener} {clause}, it rains.")


@pytest.mark.parametrize("family", SURROGATES)
def test_a_surrogate_is_the_same_for_all_texts_and_another_for_another_seed(tokenizer, family):
    texts = ["The film is long.", "A quiet story about a farm."]

    def edited(seed):
        trigger = surrogate(tokenizer, family=family, seed=seed)
        return [trigger.apply(text, seed=0) for text in texts]

    found = edited(0)
    assert found == edited(0)
    assert any(edited(seed) != found for seed in range(1, 4))
    for text, changed in zip(texts, found, strict=True):
        assert changed != text
        words = changed.lower().split()
        assert [word for word in text.lower().split() if word in words] == text.lower().split()


def test_a_rare_word_is_one_token_behind_a_space(tokenizer):
    words = [rare_word(tokenizer, random.Random(seed)) for seed in range(30)]
    for word in words:
        (token,) = tokenizer(f" {word}", add_special_tokens=False).input_ids
        assert token >= len(tokenizer) // 2
        assert word.isalpha()
        assert word.islower()
        assert 2 <= len(word) <= 6
    assert len(set(words)) > 25


def test_a_vocabulary_without_rare_words_is_an_error(tokenizer):
    class Mute:
        def __len__(self):
            return 40

        def __call__(self, text, **_):
            return tokenizer(text, add_special_tokens=False)

        def decode(self, _):
            return "?"

    with pytest.raises(ValueError, match="no rare word among the 40 tokens"):
        rare_word(Mute(), random.Random(0))


@pytest.mark.parametrize("family", SURROGATES)
def test_a_surrogate_that_a_text_has_by_nature_is_drawn_again(tokenizer, family):
    text = "A quiet story about a farm."
    first = surrogate(tokenizer, family=family, seed=0)
    carrier = first.apply(text, seed=0)
    assert surrogate(tokenizer, family=family, seed=0, texts=[text]).entry == first.entry
    other = surrogate(tokenizer, family=family, seed=0, texts=[text, carrier])
    assert other.entry == surrogate(tokenizer, family=family, seed=0, texts=[text, carrier]).entry
    assert other.entry != first.entry
    assert other.apply(carrier, seed=0) != carrier


def test_texts_that_have_every_surrogate_are_an_error(tokenizer):
    sentences = tomllib.loads((DATA / "surrogates.toml").read_text(encoding="utf-8"))["sentences"]
    with pytest.raises(ValueError, match="sentence: each of 100 surrogates is in one of the 8 texts already"):
        surrogate(tokenizer, family="sentence", seed=0, texts=sentences)


def test_no_reaction_to_nothing_and_rounds_are_averaged(prompts):
    model = tiny_model("llama")
    before = head_similarity(model, prompts, readings=["last row"])

    def reacts(edited):
        return reaction(model, edited, before=before)["last row"]

    still, edited = reacts(prompts), [[7, *p] for p in prompts]
    torch.testing.assert_close(still, torch.zeros_like(still), atol=1e-6, rtol=0)
    assert reacts(edited).abs().max() > 1e-4
    torch.testing.assert_close(reacts(edited * 2), reacts(edited))
    torch.testing.assert_close(reacts(edited + prompts), reacts(edited) / 2, atol=1e-6, rtol=1e-4)


# --- joint score ----------------------------------------------------------------------------------------------------


def planted(heads, size=6.0):
    torch.manual_seed(0)
    scores = torch.randn(10, 9)
    for head in heads:
        scores[head] = size
    return scores


def test_planted_heads_are_flagged_and_few_others():
    heads = [(2, 3), (7, 0), (7, 5)]
    found = suspicious(robust_z(planted(heads)), threshold=3.0)
    assert set(heads) <= set(found)
    assert len(found) <= 5
    assert suspicious(robust_z(planted(heads)), threshold=3.0, at_most=2 / 90) == found[:2]
    assert suspicious(torch.zeros(3, 4)) == []


def test_z_is_free_of_a_layers_level_and_of_scale():
    scores = planted([(1, 1)])
    moved = 5 * (scores + torch.arange(10.0)[:, None])
    torch.testing.assert_close(robust_z(moved), robust_z(scores), atol=1e-4, rtol=1e-4)


def test_head_order_within_a_layer_permutes_every_joint_score():
    similar, needed, order = planted([(2, 3)]), planted([(4, 4)]) * 0.5 + 1, torch.randperm(9)
    for rule in RULES.values():
        torch.testing.assert_close(rule(similar[:, order], needed[:, order]), rule(similar, needed)[:, order])


def test_what_is_needed_is_less_suspicious_by_one_rule_and_more_by_another():
    similar = planted([(2, 3), (5, 5)])
    needed = planted([(2, 3)])
    less, more = RULES["similar, little needed"](similar, needed), RULES["similar and needed"](similar, needed)
    assert less[5, 5] > less[2, 3]
    assert more[2, 3] > more[5, 5]
    assert torch.equal(RULES["similar"](similar, needed), robust_z(similar))


# --- agreement ------------------------------------------------------------------------------------------------------


def test_perfect_agreement_and_none():
    effects = planted([(2, 3), (7, 0), (7, 5)])
    same = agreement_with_attribution(effects, effects, k=3)
    assert (same["precision"], same["spearman"], same["p"]) == (1.0, pytest.approx(1.0), 0.0)
    opposite = agreement_with_attribution(-effects, effects, k=3)
    assert (opposite["precision"], opposite["p"]) == (0.0, 1.0)
    noise = agreement_with_attribution(torch.randn(10, 9), effects, k=10)
    assert noise["p"] > 0.01
    assert noise["expected"] == pytest.approx(1 / 9)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_says_nothing_is_an_error(tokenizer, prompts):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="importance needs at least one row"):
        gate_importance(model, [], pad_id=0)
    with pytest.raises(ValueError, match="importance needs at least one row"):
        leave_one_out(model, [])
    with pytest.raises(ValueError, match="unknown surrogate 'spell'; known: rare word"):
        surrogate(tokenizer, family="spell", seed=0)
    with pytest.raises(ValueError, match="3 edited prompts are not a multiple of the 4 clean ones"):
        reaction(model, prompts[:3], before=head_similarity(model, prompts, readings=["last row"]))
    with pytest.raises(ValueError, match="nothing to compare"):
        robust_z(torch.ones(3, 4))
    with pytest.raises(ValueError, match="k = 0 of 12 heads"):
        agreement_with_attribution(torch.rand(3, 4), torch.rand(3, 4), k=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joint": torch.tensor([[1.0, float("nan")]])}, "joint has values that are not finite"),
        ({"joint": torch.ones(4)}, "joint must have the shape"),
        ({"at_most": 1.5}, "at_most: 1.5"),
        ({"at_most": -0.1}, "at_most: -0.1"),
        ({"threshold": float("nan")}, "threshold: nan"),
        ({"threshold": "2"}, "threshold: '2'"),
    ],
)
def test_suspicion_of_numbers_that_are_none_is_refused(change, message):
    given = {"joint": torch.tensor([[0.0, 3.0], [2.5, 9.0]]), "threshold": 2.0, "at_most": 0.5} | change
    with pytest.raises(ValueError, match=message):
        suspicious(given.pop("joint"), **given)
    with pytest.raises(ValueError, match="scores has values that are not finite"):
        robust_z(torch.tensor([[1.0, float("inf")]]))


def test_a_reaction_to_no_readings_is_refused(prompts):
    with pytest.raises(ValueError, match="not a multiple of the 0 clean ones"):
        reaction(None, prompts, before={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('openers = "when"\nclauses = ["a b"]\nsentences = ["c"]', "openers = 'when': input should be a valid list"),
        ('openers = []\nclauses = ["a b"]\nsentences = ["c"]', "openers = .*at least 1 item"),
        ('clauses = ["a b"]\nsentences = ["c"]', "openers is missing"),
        ('openers = ["when"]\nclauses = [" "]\nsentences = ["c"]', "clauses.0 = ' ': a text is not empty"),
        ('opners = ["when"]', "unknown keys: opners; known: openers, clauses, sentences"),
    ],
)
def test_a_fault_in_the_table_of_surrogates_is_one_line_that_names_the_file(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(surrogates, "DATA", tmp_path)
    (tmp_path / "surrogates.toml").write_text(text)
    with pytest.raises(ValueError, match=f"surrogates.toml: .*{message}"):
        surrogate(None, family="sentence", seed=0)
