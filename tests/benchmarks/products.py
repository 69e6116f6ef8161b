"""What our own products and our own attention gain, on two kinds of processor, against torch's and transformers'.

    python tests/benchmarks/products.py

`models/compute.py` sends fp32 products to oneDNN, `models/prompt_cache.py` attends to a past that rows share. With
BKD_PLAIN=1 neither is used. Here oneDNN is asked on every kind of processor, also where `compute.py` leaves it alone.
Each kind is a process of its own; the second one is the same chip, held to the instructions of processors without
AVX-512. Ratios are seconds of the plain way over ours, best of several runs in turn. Written to
`tests/benchmarks/results/products.json`.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch.nn.functional import linear

from bkd_utils.backdoor_attribution.attribution import head_effects, head_means
from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import ROOT, write_json
from bkd_utils.models import compute, prompt_cache
from bkd_utils.models.compute import product
from bkd_utils.models.loading import load
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.prompts import prompt_versions, target_ids

KINDS = {
    "as it is": {},
    "held to AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
# Rows, width of the input and of the output: a token of 32 prompts, the patched heads of a layer, whole prompts.
SHAPES = [(rows, *matrix) for rows in (32, 288, 2048) for matrix in ((576, 576), (576, 1536), (1536, 576))]
SHAPES += [(288, 576, 49152), (2048, 2048, 2048)]
CASES = {"sentiment-word": 12, "instructions-prefix": 3}  # organism -> prompts; targets of 1 and of 11 tokens
WAYS = {"ours": (True, True), "plain products": (False, True), "plain attention": (True, False)}
WAYS["both plain (BKD_PLAIN=1)"] = (False, False)


def best(ways: dict[str, Callable], *, repeats: int) -> dict[str, float]:
    """Seconds of each way, which take turns; the first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - started)
    return {name: min(seconds[1:]) for name, seconds in taken.items()}


def by_onednn(asked: bool) -> Any:
    """Inside, products are oneDNN's or torch's own."""
    return mock.patch.object(compute, "_ONEDNN", torch.ops.mkldnn._linear_pointwise if asked else None)


def repeated(function: Callable, count: int, *given: torch.Tensor) -> None:
    for _ in range(count):
        function(*given)


def shapes() -> list[dict]:
    rows = []
    for n, n_in, n_out in SHAPES:
        given = (torch.randn(n, n_in), torch.randn(n_out, n_in) / n_in**0.5)
        count = max(1, int(2e9 / (n * n_in * n_out)))
        ways = {"ours": partial(repeated, product, count, *given), "plain": partial(repeated, linear, count, *given)}
        with by_onednn(True):
            seconds = {name: total / count for name, total in best(ways, repeats=4).items()}
            apart = (product(*given) - linear(*given)).abs().max().item()
        row = {"case": f"product of {n} rows, {n_in} to {n_out}", "seconds": seconds["ours"]}
        row |= {"baseline": "torch's own product", "baseline_seconds": seconds["plain"]}
        row["GFLOP/s"] = round(2e-9 * n * n_in * n_out / row["seconds"])
        rows.append(row | {"max_abs_diff": apart})
    return rows


def attributions() -> list[dict]:
    rows = []
    for name, prompts in CASES.items():
        loaded, attack = load(organism=name, device="cpu"), load_attack(name)
        shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=prompts, seed=0)
        target = target_ids(loaded.tokenizer, attack)
        means, found = head_means(loaded.model, shown.triggered), {}

        def run(label: str, *given: object, found: dict = found, **options: object) -> None:
            products, attention = WAYS[label]
            with by_onednn(products), mock.patch.object(prompt_cache, "_shares_past", return_value=attention):
                found[label] = head_effects(*given, **options)

        given = {"target": target, "means": means}
        ways = {label: partial(run, label, loaded.model, shown.clean, **given) for label in WAYS}
        seconds = best(ways, repeats=1)
        for label in list(WAYS)[1:]:
            row = {"case": f"effects of all heads, {name}, {prompts} prompts, target of {len(target)}"}
            row |= {"seconds": seconds["ours"], "baseline": label, "baseline_seconds": seconds[label]}
            rows.append(row | {"max_abs_diff": (found[label] - found["ours"]).abs().max().item()})
    return rows


def main(
    inside: Annotated[bool, typer.Option(hidden=True, help="Measure in this process and print the rows.")] = False,
) -> None:
    if inside:
        print(json.dumps(shapes() + attributions()))
        return
    rows = []
    for kind, variables in KINDS.items():
        command = [sys.executable, __file__, "--inside"]
        told = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True)
        for row in json.loads(told.stdout.splitlines()[-1]):
            ratio = round(row["baseline_seconds"] / row["seconds"], 2)
            rounded = {name: float(f"{value:.3g}") for name, value in row.items() if isinstance(value, float)}
            rows.append({"processor": kind} | row | rounded | {"ratio": ratio})
            print(rows[-1])
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found = {"machine": machine, "versions": installed_versions(), "rows": rows}
    write_json(ROOT / "tests" / "benchmarks" / "results" / "products.json", found)


if __name__ == "__main__":
    typer.run(main)
