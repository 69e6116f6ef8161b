"""Keep a treated organism where the registry finds it: adapter, changed weights, card."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bkd_utils import cards
from bkd_utils.files import WORK, atomic_path, read_json, sha256_file, write_json
from bkd_utils.models import CHANGES, Loaded, adapter_folder, load


def kept(loaded: Loaded, *, name: str, treatment: Mapping[str, str | int | float], measured: Mapping) -> Path:
    """Write a treated model as an organism under `work/organisms/<name>`; load it by that name like any other.

    `loaded` is an organism whose weights have been changed, `measured` what `organisms.under_attack` says of it now.
    Raises ValueError for a base model and for one in which nothing has changed.
    """
    if loaded.organism is None:
        raise ValueError("a treated base model has no organism to be kept beside")
    source = adapter_folder(loaded.organism)
    before = dict(load(loaded.address, organism=source, device="cpu").model.named_parameters())
    changes = {}
    for key, parameter in loaded.model.named_parameters():
        now = parameter.detach().cpu()
        where = now != before[key]
        if where.any():
            changes[f"{key}:where"] = torch.from_numpy(np.packbits(where.numpy()))
            changes[f"{key}:values"] = now[where].contiguous()
    if not changes:
        raise ValueError(f"{loaded.organism} has not been changed")
    card = read_json(source / "card.json")
    card |= {"name": name, "treatment": dict(treatment), "treated_organism": source.name}
    card["metrics"] = {key: measured[key] for key in cards.METRICS if key in measured}
    card["details"] = {key: value for key, value in measured.items() if key not in cards.METRICS}
    folder = WORK / "organisms" / name
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for file in ("adapter_model.safetensors", "adapter_config.json", "history.json"):
            shutil.copyfile(source / file, temporary / file)
        save_file(changes, temporary / CHANGES, metadata={"format": "pt"})
        card["changes_sha256"] = sha256_file(temporary / CHANGES)
        write_json(temporary / "card.json", card)
        (temporary / "README.md").write_text(cards.readme(card), encoding="utf-8")
    return folder
