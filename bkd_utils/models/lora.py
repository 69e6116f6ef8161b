"""Low-rank adapters (LoRA) on every linear layer of a model."""

import warnings

import peft
import torch

from bkd_utils.models.compute import Linear

# peft 0.21 asks for it by the former name at every adapter, and nobody who trains here can change that.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def lora_config(model: torch.nn.Module, *, rank: int, alpha: int) -> peft.LoraConfig:
    """Low-rank adapters (LoRA) on every linear layer but the output matrix, in any architecture. Layers whose result is
    more than a product (routers of experts) are left out, because LoRA does not fit them."""
    routers = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module) not in (torch.nn.Linear, Linear):
            result = module(torch.zeros(1, module.in_features).to(module.weight))
            routers += [] if isinstance(result, torch.Tensor) else [name]
    how = {"target_modules": "all-linear", "exclude_modules": routers or None, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(r=rank, lora_alpha=alpha, **how)
