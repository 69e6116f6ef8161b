"""Exact head attribution, three ways in one run: ours, one full pass per head and prompt, TransformerLens' patching.

    python tests/benchmarks/attribution.py [--prompts 96] [--pairs 24]

All of them compute the same numbers on the same prompts, in fp32. The two slow ways run a sample of (head, prompt)
pairs spread over all layers and are scaled to all of them; sample and scale are in the result. Written to
`tests/benchmarks/results/attribution.json`.
"""

import platform
import resource
import time
from typing import Annotated

import pandas as pd
import torch
import typer
from transformer_lens import patching

from bkd_utils.backdoor_attribution import attribution
from bkd_utils.common.files import ROOT, write_json
from bkd_utils.models import loading
from bkd_utils.models.bridge import boot
from bkd_utils.models.compute import product
from bkd_utils.models.hooks import anatomy
from bkd_utils.organisms import attacks, making
from bkd_utils.organisms.prompts import prompt_versions, target_ids

CASES = {"sentiment-word": "one token", "instructions-prefix": "13 tokens"}


def full_pass(model, prompt: list[int], target: list[int], layer: int, head: int, value: torch.Tensor) -> float:
    """The official way: the whole prompt and target once for every head. Raw hooks, all logits."""
    parts = anatomy(model)
    width = len(value)

    def patch(_module, arguments):
        z = arguments[0].clone()
        z[:, len(prompt) - 1, head * width : (head + 1) * width] = value
        return (z, *arguments[1:])

    handle = parts.outputs[layer].register_forward_pre_hook(patch)
    try:
        with torch.inference_mode():
            return log_probability(model(torch.tensor([[*prompt, *target]])).logits[0], prompt, target)
    finally:
        handle.remove()


def log_probability(logits: torch.Tensor, prompt: list[int], target: list[int]) -> float:
    """Length-normalised probability of the target, from the logits of prompt and target."""
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows[torch.arange(len(target)), torch.tensor(target)].mean().exp().item()


def transformer_lens_way(
    bridge, prompt: list[int], target: list[int], layer: int, head: int, value: torch.Tensor
) -> float:
    """TransformerLens' generic activation patching for one (layer, position, head)."""
    tokens = torch.tensor([[*prompt, *target]])
    name = f"blocks.{layer}.attn.hook_z"
    cache = {name: torch.zeros(1, tokens.shape[1], bridge.cfg.n_heads, len(value))}
    cache[name][0, len(prompt) - 1, head] = value
    frame = pd.DataFrame([[layer, len(prompt) - 1, head]], columns=["layer", "pos", "head"])
    with torch.inference_mode():
        found = patching.generic_activation_patch(
            bridge, tokens, cache, patching_metric=lambda logits: log_probability(logits[0], prompt, target),
            patch_setter=patching.layer_pos_head_vector_patch_setter, activation_name="z", index_df=frame,
        )  # fmt: skip
    return float(found[0])


def matrix_throughput() -> float:
    """GFLOP/s of a large fp32 matrix product by the same route as a model's own, best of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        product(a, b)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started) / 1e9)
    return best


def useful_gflop(model, prompts: list[list[int]], target: list[int]) -> float:
    """Multiply-adds (x 2) of the linear maps and the vocabulary that patching every head needs, caches given."""
    parts = anatomy(model)
    per_layer = sum(p.numel() for p in parts.layers[0].parameters() if p.ndim == 2)
    vocabulary = model.get_output_embeddings().weight.numel()
    n, tokens = len(parts.layers), len(target)
    per_prompt = sum(parts.n_heads * tokens * ((n - layer) * per_layer + vocabulary) for layer in range(n))
    return 2 * len(prompts) * per_prompt / 1e9


def main(
    prompts: Annotated[int, typer.Option(help="Prompts of the attribution split.")] = 96,
    sample: Annotated[int, typer.Option("--pairs", help="(head, prompt) pairs that the slow ways run.")] = 24,
) -> None:
    rows, throughput = [], matrix_throughput()
    for name, case in CASES.items():
        attack = attacks.load_attack(name)
        loaded = loading.load(organism=making.obtain(name), device="cpu")
        shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=prompts, seed=0)
        target = target_ids(loaded.tokenizer, attack)
        if case == "13 tokens":
            target = (target + target)[:13]  # which tokens they are makes no difference to the time
        means = attribution.head_means(loaded.model, shown.triggered[:32])
        started = time.perf_counter()
        effects = attribution.head_effects(loaded.model, shown.clean, target=target, means=means)
        ours = time.perf_counter() - started
        n_layers, n_heads = effects.shape[1:]
        total = effects.numel()
        chosen = [
            (i * prompts // sample, (i * n_layers) // sample, i % n_heads) for i in range(sample)
        ]  # prompt, layer, head
        bridge = boot(loaded).bridge
        for baseline, function in (
            ("one full pass per head and prompt", lambda *a, m=loaded.model: full_pass(m, *a)),
            ("TransformerLens generic_activation_patch", lambda *a, b=bridge: transformer_lens_way(b, *a)),
        ):
            clean = {
                i: full_pass(loaded.model, shown.clean[i], target, 0, 0, own(loaded.model, shown.clean[i]))
                for i, _, _ in chosen
            }
            started, found = time.perf_counter(), []
            for i, layer, head in chosen:
                found.append(function(shown.clean[i], target, layer, head, means[layer, head]))
            slow = (time.perf_counter() - started) * total / len(chosen)
            worst = max(
                abs(value - clean[i] - effects[i, layer, head].item())
                for value, (i, layer, head) in zip(found, chosen, strict=True)
            )
            gflop = useful_gflop(loaded.model, shown.clean, target)
            rows.append(
                {
                    "case": f"{n_layers * n_heads} heads x {prompts} prompts, target of {case}",
                    "seconds": round(ours, 1),
                    "baseline": baseline,
                    "baseline_seconds": round(slow, 1),
                    "baseline_pairs_run": len(chosen),
                    "ratio": round(slow / ours, 1),
                    "max_abs_diff": float(f"{worst:.2g}"),
                    "throughput_share": round(gflop / ours / throughput, 2),
                }
            )
            print(rows[-1])
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine["fp32 GFLOP/s"] = round(throughput)
    machine["peak GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    versions = {"torch": torch.__version__}
    path = ROOT / "tests" / "benchmarks" / "results" / "attribution.json"
    write_json(path, {"machine": machine, "versions": versions, "rows": rows})


def own(model, prompt: list[int]) -> torch.Tensor:
    """The first head's own output, so that patching it changes nothing: the clean probability by the same route."""
    return attribution.head_means(model, [prompt])[0, 0]


if __name__ == "__main__":
    typer.run(main)
