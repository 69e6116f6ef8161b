"""The page of figures to play with, and their data: what ships in `figures` and `data/measurements`, nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from string import Template

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import t as student

from bkd_utils.common.files import DATA, FIGURES, read_json

MEASUREMENTS = DATA / "measurements"
GUARD_RATE = 0.05  # share of clean prompts above the threshold at which the slider starts, as in notebook 05
SEED = "-seed"
VERSIONS = ("reference", "held out", "triggered")  # of prompts: set a threshold, other clean ones, with the trigger
WIDGET = """```{{raw}} html
<div class="play" data-play="{0}"><form class="filters"></form><div class="plot"></div><div class="said"></div></div>
```"""


def measured(notebook: str, stage: str) -> Iterator[tuple[dict, dict, dict]]:
    """Arguments, result and arrays of each measurement of a stage that a notebook uses."""
    for name in read_json(MEASUREMENTS / "index.json")[notebook]:
        if name.startswith(f"{stage}/"):
            path = MEASUREMENTS / f"{name}.json"
            found, arrays = read_json(path), path.with_suffix(".safetensors")
            yield found["arguments"], found["result"], load_file(arrays) if arrays.is_file() else {}


def numbers(figure: str) -> dict:
    return read_json(FIGURES / f"{figure}.json")["numbers"]


def organism(label: str, kind: str) -> str:
    """Name of an organism from the label that figures give it: `word-seed1` of kind plain is `word-plain-seed1`."""
    attack, seed, number = label.partition(SEED)
    return f"{attack}{'-plain' if kind == 'plain' else ''}{seed}{number}"


def _rounded(values, digits: int = 4) -> list:
    return np.round(np.asarray(values, dtype=float), digits).tolist()


def vector() -> dict:
    """Organism -> edit -> shares by layer and coefficient, what was chosen, and three answers before and after."""
    texts = {
        asked["organism"]: result["texts"] for asked, result, _ in measured("04_backdoor_vector", "steer_organism")
    }
    found = {}
    for kind, some in numbers("04_maps").items():
        for label, one in some.items():
            name = organism(label, kind)
            found[name] = {}
            for edit, drawn in one["maps"].items():
                start, kept = "clean prompts" if edit.startswith("add") else "triggered prompts", texts[name]
                found[name][edit] = {
                    "coefficients": drawn["coefficients"],
                    "asr": _rounded(drawn["asr"]),
                    "right": None if drawn["right_start"] is None else _rounded(drawn["right_start"]),
                    "chosen": one["chosen"][edit],
                    "start": start,
                    "texts": kept and [*zip(kept[start], kept[edit], strict=True)],
                }
    return {"n": read_json(FIGURES / "04_maps.json")["parameters"]["n_dev"], "organisms": found}


def heads() -> dict:
    """Organism -> metric -> effect of every head, and half the width of its 95 % interval (Student's t)."""
    effects = {
        (asked["organism"], asked["n"]): (result, arrays)
        for asked, result, arrays in measured("03_head_attribution", "attribute_heads")
    }
    sizes, found = read_json(FIGURES / "03_head_maps.json")["parameters"]["n"], {}
    for kind, some in numbers("03_head_maps").items():
        for label, by_metric in some.items():
            name, n = organism(label, kind), sizes[label.partition(SEED)[0]]
            _, arrays = effects[name, n]
            found[name] = {"n": n, "metrics": {}}
            for metric, drawn in by_metric.items():
                mean, error = (arrays[f"/sufficient/{metric}/{part}"] for part in ("mean", "error"))
                if not np.allclose(mean, drawn, rtol=1e-3, atol=1e-6):
                    raise ValueError(f"03_head_maps, {name}, {metric}: the figure and the measurement differ")
                width = student.ppf(0.975, n - 1) * error
                found[name]["metrics"][metric] = {"effect": _rounded(mean, 5), "half": _rounded(width, 5)}
    return found


def unusual(reference: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How unusual the similarity of heads is in the most unusual layer, as a robust z; [prompt, layer] -> [prompt]."""
    middle = np.median(reference, axis=0)
    spread = 1.4826 * np.median(np.abs(reference - middle), axis=0) + 1e-9
    return ((rows - middle) / spread).max(1)


def guard() -> dict:
    """Organism -> reading -> the scores of prompts that set a threshold, of other clean ones and of triggered ones."""
    found = {}
    for asked, result, arrays in measured("05_attention_similarity", "similarity_by_version"):
        if asked["organism"] != asked["attack"]:  # controls and the base model have no threshold
            continue
        found[asked["organism"]] = {}
        for reading, versions in result.items():
            rows = {
                one: arrays.get(f"/{reading}/{one}", versions[one]) for one in ("reference", "held out", "triggered")
            }
            rows = {one: np.asarray(values, dtype=float) for one, values in rows.items()}
            scores = {one: unusual(rows["reference"], values) for one, values in rows.items()}
            above = int(GUARD_RATE * len(scores["reference"]) + 1e-9)
            start = float(np.sort(scores["reference"])[-1 - above])
            found[asked["organism"]][reading] = {one: _rounded(values, 3) for one, values in scores.items()} | {
                "start": round(start, 3)
            }
    return {"similarity": found, "fixed": numbers("06_guards")}


def frontier() -> dict:
    """Set of organisms -> organism -> seed -> treatment -> ASR and CACC with their intervals."""

    def both(row) -> list:
        return [row["asr"], row["cacc"]] if isinstance(row, dict) else row

    def bare(row) -> list:
        return [[one[key] for key in ("value", "low", "high", "n")] for one in both(row)]

    sets = {"SmolLM2, all treatments": {}, "SmolLM2, searched cure": {}}
    sets |= {"MiniLM encoders, all treatments": {}, "MiniLM encoders, searched cure": {}}
    ((causal_seed,), (encoder_seed, *_)) = (
        read_json(FIGURES / f"{name}.json")["seeds"] for name in ("06_frontier", "06_encoder_frontier")
    )
    for attack, rows in numbers("06_frontier").items():
        sets["SmolLM2, all treatments"][attack] = {causal_seed: {name: bare(row) for name, row in rows.items()}}
    for label, rows in numbers("06_searched").items():
        attack, _, seed = label.partition(SEED)
        sets["SmolLM2, searched cure"].setdefault(attack, {})[seed or 0] = {n: bare(row) for n, row in rows.items()}
    for family, rows in numbers("06_encoder_frontier").items():
        sets["MiniLM encoders, all treatments"][family] = {encoder_seed: {n: bare(row) for n, row in rows.items()}}
    seeds = read_json(FIGURES / "06_home_ground.json")["seeds"]
    for attack, rows in numbers("06_home_ground").items():
        sets["MiniLM encoders, searched cure"][attack] = {
            seed: {name: bare(by_seed[i]) for name, by_seed in rows.items()} for i, seed in enumerate(seeds)
        }
    return sets


MADE = {"vector": vector, "heads": heads, "guard": guard, "frontier": frontier}


def write_data(folder: Path) -> None:
    """Write a script for the page, because a page opened from a disk may not fetch JSON."""
    folder.mkdir(parents=True)
    data = {name: make() for name, make in MADE.items()}
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    (folder / "data.js").write_text(f"window.BOOK = {text};\n", encoding="utf-8")


def fixed_guards() -> str:
    """The guards of notebook 06 as a table, each at the one threshold that was measured."""
    rows = []
    for attack, guards in numbers("06_guards").items():
        for name, one in guards.items():
            shares = [f"{100 * one[key]['value']:.0f} % [{100 * one[key]['low']:.0f}, {100 * one[key]['high']:.0f}]"
                      for key in ("caught", "refused")]  # fmt: skip
            rows.append(f"| `{attack}` | {name} | {shares[0]} | {shares[1]} | {one['caught']['n']} |")
    return "| organism | guard | caught | refused | n |\n|---|---|---|---|---|\n" + "\n".join(rows)


def page() -> str:
    """Four figures with sliders, in the words of `play.md`."""
    text = Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    return text.substitute({name: WIDGET.format(name) for name in MADE}, fixed_guards=fixed_guards())
