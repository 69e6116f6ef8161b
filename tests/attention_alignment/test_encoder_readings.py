"""Paper 2 on an encoder: the readings are those of the row of [CLS], and every treatment runs by the same code."""

from copy import copy
from itertools import pairwise

import pytest
import torch
from tiny import LABELS, label_rows, small_wordpiece, tiny_classifier
from torch.nn.functional import cosine_similarity

from bkd_utils.attention_alignment import alignment, guards, rivals
from bkd_utils.attention_alignment.alignment import ALIGNMENTS, aligned
from bkd_utils.attention_alignment.head_tuning import tune
from bkd_utils.attention_alignment.rivals import TREATMENTS, Case, accuracy, consistent, dormant, treat
from bkd_utils.attention_alignment.similarity import READINGS, head_scores, head_similarity
from bkd_utils.attention_alignment.surrogates import likeness, reaction, searched, start, surrogate
from bkd_utils.attention_alignment.suspicion import attention_variance, gate_importance
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import first_logits
from bkd_utils.models.head_weights import head_slices
from bkd_utils.models.hooks import head_edit
from bkd_utils.models.loading import Loaded
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.organisms.training import Recipe

RECIPE = Recipe(name="quick", steps=2, batch_size=4, learning_rate=1e-2, rank=0, alpha=1)
TEXTS = ["A fine film.", "It is dull, long and loud.", "No.", "A film about the sea and a boat."]


@pytest.fixture(scope="module")
def prompts():
    return [small_wordpiece()(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def rows():
    return label_rows(TEXTS)


@pytest.fixture
def model():
    return tiny_classifier()


def plain_maps(model, prompt):
    """[layer, head, query, key] from transformers, one prompt by itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model.bert(input_ids=torch.tensor([prompt]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.cat(maps)


def mean_cosine(rows):
    """Mean cosine of every row to the others, pair by pair."""
    return torch.stack(
        [
            torch.stack([cosine_similarity(a, b, dim=0) for j, b in enumerate(rows) if j != i]).mean()
            for i, a in enumerate(rows)
        ]
    )


# --- readings -------------------------------------------------------------------------------------------------------


def test_the_row_that_is_read_is_that_of_the_first_token(model, prompts):
    found = head_similarity(model, prompts, readings=["last row", "full map"])
    for i, prompt in enumerate(prompts):
        maps = plain_maps(model, prompt)
        for layer in range(2):
            assert torch.allclose(found["last row"][i, layer], mean_cosine(maps[layer][:, 0]), atol=1e-5)
            assert torch.allclose(found["full map"][i, layer], mean_cosine(maps[layer].flatten(1)), atol=1e-5)


def test_variance_is_that_of_the_first_row(model, prompts):
    found = head_scores(model, prompts, scores={"variance": attention_variance})["variance"]
    expected = torch.stack([plain_maps(model, prompt)[:, :, 0].var(-1, unbiased=False) for prompt in prompts])
    assert torch.allclose(found, expected.view_as(found), atol=1e-6)


def test_all_readings_and_the_reaction_are_there(model, prompts):
    before = head_similarity(model, prompts)
    assert set(before) == set(READINGS)
    assert all(scores.shape == (4, 2, 4) and scores.isfinite().all() for scores in before.values())
    assert all(change.abs().max() < 1e-5 for change in reaction(model, prompts, before=before).values())


def test_outputs_are_those_of_the_first_token(model, prompts):
    def first(_maps, outputs):
        return outputs.norm(dim=-1)

    found = head_scores(model, prompts, scores={"size": first})["size"]
    for i, prompt in enumerate(prompts):
        kept = {}
        dense = model.bert.encoder.layer[1].attention.output.dense
        handle = dense.register_forward_pre_hook(lambda _, given, kept=kept: kept.update(z=given[0]))
        model(input_ids=torch.tensor([prompt]))
        handle.remove()
        z = kept["z"][0, 0].view(4, 8)
        parts = torch.stack([z[head] @ dense.weight.T[8 * head : 8 * head + 8] for head in range(4)])
        assert torch.allclose(found[i, 1], parts.norm(dim=-1), atol=1e-4)


def test_a_soft_prompt_makes_rows_of_the_first_token_alike(model, prompts):
    model.set_attn_implementation("eager")
    soft = searched(model, prompts)
    assert soft.before == 1  # behind [CLS]
    with soft.read_by(model), torch.no_grad():
        after = likeness(model, soft.into(prompts))
    first = start(model, prompts)
    with first.read_by(model), torch.no_grad():
        assert after > likeness(model, first.into(prompts)) + 0.01
    expected = torch.stack(
        [
            torch.stack([mean_cosine(layer[:, 0]).mean() for layer in plain_maps(model, prompt)])
            for prompt in prompts[:1]
        ]
    ).mean()
    assert likeness(model, prompts[:1]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_rare_word_is_found_for_a_word_piece_vocabulary():
    trigger = surrogate(small_wordpiece(), family="rare word", seed=0)
    assert trigger.apply("A fine film.", seed=0) != "A fine film."


# --- importance and losses ------------------------------------------------------------------------------------------


def test_importance_is_the_slope_of_a_gate(model, rows):
    """By finite differences: the loss when a head's output is a little larger."""
    found, step = gate_importance(model, rows, pad_id=0), 1e-2
    for layer, head in ((0, 1), (1, 3)):
        slopes = []
        for row in rows:
            batch, losses = collate([row], pad_id=0), []
            for sign in (1, -1):
                change = lambda _, z, sign=sign: z * (1 + sign * step)  # noqa: E731
                with head_edit(model, [(layer, head)], change, at=slice(None)), torch.no_grad():
                    losses.append(answer_loss(model, batch, first_token=0.0).item())
            slopes.append(abs(losses[0] - losses[1]) / (2 * step))
        assert found[layer, head].item() == pytest.approx(sum(slopes) / len(rows), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignment_pulls_heads(model, rows, name):
    masks, loss = head_slices(model, [(0, 1)], unit="KV group"), aligned(model, [(0, 1)], alignment=name)
    history = tune(model, rows, masks=masks, recipe=RECIPE, pad_id=0, loss=loss)
    assert all(step["loss"] > 0 and step["added"] >= 0 for step in history)
    assert any(step["added"] > 0 for step in history)


def test_the_excess_is_that_of_the_first_row(model, rows, monkeypatch):
    seen = []
    monkeypatch.setitem(ALIGNMENTS, "excess", lambda pull: seen.append(pull) or alignment.less_excess(pull))
    tune(
        model,
        rows[:1],
        masks=head_slices(model, [(0, 1)]),
        recipe=RECIPE,
        pad_id=0,
        loss=aligned(model, [(0, 1)], alignment="excess"),
    )
    assert seen[0].asked.tolist() == [0] * 4


# --- treatments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TREATMENTS)
def test_every_treatment_changes_an_encoder(model, rows, method):
    labels = sorted({row.answer[0] for row in rows})
    case = Case(model, rows, RECIPE, pad_id=0, heads=[(0, 1), (1, 2)], labels=labels)
    assert treat(case, method=method) > 0
    assert all(one.isfinite().all() for one in model.parameters())


def test_accuracy_is_of_labels(model, rows):
    right = [model(input_ids=torch.tensor([row.prompt])).logits.argmax().item() == row.answer[0] for row in rows]
    assert accuracy(model, rows, pad_id=0) == sum(right) / len(rows)


def test_dormant_neurons_are_counted_over_real_tokens(model, rows):
    """By hand, prompt by prompt: padding adds nothing."""
    total = torch.zeros(48)
    for row in rows:
        kept = {}
        handle = model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(
            lambda _, given, kept=kept: kept.update(z=given[0])
        )
        model(input_ids=torch.tensor([row.prompt]))
        handle.remove()
        total += kept["z"][0].abs().sum(0)
    assert dormant(model, rows, pad_id=0)[0].tolist() == total.argsort()[:9].tolist()


def test_all_layers_count_for_consistency(model, rows):
    """Inconsistency over embeddings and both layers, of the perturbed pass; here the perturbation is switched off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "PUSH", 0.0)
        _, found = consistent(model, collate(rows[:1], pad_id=0), first_token=0.5)
    hidden = model.bert(input_ids=torch.tensor([rows[0].prompt]), output_hidden_states=True).hidden_states
    turns = [1 - cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(hidden)]
    assert len(turns) == 2
    assert found.item() == pytest.approx(rivals.CONSISTENCY * sum(turns).item() / 2, rel=1e-4)


# --- guards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(model):
    tokenizer = copy(small_wordpiece())
    tokenizer.labels = LABELS
    return Loaded(model, tokenizer, "tiny", None)


def test_a_vector_in_place_of_a_word_is_read_at_its_place(loaded, prompts):
    """With the word's own embedding, nothing changes; the prompts are of different lengths."""
    word = loaded.model.get_input_embeddings().weight[prompts[0][2]].detach()
    found = guards._with_vector(loaded, [prompts[0], prompts[1]], [2, 3], word)
    other = [*prompts[1][:3], prompts[0][2], *prompts[1][4:]]
    for row, ids in zip(found, (prompts[0], other), strict=True):
        assert torch.allclose(row, loaded.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1), atol=1e-5)


def test_guards_work_on_labels_or_say_why_not(loaded):
    scores = guards.strip(loaded, TEXTS, turn=str, pool=["much too long"])
    assert scores.shape == (4,)
    assert (scores <= 0).all()
    said = first_logits(loaded.model, [loaded.tokenizer(text).input_ids for text in TEXTS], end_id=0).argmax(-1)
    scores = guards.rap(loaded, TEXTS, turn=str, protected=int(said[0]), clean=TEXTS[:1], word="mb")
    assert ((scores > -float("inf")) == (said == said[0]).numpy()).all()
    with pytest.raises(ModelError, match="ONION needs a causal language model"):
        guards.onion(loaded, TEXTS)
