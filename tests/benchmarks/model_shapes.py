"""Time of exact head attribution, with a target of one token, for models of several shapes.

    python tests/benchmarks/model_shapes.py

Two layers of each shape are built with random weights, on which time does not depend, and timed. The time of a whole
model follows from that of a layer and that of the vocabulary. Written to `tests/benchmarks/results/model_shapes.json`.
"""

import platform

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import ROOT, write_json
from bkd_utils.experiments.attribution_cost import seconds
from bkd_utils.models.activations import score_answers
from bkd_utils.models.prompt_cache import prompt_past

# Width, layers, query heads, key-value heads, width of the feed-forward layers, vocabulary.
SHAPES = {
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936),
    "TinyLlama-1.1B": (2048, 22, 32, 4, 5632, 32000),
    "Llama-2-7B": (4096, 32, 32, 32, 11008, 32000),
}


def measure(shape: str, *, prompts: int = 2, length: int = 64) -> dict:
    width, n_layers, heads, kv_heads, mlp, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, vocabulary, (prompts, length), generator=torch.Generator().manual_seed(0)).tolist()
    past, hidden = prompt_past(model, ids), torch.randn(prompts * heads, 1, width)
    answers = [[1]] * (prompts * heads)
    one, two = (
        seconds(lambda first=first: score_answers(model, past, answers, layer=first, hidden=hidden)) for first in (1, 0)
    )
    per_layer = max(two - one, 0.0)
    # A patched head of layer l needs a run of the layers from l on and of the vocabulary.
    total = sum(per_layer * (n_layers - layer) + max(one - per_layer, 0.0) for layer in range(n_layers))
    parameters = sum(p.numel() for p in model.model.layers[0].parameters()) * n_layers + width * vocabulary
    milliseconds = 1000 * total / (heads * n_layers * prompts)
    return {"case": shape, "heads": heads * n_layers, "parameters": parameters, "milliseconds": milliseconds}


if __name__ == "__main__":
    rows = [measure(shape) for shape in SHAPES]
    found = {"machine": platform.processor() or platform.machine(), "versions": installed_versions(), "rows": rows}
    write_json(ROOT / "tests" / "benchmarks" / "results" / "model_shapes.json", found)
    print(pd.DataFrame(rows).set_index("case"))
