"""Addresses of models (a packaged name, a local folder or a hub id), and checks that a folder is a whole model, which
runs no code and makes nothing outside of it be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bkd_utils.common import assets
from bkd_utils.common.files import UserError, read_json

CHANGES = "changes.safetensors"  # beside an adapter: the weights that a treatment has changed
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# A model's files other than its weights. They are all that is fetched from a hub, and all that a model's hash covers.
SETTINGS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.codes", "*.tokenizer")
# Settings by which transformers would run code, or read other files than those that are hashed.
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
CODE = "asks for remote code"
OTHERS = "makes other files be read"
REFUSED = dict.fromkeys(("transformers_weights", "configuration_files", "fast_tokenizer_files", "init_inputs"), OTHERS)
REFUSED |= {"auto_map": CODE, "quantization_config": "is quantised, so that weights could be neither read nor merged"}
KERNELS = {f"{start}{what}_implementation" for start in ("", "_") for what in ("attn", "experts")}
DEFAULT_MODEL = "smollm2-135m-instruct"
# Ends of architectures' names: of classifiers, and of encoders that get a classifier by training.
ENDS = {"classifier": ("ForSequenceClassification",), "encoder": ("Model", "ForMaskedLM", "ForPreTraining")}
ENCODERS = ("bert", "distilbert", "electra", "roberta")  # types of models that count as encoders


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
    Entry("minilm-l6", "packaged", "22M parameters, 6 x 12 heads; an encoder, for classifiers that are trained here"),
    Entry("HuggingFaceTB/SmolLM2-135M-Instruct", "hub", "the same model in its original bf16 weights"),
    Entry("Qwen/Qwen2.5-0.5B-Instruct", "hub", "24 x 14 heads; a second family that still fits a laptop"),
    Entry("Qwen/Qwen2.5-7B-Instruct", "hub", "28 x 28 heads; one of BkdAttr's two models"),
    Entry("meta-llama/Llama-2-7b-chat-hf", "hub", "32 x 32 heads; BkdAttr's other model, gated"),
)
REGISTRY = {entry.address: entry for entry in ENTRIES}


def is_path(text: str) -> bool:
    """Is this written as a path? A bare name never is, and OWNER/NAME is a hub id unless it begins with `./`."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def model_folder(address: str) -> Path:
    """The local folder behind an address, fetched if need be. Raises ModelError when there is none. A packaged name is
    that model, whatever lies in the current folder; another bare name may be a local folder. OWNER/NAME is a hub id,
    and refused where it is a local folder as well."""
    if address in REGISTRY and REGISTRY[address].kind == "packaged":
        return assets.fetch(address)
    hub_id = address.count("/") == 1 and not is_path(address)
    if (folder := Path(address).expanduser()).is_dir() and address:
        if hub_id:
            raise ModelError(f"{address!r} is a hub id and a local folder; write ./{address} or {address}@main")
        return folder.resolve()
    if not hub_id:
        known = f"{', '.join(REGISTRY)}, or any hub id OWNER/NAME"
        raise ModelError(f"{address!r} is neither a folder ({folder.absolute()}) nor a known model; known: {known}")
    return _snapshot(address)


@cache  # one process sees one commit of a model, and asks the hub once
def _snapshot(address: str) -> Path:
    from huggingface_hub import snapshot_download  # only here: packaged models and folders need no hub client

    name, _, revision = address.partition("@")
    # Pickled weights and Python files are never downloaded, so they can never be loaded.
    patterns = ["*.safetensors", *SETTINGS]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(f"could not get {address!r} from the hub: {str(error).splitlines()[0]}") from error


def check_folder(folder: Path) -> None:
    """Raise ModelError for a folder without config, tokenizer or safetensors weights, for one that would run code or
    make anything outside of it be read, and for merged weights beside their adapter."""
    if (folder / "adapter_config.json").is_file():
        whole = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
        twice = "has weights beside adapter_config.json, so that LoRA would be applied twice; move one of them away"
        raise ModelError(f"{folder} {twice if whole else 'is an adapter and no model of its own'}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json")
    for path in filter(Path.is_file, map(folder.joinpath, CONFIGS)):
        check_settings(path)
    kind(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    for path in weight_files(folder):
        check_safetensors(path)


def kind(folder: Path) -> str:
    """Is a model "causal", a "classifier" or a bare "encoder", by its config? Raises ModelError for any other."""
    config = json_object(folder / "config.json")
    architectures = config.get("architectures")
    if any(end in str(architectures) for end in ("CausalLM", "LMHead")):
        return "causal"
    names = architectures if isinstance(architectures, list) and config.get("model_type") in ENCODERS else []
    for name, ends in ENDS.items():
        if len(names) == 1 and str(names[0]).endswith(ends):
            return name
    known = f"nor an encoder of a known type ({', '.join(ENCODERS)})"
    raise ModelError(f"{folder} is not a causal language model: architectures = {architectures}, {known}")


def check_settings(path: Path) -> None:
    """Raise ModelError for entries in `REFUSED`, and for those that name a kernel of a hub or a file elsewhere."""
    for key, value in json_object(path).items():
        why = CODE if key in KERNELS and "/" in str(value) else REFUSED.get(key)
        # In tokenizer_config.json such entries are common, and are left out on load; here they would be followed.
        if path.name == "special_tokens_map.json" and key.endswith("_file"):
            why = OTHERS
        if why and value:
            raise ModelError(f"{path} {why} ({key}), which is never done here")


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads weights from: `model.safetensors`, or else all shards of the index. ModelError
    where there are none, and for an index that names a file which is not in the folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    inside = {path.name for path in folder.iterdir() if path.is_file()}
    if INDEX not in inside:
        pickles = sorted(name for name in inside if name.endswith((".bin", ".pt", ".pth")))
        why = f"only pickled weights ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise ModelError(f"{folder} has {why}; save it with safetensors, as {WEIGHTS} or with {INDEX}")
    shards = json_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{folder / INDEX}: weight_map must give the file of each tensor")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if name not in inside or not name.endswith(".safetensors")]:
        raise ModelError(f"{folder / INDEX} names {outside[0]!r}, which is no safetensors file in this folder")
    return [folder / name for name in names]


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
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(str(error) if str(path) in str(error) else f"{path} cannot be read: {error}") from error
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
