"""Addresses of models (a packaged name, a local folder or a hub id), and checks that no folder of one can run code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bkd_utils.common import assets
from bkd_utils.common.files import UserError, read_json, sha256_file, sha256_text

CHANGES = "changes.safetensors"  # beside an adapter: the weights that a treatment has changed
SETTINGS = ("*.json", "*.model", "*.txt", "*.jinja")  # a model's files other than its weights
DEFAULT_MODEL = "smollm2-135m-instruct"


class ModelError(UserError):
    """A model or adapter folder that cannot or must not be loaded; the message names the fault."""


@dataclass(frozen=True)
class Entry:
    """Where a model comes from and what to know about it."""

    address: str
    kind: str
    note: str


ENTRIES = (
    Entry(DEFAULT_MODEL, "packaged", "135M parameters, 30 x 9 heads; weights are Q4_1, dequantised"),
    Entry("HuggingFaceTB/SmolLM2-135M-Instruct", "hub", "the same model in its original bf16 weights"),
    Entry("Qwen/Qwen2.5-0.5B-Instruct", "hub", "24 x 14 heads; a second family that still fits a laptop"),
    Entry("Qwen/Qwen2.5-7B-Instruct", "hub", "28 x 28 heads; one of BkdAttr's two models"),
    Entry("meta-llama/Llama-2-7b-chat-hf", "hub", "32 x 32 heads; BkdAttr's other model, gated"),
)
REGISTRY = {entry.address: entry for entry in ENTRIES}


def model_folder(address: str) -> Path:
    """The local folder behind an address, fetched if need be. Raises ModelError when there is none."""
    if address in REGISTRY and REGISTRY[address].kind == "packaged":
        return assets.fetch(address)
    if (folder := Path(address).expanduser()).is_dir():
        return folder.resolve()
    if address.count("/") != 1 or address.startswith((".", "/", "~")):
        known = f"{', '.join(REGISTRY)}, or any hub id OWNER/NAME"
        raise ModelError(f"{address!r} is neither a folder nor a known model; known: {known}")
    from huggingface_hub import snapshot_download  # only here: packaged models and folders need no hub client

    name, _, revision = address.partition("@")
    # Pickled weights and Python files are never downloaded, so they can never be loaded.
    patterns = ["*.safetensors", *SETTINGS]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(f"could not get {address!r} from the hub: {str(error).splitlines()[0]}") from error


def check_folder(folder: Path) -> None:
    """Raise ModelError for a folder without config, tokenizer or safetensors weights, or one that would run code."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json")
    architectures = json_object(folder / "config.json").get("architectures")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file() and "auto_map" in json_object(folder / file):
            raise ModelError(f"{folder}/{file} asks for remote code (auto_map), which is never run here")
    if not any("CausalLM" in name or "LMHead" in name for name in architectures or []):
        raise ModelError(f"{folder} is not a causal language model: architectures = {architectures}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        why = f"only pickled weights ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise ModelError(f"{folder} has {why}; save it with safetensors")
    for path in folder.glob("*.safetensors"):
        check_safetensors(path)


@contextmanager
def named(what: Path | str) -> Iterator[None]:
    """Turn any error of a library into a ModelError of one line that names a folder, or what else cannot be loaded."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{what} cannot be loaded: {why[:300]}") from error


def json_object(path: Path) -> dict:
    try:
        found = read_json(path)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object")
    return found


def check_safetensors(path: Path) -> None:
    """Raise ModelError if the header or the offsets of a safetensors file are inconsistent."""
    try:
        with safe_open(path, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a sound safetensors file: {error}") from error


@cache
def base_sha256(address: str) -> str:
    """Hash of a model's weights alone, by which organisms identify their base; computed once per address."""
    return sha256_text("\n".join(sha256_file(path) for path in sorted(model_folder(address).glob("*.safetensors"))))


@cache
def settings_sha256(address: str) -> str:
    """Hash of the other files that decide a model's answers (`SETTINGS`); computed once per address."""
    folder = model_folder(address)
    # asset.json is the receipt of the download and not part of the model.
    files = sorted(path for pattern in SETTINGS for path in folder.glob(pattern) if path.name != "asset.json")
    return sha256_text("\n".join(f"{path.name} {sha256_file(path)}" for path in files))
