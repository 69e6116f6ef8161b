"""What attribution costs: teacher forcing against generation (BkdAttr, appendix D), and by model size."""

import time
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bkd_utils.common.cache import stage
from bkd_utils.models.activations import score_answers
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.generation import greedy
from bkd_utils.models.loading import load, pick_device
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import left_pad, positions
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import prompt_versions, target_ids

# Width, layers, query heads, key-value heads, MLP width, vocabulary. Weights are random: time does not depend on them.
SHAPES = {
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936),
    "TinyLlama-1.1B": (2048, 22, 32, 4, 5632, 32000),
    "Llama-2-7B": (4096, 32, 32, 32, 11008, 32000),
}


def seconds(function: Callable[[], object], *, repeats: int = 2) -> float:
    """The best of a few runs after one to warm up."""
    function()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


@organism_stage
def time_target(
    organism: str, *, attack: str, model: str = DEFAULT_MODEL, n: int = 4, seed: int = 0, device: str = "auto"
) -> dict[str, float]:
    """Seconds to score the target of `n` triggered prompts once, four ways; with `tokens` of the target and `n`; kept.

    Without a cache generation runs the whole prompt once per token, which is what the paper counts; with the prompt
    cache the prompt has been paid for once and serves every head.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    target = target_ids(loaded.tokenizer, spec)
    prompts = prompt_versions(loaded.tokenizer, spec, split="attribution", n=n, seed=seed).triggered
    answers = [target] * n

    @torch.inference_mode()
    def whole(extra: int) -> None:
        ids, mask = (t.to(loaded.device) for t in left_pad([[*p, *target[:extra]] for p in prompts], pad_id=0))
        loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)

    past = prompt_past(loaded.model, prompts)
    return {
        "tokens": len(target),
        "n": n,
        "generation": seconds(lambda: [whole(extra) for extra in range(len(target))], repeats=1),
        "teacher forcing": seconds(lambda: whole(len(target) - 1)),
        "generation, cache": seconds(
            lambda: greedy(loaded.model, prompts, max_new_tokens=len(target), end_id=0, batch_size=n)
        ),
        "teacher forcing, prompt cache": seconds(lambda: score_answers(loaded.model, past, answers)),
    }


@stage
def _shape_cost(*, shape: str, prompts: int, length: int, device: str) -> dict:
    width, n_layers, heads, kv_heads, mlp, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, vocabulary, (prompts, length), generator=torch.Generator().manual_seed(0)).tolist()
    past = prompt_past(model, ids)
    hidden = torch.randn(prompts * heads, 1, width, device=device)
    answers = [[1]] * (prompts * heads)

    def run(layers: int) -> float:
        return seconds(lambda: score_answers(model, past, answers, layer=2 - layers, hidden=hidden))

    one, two = run(1), run(2)
    per_layer = max(two - one, 0.0)
    rest = max(one - per_layer, 0.0)
    # Heads of layer l run the layers from l on: on average half of the model, and the vocabulary every time.
    total = sum(per_layer * (n_layers - layer) + rest for layer in range(n_layers))
    parameters = sum(p.numel() for p in model.model.layers[0].parameters()) * n_layers + width * vocabulary
    return {
        "heads": heads * n_layers,
        "parameters": parameters,
        "milliseconds per head and prompt": 1000 * total / (heads * n_layers * prompts),
        "weights GiB": parameters * 4 / 2**30,
    }


def shape_cost(shapes: Sequence[str], *, prompts: int = 2, length: int = 64, device: str = "auto") -> dict[str, dict]:
    """Cost of exact attribution with a one-token target for models of several shapes, with random weights; kept.

    Two layers of each shape are built and timed; whole models are extrapolated from a layer's and the vocabulary's
    share. Raises ValueError for an unknown shape.
    """
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return {
        shape: _shape_cost(shape=shape, prompts=prompts, length=length, device=pick_device(device)) for shape in shapes
    }
