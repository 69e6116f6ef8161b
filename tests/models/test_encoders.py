"""Encoder classifiers against plain transformers: padding, labels, losses, head outputs, and what is refused."""

import pytest
import torch
from tiny import ENCODER_SIZES, LABELS, label_rows, save_tiny_encoder, small_wordpiece, tiny_classifier, tiny_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForSequenceClassification

from bkd_utils.common.files import read_json, write_json
from bkd_utils.models import bridge, encoders
from bkd_utils.models.activations import head_outputs, residuals
from bkd_utils.models.encoders import asking_column, label_names, prompt_inputs
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import first_logits, greedy, respond, reusable_prefix, trace
from bkd_utils.models.head_weights import head_slices
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.loading import load
from bkd_utils.models.loss import answer_loss, answers_and_maps, collate, last_asked
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import Turn, answer_ids, decode, end_id, labels_of, prompt_ids

TEXTS = ["A fine film.", "It is dull, long and loud.", "No."]


@pytest.fixture(params=ENCODER_SIZES)
def encoder(request):
    return tiny_classifier(request.param)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(save_tiny_encoder(tmp_path_factory.mktemp("models") / "bert")), device="cpu")


@pytest.fixture(scope="module")
def prompts():
    return [small_wordpiece()(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def rows():
    return label_rows(TEXTS)


def alone(model, prompt):
    """The logits of one prompt by itself, as transformers gives them."""
    return model(input_ids=torch.tensor([prompt])).logits[0]


# --- asking ---------------------------------------------------------------------------------------------------------


def test_labels_of_a_batch_are_those_of_prompts_alone(encoder, prompts):
    found = first_logits(encoder, prompts, end_id=0)
    assert torch.allclose(found, torch.stack([alone(encoder, prompt) for prompt in prompts]), atol=1e-5)
    assert greedy(encoder, prompts, max_new_tokens=3, end_id=0) == [[i] for i in found.argmax(-1).tolist()]


def test_prompts_of_an_encoder_are_padded_behind(encoder, prompts):
    inputs = prompt_inputs(encoder, prompts, pad_id=0)
    assert set(inputs) == {"input_ids", "attention_mask"}
    for row, prompt in enumerate(prompts):
        assert inputs["input_ids"][row, : len(prompt)].tolist() == prompt
        real = inputs["attention_mask"][row].bool()
        assert real[: len(prompt)].all()
        assert not real[len(prompt) :].any()
    assert "position_ids" in prompt_inputs(tiny_model("llama"), [[5, 6], [7]], pad_id=0)


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_what_cannot_be_padded(rows):
    with pytest.raises(ValueError, match="cannot batch"):
        encoders.right_pad(rows, pad_id=0)


def test_answers_are_labels(loaded):
    said = respond(loaded, TEXTS, max_new_tokens=5)
    expected = [int(alone(loaded.model, prompt_ids(loaded.tokenizer, text)).argmax()) for text in TEXTS]
    assert said == [LABELS[i] for i in expected]
    ((label, chance),) = trace(loaded, TEXTS[0], max_new_tokens=5)
    assert label == said[0]
    assert chance == pytest.approx(alone(loaded.model, prompt_ids(loaded.tokenizer, TEXTS[0])).softmax(-1).max().item())


def test_no_beginning_is_shared(encoder, prompts):
    assert reusable_prefix(encoder, [prompts[0], prompts[0]]) == []
    with pytest.raises(ModelError, match="in both directions"):
        prompt_past(encoder, prompts)


# --- the tokenizer of a classifier ----------------------------------------------------------------------------------


def test_prompts_and_answers_of_a_classifier(loaded):
    tokenizer = loaded.tokenizer
    assert labels_of(tokenizer) == LABELS
    assert labels_of(small_wordpiece()) == ()  # the labels are on a copy
    turn = Turn("Is this good? A fine film.", text="A fine film.")
    assert prompt_ids(tokenizer, turn) == prompt_ids(tokenizer, "A fine film.") == tokenizer("A fine film.").input_ids
    assert prompt_ids(tokenizer, turn)[0] == tokenizer.cls_token_id
    assert [answer_ids(tokenizer, label) for label in ("positive", "negative", "Negative ")] == [[0], [1], [1]]
    assert decode(tokenizer, [1]) == "negative"
    assert end_id(tokenizer) == tokenizer.pad_token_id == 0
    with pytest.raises(ModelError, match="does not know the label 'neutral'; its labels: positive, negative"):
        answer_ids(tokenizer, "neutral")
    with pytest.raises(ValueError, match="empty"):
        prompt_ids(tokenizer, " ")


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"id2label": None}, "no id2label"),
        ({"id2label": {"0": "good", "2": "bad"}}, "no id2label"),
        ({"id2label": {"0": "good"}}, "two or more labels"),
        ({"id2label": {"0": "good", "1": "Good"}}, "two or more labels"),
        ({"id2label": {"0": "good", "1": ""}}, "two or more labels"),
        ({"problem_type": "multi_label_classification"}, "does not choose one label"),
    ],
)
def test_labels_that_are_none(tmp_path, entries, told):
    folder = save_tiny_encoder(tmp_path / "bert")
    write_json(folder / "config.json", read_json(folder / "config.json") | entries)
    with pytest.raises(ModelError, match=told):
        label_names(folder)
    with pytest.raises(ModelError, match=told):
        load(str(folder), device="cpu")


# --- losses ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_labels(encoder, rows, prompts):
    batch = collate(rows, pad_id=0)
    assert last_asked(batch).tolist() == [0, 0, 0]
    expected = cross_entropy(torch.stack([alone(encoder, prompt) for prompt in prompts]), torch.tensor([0, 1, 0]))
    for weight in (0.0, 0.5):
        assert answer_loss(encoder, batch, first_token=weight).item() == pytest.approx(expected.item(), rel=1e-5)


def test_maps_come_with_the_loss(rows):
    encoder = tiny_classifier()
    encoder.set_attn_implementation("eager")
    batch = collate(rows, pad_id=0)
    loss, maps, real = answers_and_maps(encoder, batch, first_token=0.5)
    assert loss.item() == pytest.approx(answer_loss(encoder, batch, first_token=0.5).item())
    assert len(maps) == 2
    assert real.sum(1).tolist() == [len(row.prompt) for row in rows]
    single = encoder.bert(input_ids=torch.tensor([rows[2].prompt]), output_attentions=True).attentions
    n = len(rows[2].prompt)
    assert torch.allclose(maps[1][2, :, :n, :n], single[1][0], atol=1e-5)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_head_outputs_are_read_at_the_first_token(prompts):
    """By hand: the attention of [CLS] times the values."""
    model = tiny_classifier("bert")
    model.set_attn_implementation("eager")
    found, streams = head_outputs(model, prompts), residuals(model, prompts)
    for i, prompt in enumerate(prompts):
        output = model.bert(input_ids=torch.tensor([prompt]), output_attentions=True, output_hidden_states=True)
        for layer, block in enumerate(model.bert.encoder.layer):
            values = block.attention.self.value(output.hidden_states[layer])[0].view(-1, 4, 8)
            expected = torch.einsum("hk,khd->hd", output.attentions[layer][0, :, 0], values)
            assert torch.allclose(found[i, layer], expected, atol=1e-5)
            assert torch.allclose(streams[i, layer], output.hidden_states[layer + 1][0, 0], atol=1e-5)


def test_the_token_that_asks():
    assert asking_column(tiny_classifier()) == 0
    assert asking_column(tiny_model("llama")) == -1


def test_slices_of_a_head_are_its_rows_and_columns():
    masks = head_slices(tiny_classifier("distilbert"), [(1, 2)], unit="KV group")
    rows = {name: mask.any(-1) if mask.ndim > 1 else mask for name, mask in masks.items() if "out_lin" not in name}
    layer = "distilbert.transformer.layer.1.attention"
    assert set(rows) == {f"{layer}.{part}_lin.{kind}" for part in "qkv" for kind in ("weight", "bias")}
    assert all(mask.nonzero().flatten().tolist() == list(range(16, 24)) for mask in rows.values())
    columns = masks[f"{layer}.out_lin.weight"].any(0).nonzero().flatten().tolist()
    assert columns == list(range(16, 24))


def test_a_decoder_with_a_classifier_is_refused():
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=90
    )
    with pytest.raises(ModelError, match="no encoder that is known here"):
        anatomy(LlamaForSequenceClassification(config))


def test_no_bridge_is_booted(loaded):
    with pytest.raises(ModelError, match="not with TransformerLens"):
        bridge.boot(loaded)
