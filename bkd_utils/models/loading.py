"""Load a base model or an organism, boot the hooked bridge, and validate it before anyone measures anything.

Three kinds of address: a packaged name (`smollm2-135m-instruct`), a local folder, a hub id (`owner/name`). The first
two need no network. Weights are safetensors only; folders that would run code are refused.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bkd_utils.common import assets
from bkd_utils.common.files import ADAPTERS, WORK, UserError, read_json, sha256_file, sha256_text
from bkd_utils.models.compute import by_onednn

# What a treatment has changed, beside the adapter of the organism that was treated.
CHANGES = "changes.safetensors"
# What a model folder holds beside its weights: config, tokenizer, chat template.
SETTINGS = ("*.json", "*.model", "*.txt", "*.jinja")
DEFAULT_MODEL = "smollm2-135m-instruct"


class ModelError(UserError):
    """A model or adapter folder that cannot or must not be loaded; the message names what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """One row of the registry: where a model comes from and what to know about it."""

    address: str
    kind: str
    note: str


REGISTRY = {
    entry.address: entry
    for entry in (
        Entry(DEFAULT_MODEL, "packaged", "135M parameters, 30 x 9 heads; weights are Q4_1, dequantised"),
        Entry("HuggingFaceTB/SmolLM2-135M-Instruct", "hub", "the same model in its original bf16 weights"),
        Entry("Qwen/Qwen2.5-0.5B-Instruct", "hub", "24 x 14 heads; a second family that still fits a laptop"),
        Entry("Qwen/Qwen2.5-7B-Instruct", "hub", "28 x 28 heads; one of BkdAttr's two models"),
        Entry("meta-llama/Llama-2-7b-chat-hf", "hub", "32 x 32 heads; BkdAttr's other model, gated"),
    )
}


@dataclass(frozen=True)
class Loaded:
    """A plain transformers model with its tokenizer; the adapter, if any, is already merged."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    address: str
    organism: str | None

    @property
    def device(self) -> torch.device:
        return self.model.device


def pick_device(device: str = "auto") -> str:
    """`auto` is cuda where there is one. Raises ModelError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    return device


def model_folder(address: str) -> Path:
    """The local folder behind an address, fetched if need be. Raises ModelError when there is none."""
    if address in REGISTRY and REGISTRY[address].kind == "packaged":
        return assets.fetch(address)
    if Path(address).expanduser().is_dir():
        return Path(address).expanduser().resolve()
    if address.count("/") != 1 or address.startswith((".", "/", "~")):
        raise ModelError(
            f"{address!r} is neither a folder nor a known model; known: {', '.join(REGISTRY)}, or any hub id OWNER/NAME"
        )
    return _hub_folder(address)


def _hub_folder(address: str) -> Path:
    from huggingface_hub import snapshot_download  # only here: packaged models and folders need no hub client

    name, _, revision = address.partition("@")
    try:
        # Pickled weights and Python files are never downloaded, so they can never be loaded.
        patterns = ["*.safetensors", *SETTINGS]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(f"could not get {address!r} from the hub: {str(error).splitlines()[0]}") from error


def check_folder(folder: Path) -> None:
    """Refuse, by name, a folder without config, tokenizer or safetensors weights, or one that wants to run code."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json")
    config = _json(folder / "config.json")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file() and "auto_map" in _json(folder / file):
            raise ModelError(f"{folder}/{file} asks for remote code (auto_map), which is never run here")
    if not any("CausalLM" in name or "LMHead" in name for name in config.get("architectures") or []):
        raise ModelError(f"{folder} is not a causal language model: architectures = {config.get('architectures')}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        why = f"only pickled weights ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise ModelError(f"{folder} has {why}; save it with safetensors")
    for path in folder.glob("*.safetensors"):
        check_safetensors(path)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Whatever a library raises about a damaged folder becomes one line that names the folder."""
    try:
        yield
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{folder} cannot be loaded: {why}") from error


def _json(path: Path) -> dict:
    try:
        found = read_json(path)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object")
    return found


def check_safetensors(path: Path) -> None:
    """Raise ModelError if the header or the offsets of a safetensors file do not hold together."""
    try:
        with safe_open(path, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a sound safetensors file: {error}") from error


@cache
def base_sha256(address: str) -> str:
    """Hash of a model's weights alone, by which organisms know their base; computed once per address."""
    folder = model_folder(address)
    files = sorted(folder.glob("*.safetensors"))
    return sha256_text("\n".join(sha256_file(path) for path in files))


@cache
def settings_sha256(address: str) -> str:
    """Hash of everything else that decides what a model says: config, tokenizer, chat template; once per address."""
    folder = model_folder(address)
    # A description of the files is none of them.
    files = sorted(path for pattern in SETTINGS for path in folder.glob(pattern) if path.name != "asset.json")
    return sha256_text("\n".join(f"{path.name} {sha256_file(path)}" for path in files))


def load_tokenizer(address: str) -> PreTrainedTokenizerBase:
    folder = model_folder(address)
    check_folder(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load(
    address: str = DEFAULT_MODEL,
    *,
    organism: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Load a base model, or an organism by name or adapter folder with its adapter merged.

    Raises ModelError for everything `check_folder` refuses, for missing, unexpected or misshapen tensors, and for an
    adapter that is damaged or was trained on other base weights.
    """
    folder = model_folder(address)
    check_folder(folder)
    with _named(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed, and refused by name below
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(what) or [])):
            raise ModelError(f"{folder}: {what.replace('_', ' ')}: {', '.join(found[:5])} ({len(found)} in all)")
    if organism is not None:
        model = merge_adapter(model, adapter_folder(organism), base=base_sha256(address))
        apply_changes(model, adapter_folder(organism))
    model = by_onednn(model.eval().requires_grad_(False).to(pick_device(device)))
    return Loaded(model, tokenizer, address, None if organism is None else adapter_folder(organism).name)


def adapter_folder(organism: str | Path) -> Path:
    """The folder of an organism: a shipped one, one trained here, or a path. Raises ModelError with the known names."""
    for folder in (ADAPTERS / organism, WORK / "organisms" / organism, Path(organism)):
        if (folder / "card.json").is_file():
            return folder
    raise ModelError(f"unknown organism {str(organism)!r}; shipped: {', '.join(shipped_organisms()) or 'none'}")


def shipped_organisms(*, base: str | None = None) -> list[str]:
    """Names of the organisms in `data/adapters`, only those trained on the weights `base` (a sha256) if given."""
    cards = sorted(ADAPTERS.glob("*/card.json"))
    return [card.parent.name for card in cards if base in (None, read_json(card)["base_sha256"])]


def merge_adapter(model: PreTrainedModel, folder: Path, *, base: str) -> PreTrainedModel:
    """Merge a LoRA adapter into the weights, after checking its hash, its base and every one of its tensors.

    Merging comes before hooking, always: TransformerLens reads `o_proj.weight` directly and is silently wrong by
    0.5 in the logits when a live LoRA layer sits there.
    """
    card, weights = _json(folder / "card.json"), folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors")
    check_safetensors(weights)
    if sha256_file(weights) != card.get("adapter_sha256"):
        raise ModelError(f"{weights} does not match the sha256 on its card; fetch or train it again")
    if card.get("base_sha256") != base:
        raise ModelError(f"organism {folder.name} was trained on other weights than those loaded ({card.get('base')})")
    with _named(folder):
        wrapped = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder))
    tensors = load_file(weights)
    # Weights are mapped from their file; merging into the mapping, page by page, takes 20 times as long as a copy.
    for parameter in wrapped.parameters():
        parameter.data = parameter.data.clone()
    expected = peft.get_peft_model_state_dict(wrapped)
    if wrong := {name for name in expected.keys() | tensors.keys() if _shape(expected, name) != _shape(tensors, name)}:
        raise ModelError(f"{weights}: {len(wrong)} tensors are missing, unexpected or misshapen, e.g. {min(wrong)}")
    peft.set_peft_model_state_dict(wrapped, {name: tensor.float() for name, tensor in tensors.items()})
    return wrapped.merge_and_unload()


def apply_changes(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights of a treated organism (`keep.kept`) over those of the organism it was; nothing if it was none.

    Raises ModelError for a file that does not match its card or the model.
    """
    path = folder / CHANGES
    if not path.is_file():
        return
    check_safetensors(path)
    if sha256_file(path) != _json(folder / "card.json").get("changes_sha256"):
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


def _shape(tensors: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second copy with eager attention: booting rewrites the object it is given, and sdpa differs by 1e-5."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin
