"""Tiny random models of many architectures, and what is known of each without the package.

Every entry of `TABLE` says where a layer has its attention output matrix and how its output enters the residual stream.
All features of an architecture are switched on and matter: grouped heads, heads wider than the model's width divided by
their number, windows, logit softcaps, multipliers, biases, layers of unlike kinds.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from bkd_utils.common.assets import fetch

VOCABULARY = 1024  # the first entries of the packaged vocabulary, with the merges that lead to them
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL, WIDE = 6, 512  # attention windows: shorter than the prompts of the sweep, and longer
N_LAYERS = 3

# Given to every configuration that knows the name; an entry of the table overrides them.
SIZES = {
    "vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 48, "max_position_embeddings": 1024, "sliding_window": WIDE,
    "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_inner": 48, "n_positions": 1024, "n_ctx": 1024,
    "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "tie_word_embeddings": False, "ffn_dim": 48, "ffn_hidden_size": 48, "init_std": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What is known of an architecture without the package. Names of modules are those inside of a layer."""

    name: str
    model_type: str
    config: dict
    layers: str = "model.layers"
    attention: str = "self_attn"
    output: str | None = "self_attn.o_proj"  # the attention output matrix; None: no such matrix in every layer
    gain: str = ""  # the module whose output, times `multiplier`, the residual stream gains; empty: the output matrix
    after: str = "post_attention_layernorm"  # gets the stream after attention as it is; empty: only the layer's output
    mlp: str = "mlp"
    multiplier: float | tuple[float, ...] = 1.0  # one for all layers, or one for each
    heads: int = 4
    uneven: bool = False  # heads of layers differ in width or number
    limited: bool = False  # the prompts of the sweep are longer than what the model was made for, or than its window
    without: tuple[str, ...] = field(default=())  # names of SIZES that this configuration computes itself


def _entry(name: str, model_type: str = "", *, config: dict | None = None, **known) -> Architecture:
    return Architecture(name=name, model_type=model_type or name, config=config or {}, **known)


def _family(names: str, **known) -> list[Architecture]:
    return [_entry(name, **known) for name in names.split()]


def _windows(name: str, *, config: dict | None = None, model_type: str = "", **known) -> list[Architecture]:
    """One entry whose window is longer than all prompts, one whose window is shorter."""
    config, model_type = config or {}, model_type or name
    return [
        _entry(name, model_type, config=config, **known),
        _entry(f"{name}_small_window", model_type, config=config | {"sliding_window": SMALL}, limited=True, **known),
    ]


SANDWICH = {"gain": "post_attention_layernorm", "after": "pre_feedforward_layernorm"}
POST_NORM = {"gain": "post_attention_layernorm", "after": "mlp"}
PARALLEL = {"after": ""}
GPT = {"layers": "transformer.h", "attention": "attn", "output": "attn.c_proj", "after": "ln_2"}
OPT = {"output": "self_attn.out_proj", "after": "final_layer_norm", "mlp": ""}
NEOX = {"attention": "attention", "output": "attention.dense"}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16}
MLA = {"config": {"num_key_value_heads": 4}, "without": ("head_dim",)}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0}
HYBRID = {"output": None}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
FALCON = {
    "layers": "transformer.h", "attention": "self_attention", "output": "self_attention.dense",
    "without": ("head_dim",),
}  # fmt: skip

# fmt: off
TABLE = [
    _entry("llama", config={"attention_bias": True, "mlp_bias": True}),
    _entry(
        "llama3_rope",
        "llama",
        config={
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
            }
        },
    ),
    _entry(
        "llama_dynamic_rope",
        "llama",
        config={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
                "max_position_embeddings": 8},
        limited=True,
    ),
    _entry(
        "llama_yarn", "llama",
        config={"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                                    "original_max_position_embeddings": 8}},
    ),
    _entry("qwen2"),
    _entry(
        "qwen2_window", "qwen2",
        config={"use_sliding_window": True, "sliding_window": SMALL, "max_window_layers": 1},
        limited=True,
    ),
    _entry("qwen2_moe", config={"mlp_only_layers": [0]}),
    _entry("qwen3", config={"attention_bias": True}),
    _entry("qwen3_moe", config={"mlp_only_layers": [0]}),
    *_windows("mistral"),
    *_windows("mixtral"),
    *_windows("ministral", config={"layer_types": ALTERNATING}),
    *_family("ministral3 internlm3 iquestcoder arcee seed_oss nanochat ernie4_5 glm glm4_moe starcoder2"),
    _entry("smollm3", config={"no_rope_layer_interval": 2}),
    _entry("helium", config={"head_dim": 8}),
    _entry("gemma"),
    *_windows("gemma2", config={"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
                                "final_logit_softcapping": 5.0, "layer_types": ALTERNATING}, **SANDWICH),
    *_windows("gemma3_text", config={"num_hidden_layers": 4, "query_pre_attn_scalar": 20, "rope_parameters": BASES,
                                     "layer_types": [*ALTERNATING, "full_attention"]}, **SANDWICH),
    _entry(
        "gemma3n_text",
        config={"num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
        multiplier=0.5**0.5, **SANDWICH,
    ),
    *[
        _entry(
            name, "gemma4_text",
            config={"num_hidden_layers": 4, "head_dim": 12, "global_head_dim": 12, "num_kv_shared_layers": shared,
                    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
            without=("head_dim",), **SANDWICH,
        )
        for name, shared in (("gemma4_text", 0), ("gemma4_text_shared_cache", 2))
    ],
    _entry("gemma4_text_wide_global", "gemma4_text",
           config={"num_hidden_layers": 4, "head_dim": 12, "global_head_dim": 24, "num_kv_shared_layers": 0,
                   "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
                   "layer_types": ["sliding_attention", "full_attention"] * 2},
           uneven=True, without=("head_dim",), **SANDWICH),
    _entry("laguna_heads_per_layer", "laguna", config={"num_attention_heads_per_layer": [4, 2, 4]}, uneven=True),
    _entry("gemma4_text_keys_as_values", "gemma4_text",
           config={"num_hidden_layers": 4, "head_dim": 12, "global_head_dim": 12, "num_kv_shared_layers": 0,
                   "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
                   "attention_k_eq_v": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
           without=("head_dim",), **SANDWICH),
    _entry("vaultgemma", config={"query_pre_attn_scalar": 20}, after="pre_feedforward_layernorm"),
    _entry("phi", config={"qk_layernorm": False}, output="self_attn.dense", **PARALLEL),
    _entry("phi_qk_norm", "phi", config={"qk_layernorm": True}, output="self_attn.dense", **PARALLEL),
    *_windows("phi3"),
    _entry("phi3_longrope", "phi3",
           config={"original_max_position_embeddings": 8, "rope_parameters": {
               "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8,
               "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}},
           limited=True),
    _entry("phimoe", config={"attention_bias": True, "lm_head_bias": True}),
    _entry("gpt2", **GPT),
    _entry("gpt2_inverse_layer", "gpt2",
           config={"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, **GPT),
    _entry("gpt_bigcode_multi_query", "gpt_bigcode", config={"multi_query": True}, **GPT),
    _entry("gpt_bigcode", config={"multi_query": False}, **GPT),
    _entry("gpt_neo", config={"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
                              "window_size": WIDE},
           layers="transformer.h", attention="attn.attention", output="attn.attention.out_proj", after="ln_2",
           without=("num_hidden_layers", "num_attention_heads")),
    _entry("gpt_neo_small_window", "gpt_neo",
           config={"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
                   "window_size": SMALL},
           limited=True,
           layers="transformer.h", attention="attn.attention", output="attn.attention.out_proj", after="ln_2",
           without=("num_hidden_layers", "num_attention_heads")),
    _entry("gptj", config={"rotary_dim": 4}, layers="transformer.h", attention="attn", output="attn.out_proj",
           **PARALLEL),
    _entry("codegen", config={"rotary_dim": 4}, layers="transformer.h", attention="attn", output="attn.out_proj",
           **PARALLEL),
    _entry("gpt_neox", layers="gpt_neox.layers", **NEOX, **PARALLEL),
    _entry("gpt_neox_sequential", "gpt_neox", config={"use_parallel_residual": False},
           layers="gpt_neox.layers", **NEOX),
    _entry("gpt_neox_japanese", layers="gpt_neox_japanese.layers", **NEOX),
    _entry("bloom", layers="transformer.h", attention="self_attention", output="self_attention.dense"),
    _entry("bloom_post_residual", "bloom", config={"apply_residual_connection_post_layernorm": True},
           layers="transformer.h", attention="self_attention", output="self_attention.dense"),
    _entry("falcon_new_one_norm", "falcon", config={"new_decoder_architecture": True, "num_kv_heads": 2,
                                                    "num_ln_in_parallel_attn": 1}, **FALCON, **PARALLEL),
    _entry("falcon_multi_query", "falcon", config={"multi_query": True, "bias": True}, **FALCON, **PARALLEL),
    _entry("falcon_new", "falcon", config={"new_decoder_architecture": True, "num_kv_heads": 2}, **FALCON, **PARALLEL),
    _entry("falcon_alibi", "falcon",
           config={"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}, **FALCON),
    _entry("mpt", config={"d_model": 32, "n_layers": N_LAYERS, "n_heads": 4, "max_seq_len": 1024, "expansion_ratio": 2},
           layers="transformer.blocks", attention="attn", output="attn.out_proj", after="norm_2", mlp="ffn",
           without=("hidden_size", "num_hidden_layers", "num_attention_heads")),
    _entry("opt", config={"word_embed_proj_dim": 32}, layers="model.decoder.layers", **OPT),
    _entry("opt_post_norm", "opt", config={"word_embed_proj_dim": 16, "do_layer_norm_before": False},
           layers="model.decoder.layers", **OPT | {"after": "self_attn_layer_norm"}),
    _entry("xglm", config={"d_model": 32, "num_layers": N_LAYERS, "attention_heads": 4, "scale_embedding": True},
           layers="model.layers", **OPT, without=("hidden_size", "num_hidden_layers", "num_attention_heads")),
    _entry("biogpt", layers="biogpt.layers", **OPT),
    _entry("stablelm", config={"use_qkv_bias": True, "qk_layernorm": True}),
    _entry("stablelm_parallel", "stablelm", config={"use_parallel_residual": True}, **PARALLEL),
    _entry("olmo", config={"clip_qkv": 1.5}),
    _entry("olmo2", **POST_NORM),
    *_windows("olmo3", config={"layer_types": ALTERNATING}, **POST_NORM),
    _entry("olmoe", config={"clip_qkv": 1.5}),
    _entry("flex_olmo", **POST_NORM),
    _entry("cohere", config={"use_qk_norm": True, "logit_scale": 0.3}, **PARALLEL),
    *_windows("cohere2", config={"logit_scale": 0.3, "layer_types": ALTERNATING}, **PARALLEL),
    _entry("glm4", gain="post_self_attn_layernorm"),
    _entry("granite", config=GRANITE, multiplier=0.4),
    _entry("granitemoe", config=GRANITE, multiplier=0.4, mlp="block_sparse_moe"),
    _entry("granitemoeshared", config=GRANITE | {"shared_intermediate_size": 24}, multiplier=0.4, mlp=""),
    *_windows("granite_swa", config=GRANITE | {"layer_types": ALTERNATING}, multiplier=0.4),
    _entry("hyperclovax", config=GRANITE | {"use_post_norm": False}, multiplier=0.4),
    _entry("hyperclovax_post_norm", "hyperclovax", config=GRANITE | {"use_post_norm": True}, multiplier=0.4,
           gain="post_norm1"),
    *_windows("exaone4", config={"layer_types": ALTERNATING}, **POST_NORM),
    _entry("apertus", after="feedforward_layernorm"),
    _entry("hunyuan_v1_dense"),
    _entry("hunyuan_v1_moe", config={"moe_topk": 2}),
    _entry("jais2"),
    _entry("cwm", config={"layer_types": ALTERNATING}),
    _entry("nemotron", config={"partial_rotary_factor": 0.5}),
    _entry("persimmon", config={"qk_layernorm": True}, output="self_attn.dense"),
    _entry("dbrx", config={"d_model": 32, "n_heads": 4, "n_layers": N_LAYERS, "max_seq_len": 1024,
                           "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 100.0},
                           "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
           layers="transformer.blocks", attention="norm_attn_norm.attn", output="norm_attn_norm.attn.out_proj",
           after="norm_attn_norm.norm_2", mlp="ffn",
           without=("hidden_size", "num_hidden_layers", "num_attention_heads")),
    _entry("deepseek_v2", **MLA),
    _entry("deepseek_v2_plain_query", "deepseek_v2", **MLA | {"config": MLA["config"] | {"q_lora_rank": None}}),
    _entry("deepseek_v3", **MLA),
    *[
        _entry(name, kind, **MLA | {"config": MLA["config"] | INDEXER | {"index_topk": top}})
        for name, kind, top in (
            ("deepseek_v32", "deepseek_v32", 512), ("deepseek_v32_sparse", "deepseek_v32", 4),
            ("glm_moe_dsa", "glm_moe_dsa", 512), ("hy_v4", "hy_v4", 512), ("axk2", "axk2", 512),
        )
    ],
    _entry("glm4_moe_lite", **MLA),
    _entry("youtu", **MLA),
    _entry("axk1", **MLA),
    _entry("minicpm3", multiplier=1.4 / 3**0.5, **MLA | {"config": MLA["config"] | {"dim_model_base": 16}}),
    _entry("gpt_oss", config={"layer_types": ALTERNATING}),
    _entry("mimo_v2_flash", config={}),
    _entry("minimax_m2"),
    _entry("laguna"),
    _entry("kolibri1", gain="post_self_attn_layernorm"),
    _entry("mellum"),
    _entry("afmoe", gain="post_attention_layernorm", after="pre_mlp_layernorm"),
    _entry("solar_open"),
    _entry("dots1", config={"n_shared_experts": 1}),
    _entry("ernie4_5_moe"),
    _entry("exaone_moe"),
    _entry("aria_text"),
    _entry("diffllama"),
    _entry("doge"),
    _entry("bitnet"),
    *[
        _entry(name, "llama4_text", config={"no_rope_layer_interval": 2, "attn_temperature_tuning": True,
                                            "floor_scale": 4, "attn_scale": 0.5, "attention_chunk_size": size},
               mlp="feed_forward", limited=size == SMALL)
        for name, size in (("llama4_text", WIDE), ("llama4_text_small_chunks", SMALL))
    ],
    _entry("cohere2_moe", config={"layer_types": ALTERNATING}, **PARALLEL),
    _entry("granitemoe_swa", config=GRANITE | {"layer_types": ALTERNATING}, multiplier=0.4, mlp="block_sparse_moe"),
    _entry("beam", multiplier=tuple((2 * layer) ** -0.5 for layer in (1, 2, 3)), **SANDWICH),
    _entry("flint"),
    _entry("hy_v3"),
    _entry("modernbert-decoder", config={"layer_types": ALTERNATING, "local_attention": SMALL}, limited=True,
           attention="attn",
           output="attn.Wo", after="mlp_norm"),
    _entry("openai-gpt", **GPT | {"after": "ln_1"}),
    _entry("ctrl", config={"dff": 48}, layers="transformer.h", attention="multi_head_attention",
           output="multi_head_attention.dense", after="layernorm2", mlp="ffn"),
    # No layer, or not every layer, has attention heads of its own.
    _entry("jetmoe", **HYBRID),
    _entry("minimax", config={"layer_types": LINEAR["layer_types"]}, **HYBRID),
    _entry("bamba", config=MAMBA | {"attn_layer_indices": [1]}, **HYBRID),
    _entry("jamba", config={"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}, **HYBRID),
    _entry("zamba", **HYBRID),
    _entry("falcon_h1", config=MAMBA | {"mamba_d_ssm": 64, "attention_out_multiplier": 0.5},
           multiplier=0.5, after="pre_ff_layernorm", mlp="feed_forward"),
    _entry("falcon_mamba", **HYBRID),
    _entry("mamba", **HYBRID),
    _entry("mamba2", config={"num_heads": 4, "head_dim": 16, "state_size": 8, "expand": 2, "n_groups": 1}, **HYBRID),
    _entry("granitemoehybrid", config=GRANITE | MAMBA | {"layer_types": ["mamba", "attention", "mamba"],
                                                       "shared_intermediate_size": 24}, **HYBRID),
    _entry("nemotron_h", **HYBRID),
    _entry("recurrent_gemma", **HYBRID),
    _entry("rwkv", **HYBRID),
    _entry("lfm2", config={"layer_types": ["conv", "full_attention", "conv"]}, **HYBRID),
    _entry("lfm3", **HYBRID),
    _entry("qwen3_next", config={"layer_types": LINEAR["layer_types"]}, **HYBRID),
    _entry("qwen3_5_text", config={"layer_types": LINEAR["layer_types"]}, **HYBRID),
    _entry("olmo_hybrid", **HYBRID),
    _entry("kimi_linear", config=LINEAR | {"num_key_value_heads": 4}, without=("head_dim",), **HYBRID),
    _entry("bailing_hybrid", config=LINEAR | {"num_key_value_heads": 4}, **HYBRID),
    _entry("longcat_flash", config={"num_key_value_heads": 4, "head_dim": 8}, **HYBRID),
    _entry("hrm_text", **HYBRID),
    _entry("deepseek_v4", **HYBRID),
    _entry("qwen4_exp_text", config={"layer_types": LINEAR["layer_types"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
                                     "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4},
           **HYBRID),
    _entry("lfm2_moe", config={"layer_types": ["conv", "full_attention", "conv"]}, **HYBRID),
]
# fmt: on
BY_NAME = {known.name: known for known in TABLE}
QUICK = (
    "llama", "gpt2", "gemma2", "gemma3_text", "granite", "olmo2", "gpt_bigcode_multi_query", "gptj",
    "opt", "falcon_new", "deepseek_v3", "qwen3_next",
)  # fmt: skip


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """The packaged tokenizer cut to its first entries, with a short chat template."""
    whole = json.loads((fetch("smollm2-135m-instruct") / "tokenizer.json").read_text(encoding="utf-8"))
    model = whole["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    cut = Tokenizer.from_str(json.dumps(whole))
    return PreTrainedTokenizerFast(tokenizer_object=cut, **ends, unk_token="<|endoftext|>", chat_template=TEMPLATE)


def tiny_model(known: Architecture, *, seed: int = 0):
    """A random model of an architecture; norms and biases are random too, so that none can be forgotten unnoticed."""
    torch.manual_seed(seed)
    kind = CONFIG_MAPPING[known.model_type]
    default = kind()
    kept = {name: value for name, value in SIZES.items() if name not in known.without and _knows(default, name)}
    model = AutoModelForCausalLM.from_config(kind(**(kept | known.config))).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def _knows(config, name: str) -> bool:
    try:
        return hasattr(config, name)
    except ValueError:  # a name that differs from layer to layer
        return True


def folder(name: str, into: Path, *, seed: int = 0) -> Path:
    """Write the tiny model of that entry, with its tokenizer, into a folder."""
    tiny_model(BY_NAME[name], seed=seed).save_pretrained(into)
    small_tokenizer().save_pretrained(into)
    return Path(into)
