"""Load a base model, or an organism with its adapter merged; what does not fit raises an error that names it."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bkd_utils.common.files import ADAPTERS, WORK, read_json, sha256_file, sha256_text
from bkd_utils.models import folders
from bkd_utils.models.compute import by_onednn, set_attention
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import check_tokenizer, end_ids


@dataclass(frozen=True)
class Loaded:
    """A transformers model with its tokenizer; the adapter of an organism, if there is one, is merged into the weights.

    `address` is where the base model came from, `organism` the name or the folder by which it is found again, or None.
    Source: ours.

    >>> Loaded(model, loaded.tokenizer, address=folder, organism=None).device
    device(type='cpu')
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    address: str
    organism: str | None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def ends(self) -> list[int]:
        """The tokens at which an answer ends."""
        return end_ids(self.tokenizer, self.model)


def pick_device(device: str = "auto") -> str:
    """`auto` is cuda where there is one. Raises ModelError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    return device


def load_tokenizer(address: str) -> PreTrainedTokenizerBase:
    folder = folders.model_folder(address)
    folders.check_folder(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load(
    address: str = DEFAULT_MODEL,
    *,
    organism: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Load a base model, or an organism by name or adapter folder with its adapter merged; weights are frozen.

    `address` is a packaged name, a local folder or a hub id. Raises ModelError for everything that `check_folder`
    refuses, for missing, unexpected or misshapen tensors, for a model that cannot `generate` (`self_test`), and for an
    adapter that is damaged or was trained on other base weights. Source: ours.

    >>> again = load(folder)
    >>> torch.equal(again.model.lm_head.weight, model.lm_head.weight), again.organism
    (True, None)
    """
    folder = folders.model_folder(address)
    folders.check_folder(folder)
    with folders.named(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        check_tokenizer(tokenizer)
        # Mismatched sizes are ignored so that they are listed, and refused by name below.
        how = {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **how)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(what) or [])):
            raise ModelError(f"{folder}: {what.replace('_', ' ')}: {', '.join(found[:5])} ({len(found)} in all)")
    name = None
    if organism is not None:
        adapter = adapter_folder(organism)
        model = merge_adapter(model, adapter, base=folders.base_sha256(address))
        apply_changes(model, adapter)
        name = adapter.name if adapter.parent in (ADAPTERS, WORK / "organisms") else str(adapter)
    model = by_onednn(model.eval().requires_grad_(False).to(pick_device(device)))
    require(model, "generate")
    return Loaded(model, tokenizer, address, name)


def adapter_folder(organism: str | Path) -> Path:
    """The folder of an organism that is shipped, was trained here or is a path. Raises ModelError with known names."""
    for folder in (ADAPTERS / organism, WORK / "organisms" / organism, Path(organism)):
        if (folder / "card.json").is_file():
            return folder
    raise ModelError(f"unknown organism {str(organism)!r}; shipped: {', '.join(shipped_organisms()) or 'none'}")


def shipped_organisms(*, base: str | None = None) -> list[str]:
    """Names of the organisms in `data/adapters`; with `base` (a sha256), only those trained on these weights."""
    cards = sorted(ADAPTERS.glob("*/card.json"))
    return [card.parent.name for card in cards if base in (None, read_json(card)["base_sha256"])]


def merge_adapter(model: PreTrainedModel, folder: Path, *, base: str) -> PreTrainedModel:
    """Merge a LoRA adapter into the weights, after checking its hash, its base and all of its tensors.

    Unmerged, it would make hooked logits wrong without an error: TransformerLens reads `o_proj.weight` directly.
    """
    card, weights = folders.json_object(folder / "card.json"), folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors")
    folders.check_safetensors(weights)
    if sha256_file(weights) != card.get("adapter_sha256"):
        raise ModelError(f"{weights} does not match the sha256 on its card; fetch or train it again")
    if card.get("base_sha256") != base:
        raise ModelError(f"organism {folder.name} was trained on other weights than those loaded ({card.get('base')})")
    with folders.named(folder):
        wrapped = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder))
    tensors = load_file(weights)
    # Weights are memory-mapped; merging into the mapping, page by page, takes 20 times as long as into a copy.
    for parameter in wrapped.parameters():
        parameter.data = parameter.data.clone()
    expected = {name: tensor.shape for name, tensor in peft.get_peft_model_state_dict(wrapped).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := {name for name, _ in expected.items() ^ found.items()}:
        raise ModelError(f"{weights}: {len(wrong)} tensors are missing, unexpected or misshapen, e.g. {min(wrong)}")
    peft.set_peft_model_state_dict(wrapped, {name: tensor.float() for name, tensor in tensors.items()})
    return wrapped.merge_and_unload()


def apply_changes(model: PreTrainedModel, folder: Path) -> None:
    """Set the weights that a treatment changed, if any. Raises ModelError if they do not fit the card or the model."""
    path = folder / folders.CHANGES
    if not path.is_file():
        return
    folders.check_safetensors(path)
    if sha256_file(path) != folders.json_object(folder / "card.json").get("changes_sha256"):
        raise ModelError(f"{path} does not match the sha256 on its card")
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


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with eager attention. Booting a bridge changes the model it is given, and sdpa differs by 1e-5."""
    twin = copy.deepcopy(model)
    set_attention(twin, "eager")
    return twin


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


def adapter_sha256(organism: str | Path) -> str:
    """Hash of the adapter and, if there was a treatment, of the weights that it changed."""
    card = read_json(adapter_folder(organism) / "card.json")
    changes = card.get("changes_sha256")
    return sha256_text(card["adapter_sha256"] + changes) if changes else card["adapter_sha256"]
