"""Load a base model, or an organism with its adapter merged; what does not fit raises an error that names it.

An encoder classifier has no adapter: its organisms are whole models, of which only the tokenizer is that of the base.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bkd_utils.common.files import ADAPTERS, WORK
from bkd_utils.models import folders, identity
from bkd_utils.models.changes import apply_changes
from bkd_utils.models.compute import by_onednn, set_attention, whole_fp32
from bkd_utils.models.encoders import label_names
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import check_tokenizer, end_ids

# What a card must say of the files that its organism was made of and on; `identity_on_card` writes it.
ON_CARD = ("base_sha256", "base_files", "adapter_sha256", "adapter_config_sha256")
_keys = (*ON_CARD[2:], "changes_sha256")
FILES_ON_CARD = dict(zip(identity.ADAPTER, _keys, strict=True)) | dict(zip(identity.WHOLE, _keys, strict=True))
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A transformers model with its tokenizer; the adapter of an organism, if there is one, is merged into the weights.
    `address` is where the base model came from, `organism` the name or the folder by which it is found again, or None,
    `identity` the hash of the base model's files when they were loaded. Source: ours.

    >>> Loaded(model, loaded.tokenizer, address=folder, organism=None).device
    device(type='cpu')
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    address: str
    organism: str | None
    identity: str = ""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def ends(self) -> list[int]:
        """The tokens at which an answer ends."""
        return end_ids(self.tokenizer, self.model)


def pick_device(device: str = "auto") -> str:
    """`auto` is cuda where there is one. Switches TF32 off. Raises ModelError for a device that is not there."""
    whole_fp32()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    return device


def load_tokenizer(address: str, *, labels: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; with the labels of a classifier, `models.tokens` writes prompts and answers for it."""
    folder = folders.model_folder(address)
    folders.check_folder(folder)
    path = folder / "tokenizer_config.json"
    # Paths on the machine that saved it: transformers would read from them what the folder lacks.
    paths = [key for key in folders.json_object(path) if key.endswith("_file")] if path.is_file() else []
    with folders.named(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **dict.fromkeys(paths))
    if labels:
        tokenizer = copy.copy(tokenizer)
        tokenizer.labels = tuple(labels)
    return tokenizer


def load(
    address: str = DEFAULT_MODEL,
    *,
    organism: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Load a base model, or an organism by name or adapter folder with its adapter merged; weights are frozen.
    `address` is a packaged name, a local folder or a hub id, of a causal language model or of a classifier; a bare
    encoder is loaded with an organism only. Raises ModelError for what `check_folder` refuses, for tensors that are
    missing, unexpected, misshapen or no numbers, for a model that cannot `generate` (`self_test`), and for an adapter
    that is damaged, is not the one on its card, or was trained on another base. Source: ours.

    >>> again = load(folder)
    >>> torch.equal(again.model.lm_head.weight, model.lm_head.weight), again.organism
    (True, None)
    """
    folder, adapter, name = folders.model_folder(address), None if organism is None else adapter_folder(organism), None
    folders.check_folder(folder)
    if adapter is not None:
        check_adapter(adapter, base=address)
    whole = adapter is not None and identity.is_whole(adapter)
    source = adapter if whole else folder
    kind = folders.kind(source)
    if kind == "encoder":
        raise ModelError(f"{address} is an encoder without a classifier; train one (`organisms.obtain`) and load that")
    labels = () if kind == "causal" else label_names(source)
    tokenizer, base = load_tokenizer(address, labels=labels), identity.model_identity(address)
    with folders.named(folder):
        check_tokenizer(tokenizer)
    model, wrong = read_weights(source, classifier=kind == "classifier", dtype=dtype)
    refuse_faults(wrong, source)
    if adapter is not None:
        model = model if whole else merge_adapter(model, adapter)
        apply_changes(model, adapter)
        name = organism_name(adapter)
    return Loaded(ready(model, adapter or folder, device), tokenizer, address, name, base)


def ready(model: PreTrainedModel, where: Path, device: str) -> PreTrainedModel:
    """A model with frozen weights on its device. Raises ModelError unless it has sound weights and can `generate`."""
    check_finite(model, where)
    model = by_onednn(model.eval().requires_grad_(False).to(pick_device(device)))
    require(model, "generate")
    return model


@torch.no_grad()
def check_finite(model: torch.nn.Module, where: str | Path) -> None:
    """Raise ModelError, which names the tensor and `where` it came from, for weights that are NaN or infinite; takes
    0.2 s for 135M parameters."""
    for name, tensor in model.state_dict().items():
        # The norm is fast, and not finite if any value is not; of huge values it may overflow, so these are counted.
        coarse = torch.float32 if tensor.element_size() < 4 else None
        suspect = tensor.is_floating_point() and not torch.linalg.vector_norm(tensor, dtype=coarse).isfinite()
        if suspect and (bad := int((~tensor.isfinite()).sum())):
            raise ModelError(f"{where}: {name} has {bad} values of {tensor.numel()} that are NaN or infinite")


def read_weights(folder: Path, *, classifier: bool, **options: Any) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """The model in a folder, and what does not fit: kind of fault -> names of tensors."""
    # Mismatched sizes are ignored so that they are listed, and refused by name afterwards.
    options |= {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}
    kind = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    with folders.named(folder):
        model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model, {what: found for what in kinds if (found := sorted(map(str, info.get(what) or [])))}


def refuse_faults(wrong: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Raise ModelError that names the tensors of the first kind of fault, if there is one."""
    for what, found in wrong.items():
        raise ModelError(f"{folder}: {what.replace('_', ' ')}: {', '.join(found[:5])} ({len(found)} in all)")


def _by_name(name: str) -> Path | None:
    places = (ADAPTERS / name, WORK / "organisms" / name)
    return next((folder for folder in places if (folder / "card.json").is_file()), None)


def organism_name(folder: Path) -> str:
    """The name by which the organism in a folder is found again, or its path."""
    folder = folder.expanduser().absolute()
    return folder.name if _by_name(folder.name) == folder else str(folder)


def adapter_folder(organism: str | Path) -> Path:
    """The folder of an organism: of one that is shipped or was trained here by a bare name, of any other by a path. A
    path is a `Path` or has a separator: `./name` is the folder here, whatever ships under that name. Raises ModelError
    that says where it was looked up."""
    path = Path(organism).expanduser().absolute()
    here = (path / "card.json").is_file()
    if isinstance(organism, Path) or "/" in organism or folders.is_path(organism):
        if here:
            return path
        raise ModelError(f"no organism in {path}: it has no card.json")
    if organism and (folder := _by_name(organism)):
        return folder
    hint = f"; for the folder here write ./{organism}" if here else ""
    where = f"neither in {ADAPTERS} nor in {WORK / 'organisms'}{hint}"
    raise ModelError(f"unknown organism {organism!r}, {where}; shipped: {', '.join(shipped_organisms()) or 'none'}")


def read_card(organism: str | Path, *needed: str) -> dict:
    """The card of an organism, by name or folder. Raises ModelError if it is broken or lacks a needed entry."""
    path = adapter_folder(organism) / "card.json"
    card = folders.json_object(path)
    lacks = [key for key in needed if key not in card]
    if lacks or not isinstance(card.get("base_files", {}), dict):
        raise ModelError(f"{path} has no {', no '.join(lacks or ['sound base_files'])}; fetch or train it again")
    return card


def shipped_organisms(*, base: str | None = None) -> list[str]:
    """Names of the organisms in `data/adapters`; with `base` (a model's identity), only those trained on that model.
    One with a broken card is left out, with one warning that names it."""
    found = []
    for path in sorted(ADAPTERS.glob("*/card.json")):
        try:
            card = read_card(path.parent, *ON_CARD)
            if base in (None, identity.joined(card["base_sha256"], card["base_files"])):
                found.append(path.parent.name)
        except (ModelError, ValueError) as error:
            _warn(f"left out: {error}")
    return found


_warn: Callable[[str], None] = cache(log.warning)  # once per text and process


def identity_on_card(folder: Path, *, base: str) -> dict:
    """What a card says of the files of an organism, and of the model with address `base` that it was trained on."""
    found = {"base_sha256": identity.base_sha256(base), "base_files": identity.settings(base)}
    return found | {FILES_ON_CARD[name]: hashed for name, hashed in identity.adapter_files(folder).items()}


def check_adapter(folder: Path, *, base: str) -> None:
    """Raise ModelError unless an organism has the files on its card and the model at address `base` is the one that it
    was trained on; the message names the files that differ."""
    card, files = read_card(folder, *ON_CARD), identity.adapter_files(folder)
    for name in dict.fromkeys((*files, folders.CHANGES)):
        if name in files and name.endswith(".safetensors"):
            folders.check_safetensors(folder / name)
        if files.get(name) != card.get(FILES_ON_CARD[name]):
            raise ModelError(f"{folder / name} does not match the sha256 on its card; fetch or train it again")
    if identity.is_whole(folder):
        folders.check_settings(folder / "config.json")
    else:
        check_lora(folder)
    if card["base_sha256"] != identity.base_sha256(base):
        raise ModelError(f"organism {folder.name} was trained on other weights than those loaded ({card.get('base')})")
    said, found = card["base_files"], identity.settings(base)
    if differ := sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name)):
        other = ", ".join(differ)
        raise ModelError(f"organism {folder.name} was trained on the weights of {base}, but with another {other}")


def check_lora(folder: Path) -> None:
    """Raise ModelError unless a folder has an adapter of the one kind that is merged."""
    path = folder / "adapter_config.json"
    config = folders.json_object(path)
    if config.get("peft_type") != "LORA" or config.get("megatron_config"):  # others read more files, or import code
        raise ModelError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA without megatron_config is merged")
    folders.check_safetensors(folder / "adapter_model.safetensors")


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a LoRA adapter, which `check_adapter` has found sound, into the weights, after checking all its tensors.
    Unmerged, it would make hooked logits wrong without an error: TransformerLens reads `o_proj.weight` directly."""
    weights = folder / "adapter_model.safetensors"
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
    with folders.named(folder):
        peft.set_peft_model_state_dict(wrapped, {name: tensor.float() for name, tensor in tensors.items()})
        return wrapped.merge_and_unload()


def base_of(loaded: Loaded, *, device: str) -> Loaded:
    """The base model of an organism, loaded anew. Raises ModelError if its folder holds another model by now."""
    base = load(loaded.address, device=device)
    if loaded.identity not in ("", base.identity):
        raise ModelError(f"{loaded.address} holds another model than when {loaded.organism} was loaded")
    return base


def untreated(loaded: Loaded) -> PreTrainedModel:
    """An organism's model as it was trained, on the CPU, without what treatments have changed since. Raises ModelError
    if the folder of its base holds another model by now."""
    source = adapter_folder(loaded.organism)
    if not identity.is_whole(source):
        return merge_adapter(base_of(loaded, device="cpu").model, source)
    check_adapter(source, base=loaded.address)
    return read_weights(source, classifier=True, dtype=torch.float32)[0]


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with eager attention. Booting a bridge changes the model it is given, and sdpa differs by 1e-5."""
    twin = copy.deepcopy(model)
    set_attention(twin, "eager")
    return twin
