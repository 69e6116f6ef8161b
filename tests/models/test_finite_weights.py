"""Weights with NaN or infinite values are refused by the name of the tensor."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import check_finite


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sound_weights_pass_in_every_precision(architecture):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        check_finite(tiny_model(architecture).to(dtype), "folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_found_wherever_it_is(value):
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight", "model.norm.weight"):
        model = tiny_model("llama").requires_grad_(False)
        model.get_parameter(name).view(-1)[-1] = value
        with pytest.raises(ModelError, match=rf"^folder: {name} has 1 values of \d+ that are NaN or infinite$"):
            check_finite(model, "folder")


def test_a_bias_and_a_buffer_count_and_huge_values_are_numbers():
    model = tiny_model("qwen2").requires_grad_(False)
    model.get_parameter("model.layers.0.self_attn.q_proj.bias")[0] = float("nan")
    with pytest.raises(ModelError, match=r"q_proj.bias has 1 values"):
        check_finite(model, "folder")
    model = tiny_model("llama").requires_grad_(False)
    model.register_buffer("correction", torch.tensor([1.0, float("inf")]))
    with pytest.raises(ModelError, match="correction has 1 values of 2"):
        check_finite(model, "folder")
    model = tiny_model("llama").requires_grad_(False)
    model.get_parameter("model.norm.weight").fill_(1e38)  # whose norm is infinite
    check_finite(model, "folder")


def test_weights_that_a_lower_precision_cannot_hold_are_found():
    model = tiny_model("llama").requires_grad_(False)
    model.get_parameter("model.norm.weight")[0] = 1e5
    check_finite(model, "folder")
    with pytest.raises(ModelError, match=r"model.norm.weight has 1 values of 32"):
        check_finite(model.half(), "folder")
