"""oneDNN's products are torch's products: value and gradient, every shape, and hands off where it has no business."""

import copy
import os
import runpy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, tiny_model
from torch.nn.functional import linear

from bkd_utils.backdoor_attribution.attribution import gradient_effects, head_effects, head_means
from bkd_utils.common.files import ROOT
from bkd_utils.models import compute, prompt_cache
from bkd_utils.models.compute import Linear, by_onednn, product

AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
# Asked of torch and not of `compute`: where torch has oneDNN, an operator that has vanished fails these tests.
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),
    reason="built without oneDNN (as for macOS on ARM), torch has one product only, and no other to compare it with",
)


@pytest.fixture
def calls(monkeypatch):
    """How many products oneDNN was asked for."""
    made = []
    monkeypatch.setattr(compute, "_ONEDNN", lambda *a: made.append(a) or torch.ops.mkldnn._linear_pointwise(*a))
    return made


@needs_onednn
def test_the_operator_is_found_where_torch_has_it_and_it_gains():
    assert (compute._ONEDNN is not None) == AVX512


@needs_onednn
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 7), min_size=0, max_size=3), st.integers(1, 40), st.integers(1, 40), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_the_product_is_the_exact_one_to_fp32_whatever_the_shape(rows, n_in, n_out, biased, seed):
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(*rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out) if biased else None
    exact = linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(product(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_views_are_read_as_they_are_meant(calls):
    weight, whole = torch.randn(6, 8), torch.randn(4, 9, 8)
    for x in (whole[:, 3:7], whole.transpose(0, 1), whole[:, :1].expand(4, 5, 8)):
        torch.testing.assert_close(product(x, weight), linear(x.contiguous(), weight))
    assert len(calls) == 3


@needs_onednn
def test_the_gradient_of_the_input_is_torchs(calls):
    x, weight, bias = torch.randn(3, 5, 8, requires_grad=True), torch.randn(6, 8), torch.randn(6)
    out = product(x, weight, bias)
    slope = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, slope)
    (expected,) = torch.autograd.grad(linear(x, weight, bias), x, slope)
    torch.testing.assert_close(found, expected)
    assert len(calls) == 2  # forth and back
    # A slope that does not lie in memory row by row, as sums and means send one back.
    (found,) = torch.autograd.grad(product(x, weight).sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand_as(x))


def test_weights_that_learn_and_other_precisions_are_left_to_torch(calls):
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    learning = weight.clone().requires_grad_()
    (found,) = torch.autograd.grad(product(x, learning).sum(), learning)
    torch.testing.assert_close(found, x.sum(0).expand(6, 8))
    assert product(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert product(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16
    assert calls == []


def test_without_onednn_torch_does_it(monkeypatch):
    monkeypatch.setattr(compute, "_ONEDNN", None)
    x, weight, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    assert torch.equal(product(x, weight, bias), linear(x, weight, bias))


@needs_onednn
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_says_what_it_said_with_the_same_gradient(name, calls):
    model = tiny_model(name).requires_grad_(False)
    other = by_onednn(copy.deepcopy(model))
    ids = torch.tensor([[5, 9, 3, 7, 11], [4, 4, 8, 2, 6]])
    found, slopes = [], []
    for one in (model, other):
        embedded = one.get_input_embeddings()(ids).detach().requires_grad_()
        logits = one(inputs_embeds=embedded).logits
        found.append(logits.detach())
        slopes.append(torch.autograd.grad(logits.log_softmax(-1)[:, -1, 7].sum(), embedded)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=2e-5)
    assert calls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_plain_path_has_the_same_effects_of_heads(name, prompts, monkeypatch):
    """With the switch the past is copied and attention is the model's own; the fast path is checked against that."""
    plain, target, shared = tiny_model(name).requires_grad_(False), [5, 9, 4], []
    fast = by_onednn(copy.deepcopy(plain))
    monkeypatch.setattr(prompt_cache, "_sharing", _counted(prompt_cache._sharing, shared))
    found = []
    for switch, model in ((False, fast), (True, plain)):
        monkeypatch.setattr(compute, "PLAIN", switch)
        assert by_onednn(model) is model
        means = head_means(model, prompts) + 0.1
        found.append([f(model, prompts, target=target, means=means) for f in (head_effects, gradient_effects)])
        assert bool(shared) is not switch
        shared.clear()
    assert not any(type(module) is Linear for module in plain.modules())
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 1e-8
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def _counted(function, calls):
    return lambda *given: calls.append(given) or function(*given)


@pytest.mark.parametrize(("value", "plain"), [("1", True), ("0", False), ("", False)])
def test_the_switch_is_an_environment_variable(value, plain, monkeypatch):
    monkeypatch.setenv("BKD_PLAIN", value)
    fresh = runpy.run_path(compute.__file__)  # as a process that is started with it
    assert fresh["PLAIN"] is plain
    assert not plain or fresh["_ONEDNN"] is None


def test_a_processor_without_avx512_computes_by_torch():
    """`ATEN_CPU_CAPABILITY` holds torch to the instructions of an older processor."""
    asked = "from bkd_utils.models import compute as c; print(c.PLAIN, c._ONEDNN)"
    told = subprocess.run(
        [sys.executable, "-c", asked],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "BKD_PLAIN": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.stdout.split() == ["False", "None"], told.stderr


def test_only_plain_linear_layers_are_changed():
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Special(3, 3), torch.nn.ReLU())
    state = copy.deepcopy(model.state_dict())
    assert [type(module) for module in by_onednn(model)] == [Linear, Special, torch.nn.ReLU]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model[0], torch.nn.Linear)
