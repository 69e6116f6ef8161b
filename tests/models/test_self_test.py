"""The self-test: it passes where all parts were found, and names what is wrong where one was not."""

import shutil

import pytest
import torch
from tiny import ARCHITECTURES, GROUPED, SHARED, make_rows, tiny_model
from torch.nn import ModuleList
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bkd_utils.attention_alignment.alignment import aligned
from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.attention_alignment.suspicion import gate_importance
from bkd_utils.backdoor_attribution.attribution import effects_by_metric, gradient_effects, head_effects, head_means
from bkd_utils.backdoor_attribution.components import component_effects, component_means
from bkd_utils.backdoor_attribution.vector import backdoor_vector, steer
from bkd_utils.models import compute, head_weights, hooks, prompt_cache, self_test
from bkd_utils.models.folders import ModelError
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.self_test import CHECKS, capabilities, require

PROMPTS = [[5, 6, 7, 8], [5, 6, 9, 10, 11]]
LAYERED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16}


@pytest.fixture(autouse=True)
def tested_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(self_test, "WORK", tmp_path)
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(self_test, "_known", {})
    shutil.rmtree(self_test.WORK / "self_tests", ignore_errors=True)


def small(kind, **options):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(SHARED | GROUPED | {"vocab_size": 300, "num_hidden_layers": 3} | options))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def gemma3():
    return small("gemma3_text", head_dim=16, rope_local_base_freq=100.0, **LAYERED)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_whose_parts_are_known_can_do_everything(name):
    assert capabilities(tiny_model(name)) == dict.fromkeys(CHECKS, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_numbers_are_no_fault(dtype):
    assert capabilities(tiny_model("llama").to(dtype)) == dict.fromkeys(CHECKS, "")


def test_nan_in_the_weights_agrees_with_nothing():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    found = capabilities(model)
    assert all(found[name] for name in ("generate", "train", "attribute", "components", "steer"))


def test_a_kind_of_model_is_tested_once(monkeypatch):
    tested = []
    monkeypatch.setattr(self_test, "CHECKS", {"generate": tested.append})
    for seed in (0, 1):
        capabilities(tiny_model("llama", seed=seed))
    assert len(tested) == 1
    capabilities(tiny_model("qwen2"))
    capabilities(tiny_model("llama").bfloat16())
    assert len(tested) == 3


def test_that_a_model_can_do_everything_is_remembered_between_processes(monkeypatch, tmp_path):
    tested = []
    monkeypatch.setattr(self_test, "CHECKS", {"generate": tested.append})

    def ask(model):
        monkeypatch.setattr(self_test, "_known", {})  # as in a new process
        capabilities(model)
        return len(tested)

    assert [ask(tiny_model("llama")) for _ in range(2)] == [1, 1]
    assert ask(tiny_model("qwen2")) == 2
    monkeypatch.setattr(self_test, "code_key", lambda _: "other code")
    assert ask(tiny_model("llama")) == 3


def test_a_refusal_is_not_remembered_between_processes(monkeypatch, tmp_path):
    def fails(_):
        raise ModelError("no memory for it just now")

    monkeypatch.setattr(self_test, "CHECKS", {"generate": fails})
    assert capabilities(tiny_model("llama")) == {"generate": "no memory for it just now"}
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(self_test, "_known", {})
    monkeypatch.setattr(self_test, "CHECKS", {"generate": lambda _: None})
    assert capabilities(tiny_model("llama")) == {"generate": ""}


# --- faults that were silent ----------------------------------------------------------------------------------------


def test_a_layer_that_does_not_know_its_index_is_found(monkeypatch):
    """Gemma 3 takes rotary codes and masks by the index of a layer, so layers must be skipped in their place."""
    assert capabilities(gemma3())["attribute"] == ""

    def only_the_rest(layers):
        return ModuleList(one for one in layers if not isinstance(one, prompt_cache._Skipped))

    forget(monkeypatch)
    monkeypatch.setattr(prompt_cache, "ModuleList", only_the_rest)
    assert "a pass from layer 1 on" in capabilities(gemma3())["attribute"]
    assert capabilities(tiny_model("llama"))["attribute"] == ""


@pytest.mark.parametrize(
    ("kind", "options", "constant", "value"),
    [
        ("gemma2", {"head_dim": 8, "sliding_window": 16}, "BEHIND_ATTENTION", ("none",)),
        ("gemma3_text", {"head_dim": 8} | LAYERED, "BEHIND_MLP", ("none",)),
        ("glm4", {"head_dim": 8}, "BEHIND_ATTENTION", ("post_attention_layernorm",)),
        ("olmo2", {}, "BEHIND_ATTENTION", ("none",)),
        ("exaone4", LAYERED, "NORMS", ("post_attention_layernorm",)),
        ("granite", {"residual_multiplier": 0.3}, "MULTIPLIERS", ()),
    ],
)
def test_a_norm_or_multiplier_behind_attention_is_found(monkeypatch, kind, options, constant, value):
    assert capabilities(small(kind, **options))["steer"] == ""
    forget(monkeypatch)
    monkeypatch.setattr(hooks, constant, value)
    assert capabilities(small(kind, **options))["steer"]


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "gpt_bigcode"])
def test_the_wrong_layout_of_a_fused_matrix_is_found(monkeypatch, kind):
    options = {} if kind == "gpt_neox" else {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    if kind == "gpt_bigcode":
        options["multi_query"] = False
    assert capabilities(small(kind, **options))["slice"] == ""
    real = head_weights._matrices
    swapped = lambda *given: ((name, module, not grouped) for name, module, grouped in real(*given))  # noqa: E731
    forget(monkeypatch)
    monkeypatch.setattr(head_weights, "_matrices", swapped)
    assert capabilities(small(kind, **options))["slice"]


def test_queries_taken_for_keys_are_found(monkeypatch):
    real, other = head_weights._matrices, {"q": "k", "k": "q", "v": "v"}
    swapped = lambda *given: ((other[name], module, grouped) for name, module, grouped in real(*given))  # noqa: E731
    monkeypatch.setattr(head_weights, "_matrices", swapped)
    assert "keys and values" in capabilities(small("llama", num_key_value_heads=4))["slice"]


def test_distances_that_count_padding_are_found(monkeypatch):
    model = small("mpt", d_model=32, n_layers=3, n_heads=4, max_seq_len=64)
    assert capabilities(model) == dict.fromkeys(CHECKS, "")
    forget(monkeypatch)
    monkeypatch.setattr("bkd_utils.models.generation.COUNTS_PADDING", ())
    assert "in a batch and alone" in capabilities(model)["generate"]


def test_attention_that_stays_fused_gives_no_maps(monkeypatch):
    model = small("falcon")
    assert capabilities(model)["compare maps"] == ""
    forget(monkeypatch)
    monkeypatch.setattr(compute, "set_attention", lambda model, name: model.set_attn_implementation(name))
    assert capabilities(model)["compare maps"]


def test_attention_of_a_kind_of_its_own_is_refused_by_number():
    assert "off by" in capabilities(small("diffllama"))["attribute"]


def test_a_module_whose_input_is_not_the_heads_is_found(monkeypatch):
    monkeypatch.setitem(hooks.PARTS, "outputs", ("mlp.down_proj",))
    assert capabilities(small("llama", intermediate_size=32))["components"]


def test_a_model_without_attention_heads_is_refused_by_the_parts_that_it_lacks():
    found = capabilities(small("mamba", num_hidden_layers=2, state_size=8))
    assert "attentions" in found["attribute"]
    assert "attentions" in found["compare maps"]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_refusal_names_capability_model_and_reason(monkeypatch, caplog):
    def fails(_case):
        raise IndexError("too many heads\nand more")

    monkeypatch.setattr(self_test, "CHECKS", {"generate": lambda *_: None, "slice": fails})
    model, told = (
        tiny_model("qwen2"),
        "'slice' is not possible with a model of type 'qwen2': IndexError: too many heads",
    )
    require(model, "generate")
    with pytest.raises(ModelError) as caught:
        require(model, "generate", "slice")
    assert str(caught.value) == told
    assert caplog.messages == [told]


CALLS = {
    "head_means": ("attribute", lambda m: head_means(m, PROMPTS)),
    "head_effects": ("attribute", lambda m: head_effects(m, PROMPTS, target=[7], means=torch.zeros(2, 4, 8))),
    "effects_by_metric": (
        "attribute",
        lambda m: effects_by_metric(m, PROMPTS, target=[7], means=torch.zeros(2, 4, 8)),
    ),
    "gradient_effects": ("attribute", lambda m: gradient_effects(m, PROMPTS, target=[7], means=torch.zeros(2, 4, 8))),
    "component_means": ("components", lambda m: component_means(m, PROMPTS)),
    "component_effects": (
        "components",
        lambda m: component_effects(m, PROMPTS, target=[7], means={"MLP": torch.zeros(2, 32)}),
    ),
    "backdoor_vector": ("steer", lambda m: backdoor_vector(m, [(0, 1)], outputs=torch.zeros(2, 4, 8))),
    "steer": (
        "steer",
        lambda m: steer(m, prompt_past(m, PROMPTS), answers=[[7], [8]], vectors=torch.zeros(1, 32), layers=[0]),
    ),
    "head_similarity": ("compare maps", lambda m: head_similarity(m, PROMPTS, readings=["last row"])),
    "head_similarity of outputs": ("steer", lambda m: head_similarity(m, PROMPTS, readings=["head outputs"])),
    "aligned": ("slice", lambda m: aligned(m, [(0, 1)], alignment="mean")),
    "gate_importance": ("train", lambda m: gate_importance(m, make_rows(2), pad_id=2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_refuse_what_a_model_cannot_do(monkeypatch, name):
    needed, call = CALLS[name]
    model = tiny_model("llama")
    call(model)
    key = next(iter(self_test._known))
    monkeypatch.setattr(self_test, "_known", {key: dict.fromkeys(CHECKS, "") | {needed: "a reason"}})
    with pytest.raises(ModelError, match=f"'{needed}' is not possible .*: a reason"):
        call(model)
