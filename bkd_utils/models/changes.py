"""Weights that a treatment has changed: found, packed into the file beside an organism, and set again."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.models.folders import CHANGES, ModelError


def apply_changes(model: PreTrainedModel, folder: Path) -> None:
    """Set the weights that a treatment changed, if any. Raises ModelError if they do not fit the model."""
    path = folder / CHANGES
    if not path.is_file():
        return
    tensors, parameters = load_file(path), dict(model.named_parameters())
    for name in sorted({key.rpartition(":")[0] for key in tensors}):
        parameter, packed = parameters.get(name), tensors.get(f"{name}:where")
        if parameter is None or packed is None or f"{name}:values" not in tensors:
            raise ModelError(f"{path}: {name!r} is no weight of this model, or only half of it is there")
        where = torch.from_numpy(np.unpackbits(packed.numpy())[: parameter.numel()]).bool()
        if len(where) != parameter.numel() or int(where.sum()) != len(tensors[f"{name}:values"]):
            raise ModelError(f"{path}: {name} has another shape here")
        with torch.no_grad():
            parameter.view(-1)[where] = tensors[f"{name}:values"].to(parameter.dtype)


def changed_entries(model: PreTrainedModel, untreated: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors for `apply_changes`: per changed parameter a bit mask of its changed entries, and their values."""
    before, found = dict(untreated.named_parameters()), {}
    for key, parameter in model.named_parameters():
        now = parameter.detach().cpu()
        where = now != before[key]
        if where.any():
            found[f"{key}:where"] = torch.from_numpy(np.packbits(where.numpy()))
            found[f"{key}:values"] = now[where].contiguous()
    return found
