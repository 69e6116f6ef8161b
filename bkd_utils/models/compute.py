"""fp32 products of linear layers by oneDNN: twice as fast where MKL, the default of torch, does not know the processor.

MKL picks slow kernels on processors that are not Intel's: on the EPYC of our measurements 190 GFLOP/s, and oneDNN,
which torch ships as well, 400. Both compute in fp32; their sums run in another order. Products in other precisions and
gradients of weights are left to torch.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

# What `torch.compile` makes of a linear layer; absent where torch was built without oneDNN.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _Product(torch.autograd.Function):
    """The product with its gradient in `x`; weights are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _ONEDNN(x, weight, bias, "none", [], "")

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
    """Let every linear layer of a model compute by `product`; layers of other classes, subclasses too, stay."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
    return model
