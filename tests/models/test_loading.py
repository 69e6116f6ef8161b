"""Models: what is loaded is exactly what lies in the folder, and folders that cannot be trusted are refused by name."""

import json
import shutil
import struct

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, save_tiny, tiny_model

from bkd_utils.common.files import read_json, write_json
from bkd_utils.models import folders, loading
from bkd_utils.models.folders import DEFAULT_MODEL, REGISTRY, ModelError
from bkd_utils.models.identity import base_sha256, model_identity
from bkd_utils.models.loading import load, plain_copy

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
IDS = torch.tensor([[1, 50, 600, 7000, 3]])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def folder(original, tmp_path):
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "damaged")


def edit_json(path, **changes):
    write_json(path, read_json(path) | changes)


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, match):
    with pytest.raises(ModelError, match=match) as caught:
        load(str(folder), device="cpu")
    assert folder.name in str(caught.value)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_local_folder_is_loaded_as_it_is(tmp_path, architecture):
    folder = save_tiny(tmp_path / architecture, architecture)
    loaded = load(str(folder), device="cpu")
    assert loaded.organism is None
    assert loaded.device.type == "cpu"
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    state, saved = loaded.model.state_dict(), tiny_model(architecture).state_dict()
    assert [name for name in saved.keys() | state.keys() if not torch.equal(state[name], saved[name])] == []


def test_the_default_model_is_there_without_a_network():
    assert base_sha256(DEFAULT_MODEL) == base_sha256(str(folders.model_folder(DEFAULT_MODEL)))
    assert loading.load_tokenizer(DEFAULT_MODEL).eos_token == "<|im_end|>"


def test_an_unknown_address_lists_the_known_ones(tmp_path):
    for address in ("smollm", str(tmp_path / "absent"), "a/b/c", "./here/it"):
        with pytest.raises(ModelError) as caught:
            load(address, device="cpu")
        assert repr(address) in str(caught.value)
        assert all(known in str(caught.value) for known in REGISTRY)


def test_a_hub_model_without_a_network_is_an_error_that_names_it():
    with pytest.raises(ModelError, match="could not get 'nobody/nothing@main' from the hub"):
        load("nobody/nothing@main", device="cpu")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ModelError, match=f"device '{device}' is not available"):
        loading.pick_device(device)


def test_auto_picks_a_device_that_is_there():
    assert loading.pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_no_product_is_shortened_to_tf32_whatever_was_set_before(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    loading.pick_device(device)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_a_plain_copy_is_eager_and_independent(original):
    model = load(str(original), device="cpu").model
    twin = plain_copy(model)
    assert twin.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    before = model(IDS).logits
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model(IDS).logits, before)


# --- folders that are refused ---------------------------------------------------------------------------------------


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


@pytest.mark.parametrize("data", [b"{", b"\x80", b"[1, 2"])
def test_a_config_that_is_not_json(folder, data):
    (folder / "config.json").write_bytes(data)
    refused(folder, "config.json is not valid JSON")


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_pickled_weights_only(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    refused(folder, r"only pickled weights \(pytorch_model.bin\), which can run code")


def test_a_pickle_beside_sound_weights_is_not_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load(str(folder), device="cpu")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "has no weights")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code(folder, file):
    edit_json(folder / file, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('this ran')\n")
    refused(folder, f"{file} asks for remote code")


@pytest.mark.parametrize("architectures", [["BertForSequenceClassification"], ["LlamaModel"], [], None])
def test_not_a_causal_language_model(folder, architectures):
    edit_json(folder / "config.json", architectures=architectures)
    refused(folder, "not a causal language model")


@pytest.mark.parametrize("kept", [0, 4, 8, 300, 0.5, -1])
def test_truncated_weights(folder, kept):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else kept])
    refused(folder, f"{WEIGHTS} is not a sound safetensors file")


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


F32 = {"dtype": "F32", "shape": [4]}
HOSTILE = {
    "oversized header": struct.pack("<Q", 1 << 62) + b"{}",
    "header longer than the file": struct.pack("<Q", 5000) + b"{}",
    "garbage": bytes(range(256)) * 20,
    "a pickle": b"\x80\x04\x95" + b"\x00" * 200,
    "header is not JSON": struct.pack("<Q", 8) + b"not json",
    "overlapping tensors": header({"a": F32 | {"data_offsets": [0, 16]}, "b": F32 | {"data_offsets": [8, 24]}})
    + bytes(24),
    "offsets outside the file": header({"a": F32 | {"data_offsets": [0, 1 << 40]}}) + bytes(16),
    "shape against offsets": header({"a": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 16]}}) + bytes(16),
    "a hole": header({"a": F32 | {"data_offsets": [0, 16]}, "b": F32 | {"data_offsets": [32, 48]}}) + bytes(48),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_weights(folder, data):
    (folder / WEIGHTS).write_bytes(data)
    refused(folder, f"{WEIGHTS} is not a sound safetensors file")


def test_a_missing_tensor(folder):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
    refused(folder, r"missing keys: .*layers.1.self_attn.o_proj.weight.* \(1 in all\)")


def test_an_unexpected_tensor(folder):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.update({"model.layers.1.extra.weight": torch.ones(2)}))
    refused(folder, "unexpected keys: .*layers.1.extra.weight")


def test_a_misshapen_tensor(folder):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    refused(folder, r"mismatched.*model.norm.weight")


def test_a_shard_that_is_not_there(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    refused(folder, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[1]", '{"a'])
def test_json_that_is_broken_or_no_object(folder, file, text):
    (folder / file).write_text(text)
    refused(folder, folder.name)


@pytest.mark.parametrize(("key", "named"), [("model_type", "no-such"), ("num_attention_heads", "num_attention_heads")])
def test_a_config_that_transformers_cannot_use(folder, key, named):
    edit_json(folder / "config.json", **{key: "no-such"})
    refused(folder, named)


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(original, tmp_path_factory):
    """A LoRA adapter made with peft alone, its card, and the logits of the unmerged model."""
    folder = tmp_path_factory.mktemp("adapters") / "organism"
    folder.mkdir()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(str(original), device="cpu").model, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    write_card(folder, original)
    with torch.inference_mode():
        return folder, model(IDS).logits


def write_card(folder, base):
    write_json(folder / "card.json", {"base": "tiny"} | loading.identity_on_card(folder, base=str(base)))


@pytest.fixture
def damaged(adapter, tmp_path):
    return shutil.copytree(adapter[0], tmp_path / "organism")


def adapter_refused(original, folder, match):
    with pytest.raises(ModelError, match=match):
        load(str(original), organism=folder, device="cpu")


def test_a_merged_adapter_gives_the_logits_of_the_unmerged_one(original, adapter):
    folder, expected = adapter
    loaded = load(str(original), organism=folder, device="cpu")
    assert loading.adapter_folder(loaded.organism) == folder  # a stage that loads it again finds this folder
    assert not any("lora" in name for name, _ in loaded.model.named_modules())
    with torch.inference_mode():
        merged, base = loaded.model(IDS).logits, load(str(original), device="cpu").model(IDS).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert (merged - base).abs().max() > 0.1


def test_an_organism_is_found_by_name_in_both_places(original, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setattr(loading, "WORK", tmp_path / "work")
    shutil.copytree(adapter[0], tmp_path / "adapters" / "shipped")
    shutil.copytree(adapter[0], tmp_path / "work" / "organisms" / "made-here")
    for name in ("shipped", "made-here"):
        assert load(str(original), organism=name, device="cpu").organism == name
    assert loading.shipped_organisms() == ["shipped"]
    assert loading.shipped_organisms(base=model_identity(str(original))) == ["shipped"]
    assert loading.shipped_organisms(base="0" * 64) == []


def test_an_unknown_organism_lists_the_shipped_ones(original, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "ADAPTERS", tmp_path)
    adapter_refused(original, "no-such", "unknown organism 'no-such', neither in .*; shipped: none")
    shutil.copytree(adapter[0], tmp_path / "shipped")
    adapter_refused(original, "no-such", "unknown organism 'no-such', neither in .*; shipped: shipped")


def test_an_adapter_whose_hash_is_not_on_its_card(original, damaged):
    edit_json(damaged / "card.json", adapter_sha256="0" * 64)
    adapter_refused(original, damaged, "does not match the sha256 on its card")


def test_an_adapter_of_another_base(tmp_path, damaged):
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    adapter_refused(other, damaged, r"organism was trained on other weights than those loaded \(tiny\)")


def test_an_adapter_without_weights(original, damaged):
    (damaged / ADAPTER).unlink()
    adapter_refused(original, damaged, f"has no {ADAPTER}")


def test_pickled_adapter_weights_are_not_looked_for(original, damaged):
    torch.save(load_file(damaged / ADAPTER), damaged / "adapter_model.bin")
    (damaged / ADAPTER).unlink()
    adapter_refused(original, damaged, f"has no {ADAPTER}")


@pytest.mark.parametrize("kept", [0, 7, 100, 2000])
def test_a_truncated_adapter(original, damaged, kept):
    (damaged / ADAPTER).write_bytes((damaged / ADAPTER).read_bytes()[:kept])
    adapter_refused(original, damaged, "not a sound safetensors file")


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CHANGES = {
    "missing": lambda tensors: tensors.pop(NAME),
    "extra": lambda tensors: tensors.update({NAME.replace("layers.0", "layers.7"): torch.ones(4, 32)}),
    "misshapen": lambda tensors: tensors.update({NAME: torch.ones(3, 32)}),
    "transposed": lambda tensors: tensors.update({NAME: torch.ones(32, 4)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_adapter_with_one_wrong_tensor(original, damaged, change):
    edit_weights(damaged / ADAPTER, change)
    write_card(damaged, original)
    adapter_refused(original, damaged, r"1 tensors are missing, unexpected or misshapen, e.g. base_model.*q_proj")


def test_a_card_that_is_not_json(original, damaged):
    (damaged / "card.json").write_text("{")
    adapter_refused(original, damaged, "card.json is not valid JSON")


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"peft_type": "LORA", "r": 4, "target_modules": ["no-such"]}'])
def test_an_adapter_config_that_peft_cannot_use(original, damaged, text):
    (damaged / "adapter_config.json").unlink()
    if text is not None:
        (damaged / "adapter_config.json").write_text(text)
    adapter_refused(original, damaged, str(damaged))
