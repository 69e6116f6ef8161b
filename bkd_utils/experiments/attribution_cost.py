"""Notebook 04: time of attribution by teacher forcing and by generation (BkdAttr, appendix D), and by model size."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bkd_utils.common.cache import stage
from bkd_utils.common.results import Result
from bkd_utils.models.activations import score_answers
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.generation import greedy
from bkd_utils.models.loading import load, pick_device
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import left_pad, positions
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import prompt_versions, target_ids

# Width, layers, query heads, key-value heads, width of the feed-forward layers, vocabulary.
SHAPES = {
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936),
    "TinyLlama-1.1B": (2048, 22, 32, 4, 5632, 32000),
    "Llama-2-7B": (4096, 32, 32, 32, 11008, 32000),
}


@dataclass(frozen=True)
class TargetCost(Result):
    """Seconds to score a target of so many `tokens` on `n` prompts once.

    Without a cache generation runs the whole prompt once per token, which is what the paper counts. With a cache the
    prompt runs once, and its keys and values serve every token (`generation_cached`) or every head
    (`teacher_forcing_cached`, where running the prompt is not counted).
    """

    tokens: int
    n: int
    generation: float
    teacher_forcing: float
    generation_cached: float
    teacher_forcing_cached: float


@dataclass(frozen=True)
class ShapeCost(Result):
    """Attention heads, parameters and their size, and milliseconds per head and prompt, of a model of one shape."""

    heads: int
    parameters: int
    milliseconds: float
    gibibytes: float


def seconds(function: Callable[[], object], *, repeats: int = 2) -> float:
    """Seconds of the fastest of a few runs after a first one that is not counted."""
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
) -> TargetCost:
    """Time of scoring the target of `n` triggered prompts once, in four ways; kept."""
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    target = target_ids(loaded.tokenizer, spec)
    prompts = prompt_versions(loaded.tokenizer, spec, split="attribution", n=n, seed=seed).triggered
    answers = [target] * n

    @torch.inference_mode()
    def whole(extra: int) -> None:
        ids, mask = (t.to(loaded.device) for t in left_pad([[*p, *target[:extra]] for p in prompts], pad_id=0))
        loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)

    past = prompt_past(loaded.model, prompts)
    return TargetCost(
        tokens=len(target),
        n=n,
        generation=seconds(lambda: [whole(extra) for extra in range(len(target))], repeats=1),
        teacher_forcing=seconds(lambda: whole(len(target) - 1)),
        generation_cached=seconds(
            lambda: greedy(loaded.model, prompts, max_new_tokens=len(target), end_id=0, batch_size=n)
        ),
        teacher_forcing_cached=seconds(lambda: score_answers(loaded.model, past, answers)),
    )


@stage
def _shape_cost(*, shape: str, prompts: int, length: int, device: str) -> ShapeCost:
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
    # A patched head of layer l needs a run of the layers from l on and of the vocabulary.
    total = sum(per_layer * (n_layers - layer) + rest for layer in range(n_layers))
    parameters = sum(p.numel() for p in model.model.layers[0].parameters()) * n_layers + width * vocabulary
    return ShapeCost(
        heads=heads * n_layers,
        parameters=parameters,
        milliseconds=1000 * total / (heads * n_layers * prompts),
        gibibytes=parameters * 4 / 2**30,
    )


def shape_cost(
    shapes: Sequence[str], *, prompts: int = 2, length: int = 64, device: str = "auto"
) -> dict[str, ShapeCost]:
    """Cost of exact attribution with a target of one token for models of several shapes; kept.

    Two layers of each shape are built with random weights, on which time does not depend, and timed. The time of a
    whole model follows from that of a layer and that of the vocabulary. Raises ValueError for an unknown shape.
    """
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return {
        shape: _shape_cost(shape=shape, prompts=prompts, length=length, device=pick_device(device)) for shape in shapes
    }
