"""How models compute: fp32 products by oneDNN, bf16 where the hardware has it, and eager attention.

MKL, the default library of torch, picks slow kernels on processors that are not made by Intel: on an AMD EPYC it
reached 190 GFLOP/s, and oneDNN 400, with sums in another order. It is asked on processors with AVX-512 only, because
whole computations gain nothing without it (`tests/benchmarks/products.py`). With BKD_PLAIN=1 in the environment,
products and attention are those that torch and transformers choose by themselves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PLAIN = os.environ.get("BKD_PLAIN", "") not in ("", "0")
# The operator to which `torch.compile` lowers a linear layer; None where torch's own product is used.
_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_HAS = torch.backends.mkldnn.is_available() and _AVX512 and not PLAIN
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _HAS else None


class _Product(torch.autograd.Function):
    """The product with its gradient in `x`; weights are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        result = _ONEDNN(x, weight, bias, "none", [], "")
        # The operator returns a view, which could not be changed in place by models that clip it.
        layout = (result.storage_offset(), result.size(), result.stride())
        return torch.empty(0).set_(result.untyped_storage(), *layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _ONEDNN(slope, weight.t(), None, "none", [], ""), None, None


def product(
    x: Float[Tensor, "*rows n_in"], weight: Float[Tensor, "n_out n_in"], bias: Float[Tensor, " n_out"] | None = None
) -> Float[Tensor, "*rows n_out"]:
    """`torch.nn.functional.linear`, by oneDNN for frozen fp32 weights on a CPU."""
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    frozen = not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors[1:]))
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    if _ONEDNN is None or not (plain and frozen) or torch.is_autocast_enabled("cpu"):
        return linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)
    return _ONEDNN(x, weight, bias, "none", [], "")


class Linear(torch.nn.Linear):
    """A linear layer that computes by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def by_onednn(model: torch.nn.Module) -> torch.nn.Module:
    """Let every linear layer of a model compute by `product`; layers of subclasses stay as they are."""
    for module in () if PLAIN else model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
    return model


def whole_fp32() -> None:
    """No TF32: products of fp32 matrices on a GPU keep all digits, whatever was set before. Every loaded model asks."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def has_fast_bf16(device: torch.device) -> bool:
    """Does this machine multiply bf16 in hardware? Emulated bf16 would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)


def mixed_precision(device: torch.device) -> torch.autocast:
    """A context in which training multiplies in bf16 where that is fast; what is measured stays in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device))


@contextmanager
def frozen_halved(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, matrices that do not learn and are no embeddings are in bf16 where `mixed_precision` uses it.
    Autocast would cast them again in every pass, which takes a fifth of a step with few rows; the results are the
    same."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    frozen = [weight for weight in matrices if not weight.requires_grad and id(weight) not in looked_up]
    whole = [(weight, weight.data) for weight in frozen] if has_fast_bf16(next(model.parameters()).device) else []
    try:
        for weight, data in whole:
            weight.data = data.bfloat16()
        yield
    finally:
        for weight, data in whole:
            weight.data = data


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose how a model attends, also where transformers refuses with a warning only."""
    model.set_attn_implementation(name)
    model.config._attn_implementation = name


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, attention is eager and can return its maps; fused kernels cannot."""
    before = model.config._attn_implementation
    set_attention(model, "eager")
    try:
        yield
    finally:
        set_attention(model, before)
