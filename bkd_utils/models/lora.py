"""Low-rank adapters (LoRA) on every linear layer of a model."""

import peft
import torch

from bkd_utils.models.compute import plain


def lora_config(model: torch.nn.Module, *, rank: int, alpha: int) -> peft.LoraConfig:
    """Adapters on every linear layer but the output matrix, in any architecture."""
    excluded = routers(model) or None
    how = {"target_modules": "all-linear", "exclude_modules": excluded, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(r=rank, lora_alpha=alpha, **how)


def routers(model: torch.nn.Module) -> list[str]:
    """Names of linear layers whose result is more than a product (routers of experts), which LoRA does not fit."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not plain(module):
            result = module(torch.zeros(1, module.in_features).to(module.weight))
            found += [] if isinstance(result, torch.Tensor) else [name]
    return found
