"""The self-test of encoders: it passes where all parts were found, and names what is wrong where one was not."""

import pytest
import torch
from patching import everywhere
from tiny import ENCODER_SIZES, tiny_classifier

from bkd_utils.models import encoders, head_weights, self_test
from bkd_utils.models.encoder_checks import ENCODER_CHECKS, REFUSED
from bkd_utils.models.encoders import right_pad
from bkd_utils.models.folders import ModelError
from bkd_utils.models.self_checks import CHECKS
from bkd_utils.models.self_test import capabilities, require
from bkd_utils.models.tokens import left_pad


@pytest.fixture(autouse=True)
def tested_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(self_test, "WORK", tmp_path)
    monkeypatch.setattr(self_test, "_known", {})


@pytest.mark.parametrize("kind", ENCODER_SIZES)
def test_an_encoder_can_do_everything_but_components(kind):
    model = tiny_classifier(kind)
    found = capabilities(model)
    assert list(found) == list(CHECKS)
    assert {*ENCODER_CHECKS, *REFUSED} == {*CHECKS}
    assert {name for name, why in found.items() if why} == {"components"}
    with pytest.raises(ModelError, match=r"'components' is not possible .*a norm stands behind every part"):
        require(model, "components")
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_what_an_encoder_cannot_do_is_no_reason_to_test_it_again(monkeypatch):
    first = capabilities(tiny_classifier())
    monkeypatch.setattr(self_test, "_known", {})
    monkeypatch.setattr(self_test, "_reason", lambda *_: "tested again")
    assert capabilities(tiny_classifier()) == first


def without_positions(model, rows, *, pad_id, n_cached=0):
    ids, mask = left_pad([list(row) for row in rows], pad_id=pad_id)
    return {"input_ids": ids, "attention_mask": mask}


def unmasked(model, rows, *, pad_id, n_cached=0):
    ids, mask = right_pad(rows, pad_id=pad_id)
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask)}


@pytest.mark.parametrize("wrong", [without_positions, unmasked])
def test_padding_that_counts_is_found(monkeypatch, wrong):
    everywhere(monkeypatch, "prompt_inputs", wrong)
    found = capabilities(tiny_classifier())
    assert "in a batch and alone" in found["generate"]
    assert found["compare maps"]


@pytest.mark.parametrize(
    ("part", "name", "lacks"),
    [
        ("outputs", "attention.self.value", ("attribute", "steer")),
        ("attentions", "attention", ("slice",)),
        ("outputs", "nothing", ("generate", "attribute", "slice")),
    ],
)
def test_a_part_that_is_another_one_is_found(monkeypatch, part, name, lacks):
    monkeypatch.setitem(encoders.PARTS, part, (name,))
    found = capabilities(tiny_classifier())
    assert all(found[one] for one in lacks)


@pytest.mark.parametrize("names", [("value", "key", "query"), ("key", "query", "value")])
def test_queries_taken_for_something_else_are_found(monkeypatch, names):
    monkeypatch.setattr(head_weights, "ENCODER", (names,))
    assert capabilities(tiny_classifier())["slice"]


def test_a_norm_that_does_not_follow_the_sum_is_found(monkeypatch):
    monkeypatch.setattr(encoders, "NORMS", ("output.LayerNorm",))
    assert "its norm reads" in capabilities(tiny_classifier())["steer"]


def test_a_classifier_that_reads_other_tokens_is_found(monkeypatch):
    """A classifier of the mean over tokens does not ask at the first one."""
    model = tiny_classifier("distilbert")
    monkeypatch.setattr(
        type(model), "forward", lambda self, **given: MeanOutput(self.classifier(self.distilbert(**given)[0].mean(1)))
    )
    assert capabilities(model)["generate"]


class MeanOutput:
    def __init__(self, logits):
        self.logits = logits
