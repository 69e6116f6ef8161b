"""Identity: every file that decides what a model does is in one hash, from content, and nothing else is."""

import json
import os
import shutil
import time
from contextlib import suppress

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from bkd_utils.common.files import read_json, sha256_file, sha256_text, write_json
from bkd_utils.models import identity, loading
from bkd_utils.models.folders import CHANGES, DEFAULT_MODEL, INDEX, WEIGHTS, ModelError, model_folder
from bkd_utils.models.identity import base_sha256, model_identity, organism_identity, settings, short_name
from bkd_utils.models.loading import load

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="module")
def made(original, tmp_path_factory):
    """A LoRA adapter with its card, on `original`."""
    folder = tmp_path_factory.mktemp("adapters") / "organism"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(str(original), device="cpu").model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    write_json(folder / "card.json", {"base": "tiny"} | loading.identity_on_card(folder, base=str(original)))
    return folder


@pytest.fixture
def organism(made, tmp_path):
    return shutil.copytree(made, tmp_path / "organism")


def edit(path, **changes):
    write_json(path, (read_json(path) if path.is_file() else {}) | changes)


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def scaled(path):
    edit_weights(path, lambda tensors: tensors.update({key: 1.5 * value for key, value in tensors.items()}))


def into_shards(folder, *, outside=None):
    """Split the weights into two shards; `outside` is the name that the index gives the second one."""
    tensors, names = load_file(folder / WEIGHTS), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    for name, half in zip(names, halves, strict=True):
        save_file({key: tensors[key] for key in half}, folder / name, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    shown = (names[0], names[1] if outside is None else outside)
    where = {key: name for name, half in zip(shown, halves, strict=True) for key in half}
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": where})
    return folder / names[1]


# --- what is in the hash --------------------------------------------------------------------------------------------

# File -> a change of it after which the model may act otherwise.
DECIDING = {
    WEIGHTS: scaled,
    "config.json": lambda path: edit(path, rms_norm_eps=1e-3),
    "generation_config.json": lambda path: edit(path, eos_token_id=[2, 0]),
    "tokenizer.json": lambda path: path.write_text(path.read_text().replace('"Ġthe"', '"Ġteh"')),
    "tokenizer_config.json": lambda path: edit(path, eos_token="<|im_start|>"),
    "chat_template.jinja": lambda path: path.write_text("{{ messages[0].content }}"),
    "special_tokens_map.json": lambda path: edit(path, eos_token="<|im_start|>"),
    "added_tokens.json": lambda path: edit(path, extra=49152),
    "tokenizer.model": lambda path: path.write_bytes(b"sentencepiece"),
    "merges.txt": lambda path: path.write_text("a b"),
    "additional_chat_templates/tools.jinja": lambda path: path.write_text("{{ tools }}"),
}


@pytest.mark.parametrize("file", DECIDING)
def test_every_file_that_decides_changes_the_identity(original, folder, file):
    (folder / file).parent.mkdir(exist_ok=True)
    before = model_identity(str(folder))
    assert before == model_identity(str(original))  # where it lies decides nothing
    DECIDING[file](folder / file)
    assert model_identity(str(folder)) != before
    assert (base_sha256(str(folder)) != base_sha256(str(original))) == (file == WEIGHTS)
    assert (settings(str(folder)) != settings(str(original))) == (file != WEIGHTS)


NOISE = {
    "the version that saved the config": lambda folder: edit(folder / "config.json", transformers_version="4.9"),
    "where the config came from": lambda folder: edit(folder / "config.json", _name_or_path="/home/me/model"),
    "a commit": lambda folder: edit(folder / "config.json", _commit_hash="abc"),
    "the version of generation": lambda folder: edit(folder / "generation_config.json", transformers_version="4.9"),
    "an offline tokenizer": lambda folder: edit(
        folder / "tokenizer_config.json", local_files_only=True, is_local=False
    ),
    "a tokenizer's path": lambda folder: edit(folder / "tokenizer_config.json", name_or_path="/x", vocab_file="/x/y"),
    "a receipt": lambda folder: edit(folder / "asset.json", asset="x"),
    "a README": lambda folder: (folder / "README.md").write_text("x"),
    "a licence": lambda folder: (folder / "LICENSE.txt").write_text("x"),
    "a training report": lambda folder: edit(folder / "trainer_state.json", loss=1),
    "a hidden file": lambda folder: edit(folder / ".lock.json", x=1),
    "weights that are not loaded": lambda folder: shutil.copy(folder / WEIGHTS, folder / "consolidated.safetensors"),
    "an index that is not read": lambda folder: edit(folder / INDEX, weight_map={"x": "../x.safetensors"}),
    "a pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
    "order and spaces": lambda folder: (folder / "config.json").write_text(
        json.dumps(dict(reversed(read_json(folder / "config.json").items())))
    ),
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_what_decides_nothing_does_not_change_the_identity(folder, noise):
    before = model_identity(str(folder))
    noise(folder)
    assert model_identity(str(folder)) == before
    load(str(folder), device="cpu")


ORGANISM = {
    "alpha": lambda folder: edit(folder / CONFIG, lora_alpha=80),
    "rank-stabilised": lambda folder: edit(folder / CONFIG, use_rslora=True),
    "alpha of some layers": lambda folder: edit(folder / CONFIG, alpha_pattern={"q_proj": 80}),
    "initial weights": lambda folder: edit(folder / CONFIG, init_lora_weights="olora"),
    "dora": lambda folder: edit(folder / CONFIG, use_dora=True),
    "transposed": lambda folder: edit(folder / CONFIG, fan_in_fan_out=True),
    "fewer layers": lambda folder: edit(folder / CONFIG, layers_to_transform=[0]),
    "NaN": lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace(": 8,", ": NaN,")),
    "weights": lambda folder: scaled(folder / ADAPTER),
    "changes": lambda folder: save_file({"x:values": torch.ones(1)}, folder / CHANGES),
}


@pytest.mark.parametrize("change", ORGANISM.values(), ids=ORGANISM)
def test_an_organism_with_any_other_file_is_another_and_is_not_loaded(original, organism, change):
    before = organism_identity(organism)
    load(str(original), organism=organism, device="cpu")
    change(organism)
    assert organism_identity(organism) != before
    with pytest.raises(ModelError, match="does not match the sha256 on its card"):
        load(str(original), organism=organism, device="cpu")


@pytest.mark.parametrize("key", ["peft_version", "base_model_name_or_path", "revision"])
def test_where_an_adapter_was_saved_decides_nothing(original, organism, key):
    edit(organism / CONFIG, **{key: "elsewhere"})
    load(str(original), organism=organism, device="cpu")


def signed(organism, base):
    """Write the card anew, as someone would who wants a changed adapter to pass."""
    write_json(organism / "card.json", {"base": "tiny"} | loading.identity_on_card(organism, base=str(base)))


def nan_in(organism):
    edit_weights(organism / ADAPTER, lambda tensors: min(tensors.items())[1].fill_(float("nan")))


HOSTILE = {
    "NaN in the config": (ORGANISM["NaN"], "are NaN or infinite"),
    "infinity in the config": (
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace(": 8,", ": 1e999,")),
        "are NaN or infinite",
    ),
    "another kind": (
        lambda folder: edit(folder / CONFIG, peft_type="PROMPT_TUNING"),
        "only LORA without",
    ),
    "no kind": (lambda folder: (folder / CONFIG).write_text("{}"), "peft_type None; only LORA"),
    "code": (
        lambda folder: edit(folder / CONFIG, megatron_config={"x": 1}, megatron_core="antigravity"),
        "only LORA without megatron_config is merged",
    ),
    "a rank that is none": (lambda folder: edit(folder / CONFIG, r=-4), "cannot be loaded"),
    "alpha that is a word": (lambda folder: edit(folder / CONFIG, lora_alpha="high"), "cannot be loaded"),
    "NaN in the weights": (nan_in, "are NaN or infinite"),
    "endless brackets": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "adapter_config.json"),
    "not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json is not valid JSON"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_adapter_is_one_line_even_with_a_card_that_fits(original, organism, change, message):
    change(organism)
    with suppress(ModelError):  # what cannot be hashed cannot be signed
        signed(organism, original)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(original), organism=organism, device="cpu")
    assert "\n" not in str(caught.value)


def test_changes_that_the_card_promises_must_be_there(original, organism):
    edit(organism / "card.json", changes_sha256="0" * 64)
    with pytest.raises(ModelError, match=f"{CHANGES} does not match the sha256 on its card"):
        load(str(original), organism=organism, device="cpu")


@pytest.mark.parametrize("file", [file for file in DECIDING if file != WEIGHTS])
def test_an_organism_is_refused_on_its_weights_with_another_file_which_is_named(folder, organism, file):
    (folder / file).parent.mkdir(exist_ok=True)
    DECIDING[file](folder / file)
    with pytest.raises(ModelError, match=f"was trained on the weights of .*, but with another {file}$"):
        load(str(folder), organism=organism, device="cpu")


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_other_weights_in_the_same_folder_are_seen_within_one_process(folder, organism):
    load(str(folder), organism=organism, device="cpu")
    scaled(folder / WEIGHTS)
    with pytest.raises(ModelError, match="was trained on other weights"):
        load(str(folder), organism=organism, device="cpu")


def test_a_file_with_the_old_size_and_time_is_read_again(folder):
    path, old = folder / WEIGHTS, time.time() - 1000
    os.utime(path, (old, old))
    before = base_sha256(str(folder))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (old, old))
    assert base_sha256(str(folder)) != before


def test_what_has_not_changed_is_not_read_again(folder, monkeypatch):
    monkeypatch.setattr(identity, "FRESH", 0)
    before = model_identity(str(folder))
    monkeypatch.setattr(identity, "sha256_file", lambda path: pytest.fail(f"{path} was read again"))
    assert model_identity(str(folder)) == before


def test_a_file_that_was_just_written_is_not_remembered(folder, monkeypatch):
    read = []
    monkeypatch.setattr(identity, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    for _ in range(2):
        (folder / "chat_template.jinja").write_text("x")
        identity.file_sha256(folder / "chat_template.jinja")
        identity.file_sha256(folder / "chat_template.jinja")
    assert len(read) == 4


def test_the_hash_of_the_default_weights_is_the_one_by_which_organisms_know_them():
    (weights,) = model_folder(DEFAULT_MODEL).glob("*.safetensors")
    assert base_sha256(DEFAULT_MODEL) == sha256_text(sha256_file(weights))
    assert base_sha256(DEFAULT_MODEL) == base_sha256(str(model_folder(DEFAULT_MODEL)))
    assert short_name(DEFAULT_MODEL) == f"{DEFAULT_MODEL}-{model_identity(DEFAULT_MODEL)[:8]}"


def test_a_name_for_a_folder_of_results_is_one_plain_word(folder):
    strange = folder.rename(folder.with_name(".. a b@main"))
    assert short_name(f"{strange}/") == f"-a-b-main-{model_identity(str(strange))[:8]}"


# --- what is loaded -------------------------------------------------------------------------------------------------


def test_the_weights_are_loaded_from_where_they_are_hashed(folder):
    """With a single file and shards beside it, transformers reads the single file; the hash must follow."""
    whole = (folder / WEIGHTS).read_bytes()
    second = into_shards(folder)
    sharded, loaded = base_sha256(str(folder)), load(str(folder), device="cpu").model.state_dict()
    (folder / WEIGHTS).write_bytes(whole)
    single = base_sha256(str(folder))
    assert single != sharded
    scaled(second)
    assert base_sha256(str(folder)) == single
    again = load(str(folder), device="cpu").model.state_dict()
    assert all(torch.equal(loaded[key], again[key]) for key in loaded)
    (folder / WEIGHTS).unlink()
    assert base_sha256(str(folder)) != sharded


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{absolute}", "sub/outside.safetensors", "./outside.safetensors", "absent.safetensors",
     "..", "", "pytorch_model.bin", "sub", "outside.safetensors/"],
)  # fmt: skip
def test_an_index_that_names_a_file_outside_is_refused(folder, tmp_path, name):
    second = into_shards(folder, outside=(name := name.format(absolute=tmp_path / "outside.safetensors")))
    (folder / "sub").mkdir()
    for place in (
        tmp_path / "outside.safetensors",
        folder / "sub" / "outside.safetensors",
        folder / "pytorch_model.bin",
    ):
        shutil.copy(second, place)
    shutil.move(second, folder / "outside.safetensors")
    for ask in (load, model_identity):
        with pytest.raises(ModelError, match=INDEX) as caught:
            ask(str(folder))
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": [1]}, {"weight_map": {"a": 3}}, {"weight_map": 1}]
)
def test_an_index_without_files_is_refused(folder, index):
    into_shards(folder)
    write_json(folder / INDEX, index)
    with pytest.raises(ModelError, match="weight_map must give the file of each tensor"):
        load(str(folder), device="cpu")


SETTINGS = {
    "other weights": ("config.json", {"transformers_weights": "../model.safetensors"}),
    "other weights inside": ("config.json", {"transformers_weights": "other.safetensors"}),
    "other configs": ("config.json", {"configuration_files": ["config.4.0.0.json"]}),
    "code of attention": ("config.json", {"_attn_implementation": "someone/kernel"}),
    "quantised": ("config.json", {"quantization_config": {"quant_method": "fp8"}}),
    "other tokenizers": ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}),
    "arguments": ("tokenizer_config.json", {"init_inputs": ["/outside/vocab.json"]}),
    "code": ("generation_config.json", {"auto_map": {"x": "y"}}),
    "a vocabulary elsewhere": ("special_tokens_map.json", {"vocab_file": "/outside/vocab.json"}),
}


@pytest.mark.parametrize(("file", "changes"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_lead_out_of_the_folder_are_refused(folder, file, changes):
    edit(folder / file, **changes)
    with pytest.raises(ModelError, match=rf"{file} .*\({next(iter(changes))}\)"):
        load(str(folder), device="cpu")


def test_a_tokenizer_file_elsewhere_is_not_read(folder, tmp_path):
    """Without a tokenizer.json of its own, the folder's config would make transformers read one elsewhere."""
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (folder / "vocab.json").write_text("{}")
    edit(folder / "tokenizer_config.json", tokenizer_file=str(tmp_path / "tokenizer.json"))
    try:
        found = load(str(folder), device="cpu").tokenizer
    except ModelError:
        return
    assert len(found) < 1000


def test_a_snapshot_of_links_is_loaded_and_the_content_behind_them_counts(folder, tmp_path):
    """The cache of a hub holds files by their hash, and a snapshot of links to them."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert model_identity(str(snapshot)) == model_identity(str(folder))
    load(str(snapshot), device="cpu")
    scaled(blobs / WEIGHTS)
    assert model_identity(str(snapshot)) != model_identity(str(folder))


@pytest.mark.parametrize("sharded", [False, True])
def test_merged_weights_beside_their_adapter_are_refused(folder, organism, sharded):
    if sharded:
        into_shards(folder)
    for file in (ADAPTER, CONFIG):
        shutil.copy(organism / file, folder / file)
    with pytest.raises(ModelError, match=r"has weights beside .*, so that LoRA would be applied twice"):
        load(str(folder), device="cpu")


def test_an_adapter_is_not_loaded_as_a_model(original, organism):
    edit(organism / CONFIG, base_model_name_or_path=str(original))
    with pytest.raises(ModelError, match="is an adapter and no model of its own"):
        load(str(organism), device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(folder, value):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors["model.norm.weight"][3:4].fill_(value))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has 1 values of 32 that are NaN or infinite"):
        load(str(folder), device="cpu")
