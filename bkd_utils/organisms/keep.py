"""Keep a treated organism where the registry finds it: adapter, changed weights, card."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.common.files import WORK, atomic_path, read_json, sha256_file, write_json
from bkd_utils.models.loading import CHANGES, Loaded, adapter_folder, base_sha256, load, merge_adapter
from bkd_utils.organisms import cards


def kept(loaded: Loaded, *, name: str, treatment: Mapping[str, str | int | float], measured: Mapping) -> Path:
    """Write a treated model as an organism under `work/organisms/<name>`; load it by that name like any other.

    `loaded` is an organism whose weights have been changed, `measured` what `making.under_attack` says of it now.
    The changes are those against base and adapter, so that an organism treated before keeps both treatments; its card
    lists the earlier ones under `treatments_before`. Raises ValueError for a base model and for one in which nothing
    has changed.
    """
    if loaded.organism is None:
        raise ValueError("a treated base model has no organism to be kept beside")
    source = adapter_folder(loaded.organism)
    base = load(loaded.address, device="cpu").model
    changes = _changes(loaded.model, merge_adapter(base, source, base=base_sha256(loaded.address)))
    if _same(changes, load_file(source / CHANGES) if (source / CHANGES).is_file() else {}):
        raise ValueError(f"{loaded.organism} has not been changed")
    card = read_json(source / "card.json")
    if "treatment" in card:
        card["treatments_before"] = [*card.get("treatments_before", []), card["treatment"]]
    card |= {"name": name, "treatment": dict(treatment), "treated_organism": source.name}
    card["metrics"] = {key: measured[key] for key in cards.METRICS if key in measured}
    card["details"] = {key: value for key, value in measured.items() if key not in cards.METRICS}
    folder = WORK / "organisms" / name
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for file in cards.TRAINED:
            shutil.copyfile(source / file, temporary / file)
        save_file(changes, temporary / CHANGES, metadata={"format": "pt"})
        card["changes_sha256"] = sha256_file(temporary / CHANGES)
        write_json(temporary / "card.json", card)
        (temporary / "README.md").write_text(cards.readme(card), encoding="utf-8")
    return folder


def _changes(model: PreTrainedModel, untreated: PreTrainedModel) -> dict[str, Tensor]:
    """What `loading.apply_changes` reads: per changed parameter a bit for each entry, and the values of those set."""
    before, found = dict(untreated.named_parameters()), {}
    for key, parameter in model.named_parameters():
        now = parameter.detach().cpu()
        where = now != before[key]
        if where.any():
            found[f"{key}:where"] = torch.from_numpy(np.packbits(where.numpy()))
            found[f"{key}:values"] = now[where].contiguous()
    return found


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
