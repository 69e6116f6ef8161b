"""A new classifier on a bare encoder: what is drawn, from which seed, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LABELS, save_tiny, save_tiny_encoder, small_wordpiece, tiny_classifier
from transformers import AutoModelForMaskedLM

from bkd_utils.models.classifiers import new_classifier
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import load
from bkd_utils.models.tokens import labels_of


@pytest.fixture(scope="module", params=["bert", "distilbert", "roberta", "electra"])
def bare(request, tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / request.param, request.param, bare=True)


@pytest.fixture
def damaged(tmp_path):
    """A bare encoder, and a function that changes its tensors."""
    folder = save_tiny_encoder(tmp_path / "bert", bare=True)

    def edit(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return edit


def made(folder, *, seed=0, labels=LABELS):
    return new_classifier(str(folder), labels=labels, seed=seed, device="cpu")


def head(loaded):
    return {name: one for name, one in loaded.model.named_parameters() if name.startswith(("classifier", "pre_"))}


def test_the_encoder_stays_and_the_classifier_is_drawn_by_the_seed(bare):
    first, again, other = made(bare), made(bare), made(bare, seed=1)
    kept = load_file(bare / "model.safetensors")
    for name, tensor in first.model.base_model.state_dict().items():
        assert "pooler" in name or torch.equal(tensor, kept[name])
    assert all(torch.equal(one, head(again)[name]) for name, one in head(first).items())
    matrices = {name: one for name, one in head(first).items() if one.ndim > 1}
    assert matrices
    assert not any(torch.equal(one, head(other)[name]) for name, one in matrices.items())
    assert all(0.1 < one.std() < 0.3 for one in matrices.values())  # `initializer_range` is 0.2
    assert all(not one.any() for name, one in head(first).items() if one.ndim == 1)
    assert labels_of(first.tokenizer) == LABELS
    assert first.model.config.id2label == dict(enumerate(LABELS))
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_as_many_labels_as_the_task_has(damaged):
    folder = damaged(lambda tensors: None)
    assert made(folder, labels=("movie", "news", "tweet")).model.config.num_labels == 3
    with pytest.raises(ModelError, match="can only tell labels apart; the task has 0"):
        made(folder, labels=())


def test_an_encoder_that_filled_in_words(tmp_path):
    model = tiny_classifier()
    filled = AutoModelForMaskedLM.from_config(model.config)
    filled.save_pretrained(tmp_path / "filled")
    small_wordpiece().save_pretrained(tmp_path / "filled")
    assert torch.equal(
        made(tmp_path / "filled").model.bert.embeddings.word_embeddings.weight,
        filled.bert.embeddings.word_embeddings.weight,
    )


def test_numbers_of_positions_are_no_weights(damaged):
    made(damaged(lambda tensors: tensors.update({"embeddings.position_ids": torch.arange(256)[None]})))


QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(QUERY), "missing keys: bert.encoder.layer.0.attention.self.query.weight"),
        (lambda tensors: tensors.update(more=torch.ones(2)), "unexpected keys: more"),
        (lambda tensors: tensors.update({QUERY: torch.ones(3, 3)}), "mismatched keys"),
        (lambda tensors: tensors[QUERY].fill_(float("nan")), "NaN"),
    ],
)
def test_damaged_encoders(damaged, change, told):
    with pytest.raises(ModelError, match=told):
        made(damaged(change))


def test_a_bare_encoder_is_not_loaded_and_a_whole_model_gets_no_classifier(tmp_path, bare):
    with pytest.raises(ModelError, match="an encoder without a classifier; train one"):
        load(str(bare), device="cpu")
    for folder in (save_tiny(tmp_path / "llama", "llama"), save_tiny_encoder(tmp_path / "whole")):
        with pytest.raises(ModelError, match="is no bare encoder"):
            made(folder)
