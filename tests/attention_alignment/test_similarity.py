"""Similarity against loops in plain Python, against maps of plain transformers, and against identities."""

import math

import pytest
import torch
from tiny import tiny_model

from bkd_utils.attention_alignment.similarity import (
    READINGS,
    cosine,
    head_scores,
    head_similarity,
    jensen_shannon,
    to_partners,
)
from bkd_utils.models import compute
from bkd_utils.models.activations import head_outputs
from bkd_utils.models.hooks import anatomy


def mean_over_partners(rows, measure):
    """The definition, in a loop: rows[head] -> its mean likeness to the other heads."""
    return [
        sum(measure(one, other) for j, other in enumerate(rows) if j != i) / (len(rows) - 1)
        for i, one in enumerate(rows)
    ]


def cos(one, other):
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def jsd(one, other):
    def entropy(row):
        return -sum(p * math.log2(p) for p in row if p > 0)

    middle = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
    return 1 - math.sqrt(max(0.0, entropy(middle) - (entropy(one) + entropy(other)) / 2))


def plain_maps(model, prompt):
    """Attention maps of one prompt, unpadded, straight from transformers: [layer][head] tensors."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.tensor([prompt]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [layer[0] for layer in maps]


@pytest.fixture(params=["nothing shared", "a shared beginning", "one the beginning of all"])
def asked(request, prompts):
    """What prompts begin with alike is run once; by the scores nobody can tell."""
    beginning = prompts[2][:4]  # 16 tokens at most, the window of the tiny Gemma
    return {
        "nothing shared": prompts,
        "a shared beginning": [beginning + prompt for prompt in prompts],
        "one the beginning of all": [beginning, *(beginning + prompt for prompt in prompts[1:])],
    }[request.param]


def test_last_rows_and_full_maps_are_a_brute_force_loop(model, asked):
    found = head_similarity(model, asked)
    for i, prompt in enumerate(asked):
        maps = plain_maps(model, prompt)
        mean = torch.stack(maps).mean((0, 1)).flatten()
        for layer, heads in enumerate(maps):
            last = [head[-1].tolist() for head in heads]
            cut = [[p / sum(row[1:]) for p in row[1:]] for row in last]
            full = [head.flatten().tolist() for head in heads]
            centred = [(head.flatten() - mean).tolist() for head in heads]
            for name, rows, measure in (
                ("last row", last, cos),
                ("last row, no sink", cut, cos),
                ("last row, Jensen-Shannon", last, jsd),
                ("full map", full, cos),
                ("full map, centred", centred, cos),
            ):
                expected = torch.tensor(mean_over_partners(rows, measure))
                torch.testing.assert_close(found[name][i, layer], expected, atol=2e-4, rtol=1e-3, msg=name)


def test_across_layers_and_closest_partner_are_a_brute_force_loop(model, asked):
    found = head_similarity(model, asked, readings=["last row, across layers", "last row, closest partner"])
    rows = [[head[-1].tolist() for head in heads] for heads in plain_maps(model, asked[0])]
    for layer, heads in enumerate(rows):
        others = [row for other, layer_rows in enumerate(rows) if other != layer for row in layer_rows]
        for head, row in enumerate(heads):
            across = sum(cos(row, other) for other in others) / len(others)
            closest = max(cos(row, other) for j, other in enumerate(heads) if j != head)
            assert found["last row, across layers"][0, layer, head].item() == pytest.approx(across, abs=2e-4)
            assert found["last row, closest partner"][0, layer, head].item() == pytest.approx(closest, abs=2e-4)


def test_cka_is_the_feature_space_formula(model, asked):
    found = head_similarity(model, asked, readings=["full map, CKA"])["full map, CKA"]
    for layer, heads in enumerate(plain_maps(model, asked[0])):
        rows = [head.double() - head.double().mean(0) for head in heads]

        def alike(one, other):
            norms = torch.linalg.norm(one.T @ one) * torch.linalg.norm(other.T @ other)
            return (torch.linalg.norm(other.T @ one) ** 2 / norms).item()

        expected = torch.tensor(mean_over_partners(rows, alike))
        torch.testing.assert_close(found[0, layer], expected, atol=2e-4, rtol=1e-3)


def test_head_outputs_are_what_heads_add_to_the_stream(model, asked):
    found, parts, z = head_similarity(model, asked)["head outputs"], anatomy(model), head_outputs(model, asked)
    for layer in range(len(parts.layers)):
        module, rows = parts.outputs[layer], []
        for head in range(parts.n_heads):
            alone = torch.zeros_like(z[0, layer])
            alone[head] = z[0, layer, head]
            row = module(alone.flatten()) - module(torch.zeros_like(alone.flatten()))
            if model.config.model_type == "gemma2":  # the norm divides by the size of the sum of all heads
                norm, whole = model.model.layers[layer].post_attention_layernorm, module(z[0, layer].flatten())
                row = row * (1 + norm.weight) / whole.square().mean().sqrt()
            rows.append(row.tolist())
        expected = torch.tensor(mean_over_partners(rows, cos))
        torch.testing.assert_close(found[0, layer], expected, atol=1e-3, rtol=1e-3)


# --- identities -----------------------------------------------------------------------------------------------------


def test_identical_heads_are_alike_by_every_reading():
    row = torch.rand(1, 1, 5, 5).tril().softmax(-1).tril()
    maps, outputs = (row / row.sum(-1, keepdim=True)).expand(3, 4, 5, 5), torch.rand(1, 1, 8).expand(3, 4, 8)
    for name, score in READINGS.items():
        if name != "full map, centred":  # with the mean map taken off nothing is left of them
            torch.testing.assert_close(score(maps, outputs), torch.ones(3, 4), atol=1e-3, rtol=0, msg=name)


def test_head_order_and_batches_and_padding_change_nothing(prompts):
    model = tiny_model("llama")
    maps = torch.rand(2, 5, 6, 6).tril()
    maps, outputs = maps / maps.sum(-1, keepdim=True), torch.rand(2, 5, 8)
    order = [3, 1, 4, 0, 2]
    for score in READINGS.values():
        torch.testing.assert_close(score(maps[:, order], outputs[:, order]), score(maps, outputs)[:, order])
    together, alone = head_similarity(model, prompts), [head_similarity(model, [prompt]) for prompt in prompts]
    for name in READINGS:
        expected = torch.cat([one[name] for one in alone])
        torch.testing.assert_close(together[name], expected, atol=1e-4, rtol=1e-3, msg=name)


def test_measures_at_their_ends():
    apart = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert to_partners(cosine(apart)).tolist() == [[0.0, 0.0]]
    assert to_partners(jensen_shannon(apart)).tolist() == [[0.0, 0.0]]
    assert jensen_shannon(apart)[0].diagonal().tolist() == [1.0, 1.0]


def test_the_model_is_left_as_it_was(prompts):
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with compute.eager(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match=r"expand|shape"):
        head_scores(model, prompts, scores={"broken": lambda maps, outputs: maps})
    assert model.config._attn_implementation == before


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_scored_is_an_error(prompts):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown reading 'vibes'; known: last row"):
        head_similarity(model, prompts, readings=["vibes"])
    with pytest.raises(ValueError, match="need non-empty prompts, got 0"):
        head_similarity(model, [])
    with pytest.raises(ValueError, match="with an empty one"):
        head_similarity(model, [[1], []])
    with pytest.raises(ValueError, match="at least two heads"):
        to_partners(torch.ones(2, 1, 1))


def test_no_readings_one_layer_and_one_head_are_refused(prompts):
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no readings; known: last row, "):
        head_similarity(model, prompts, readings=[])
    for name, shape in (("last row, across layers", (1, 4, 3, 3)), ("last row, closest partner", (2, 1, 3, 3))):
        with pytest.raises(ValueError, match="at least two"):
            READINGS[name](torch.full(shape, 1 / 3), torch.ones(*shape[:2], 8))


def test_mixed_precision_rounds_no_similarity():
    rows = torch.rand(2, 4, 60, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine(rows)
    assert torch.equal(found, cosine(rows))
