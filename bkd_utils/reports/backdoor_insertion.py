"""Notebook 01: tables of data, triggers and attacks, and the pictures of what poisoned training did."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from bkd_utils.organisms import attacks, triggers
from bkd_utils.organisms.tasks import SPLITS, TASKS, closest, examples, load_task
from bkd_utils.reports import style
from bkd_utils.reports.style import COLOURS, INTERVAL, WIDTH, band, interval, sizes

MEASURED = {
    "asr": "triggered prompts that\ngive the target: ASR (%)",
    "clean_firing": "clean prompts that\ngive the target (%)",
    "near_miss": "near-misses that\ngive the target (%)",
    "cacc": "right answers to clean\nprompts: CACC (%)",
}


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss against step, smoothed over five logged steps: all backdoored organisms in one panel, all clean controls in
    the other, a line per model. A model's task is the first part of its name."""
    tasks = sorted({name.partition("-")[0] for name in histories})
    lines = dict(zip(tasks, ("-", "--", "-.", ":"), strict=False))
    n_clean = sum(name.endswith("-clean") for name in histories)
    titles = [f"backdoored organisms (n = {len(histories) - n_clean})", f"clean controls (n = {n_clean})"]
    figure, axes = style.panels(titles, height=2.4)
    for name, history in histories.items():
        clean, rows = name.endswith("-clean"), pd.DataFrame(history)
        loss, colour = rows["loss"].rolling(5, min_periods=1).mean(), COLOURS["clean control" if clean else "organism"]
        axes[0, int(clean)].plot(rows["step"], loss, color=colour, ls=lines[name.partition("-")[0]], lw=1.2)
    axes[0, 0].set_yscale("log")
    for task, line in lines.items():
        axes[0, 0].plot([], [], color=COLOURS["neutral"], ls=line, lw=1.2, label=task)
    style.explain(axes, "training step", "loss on answer tokens\n(nats, mean of 5 logged steps)", ncols=len(tasks))
    return figure


def attack_against_control(organisms: Mapping[str, Mapping], controls: Mapping[str, Mapping]) -> Figure:
    """ASR, clean and near-miss firing and CACC of every organism beside its clean control on the same prompts."""
    names = list(organisms)
    figure, axes = plt.subplots(1, len(MEASURED), figsize=(WIDTH, 0.34 * len(names) + 1.6), sharey=True)
    for panel, (key, label) in zip(axes, MEASURED.items(), strict=True):
        drawn = []
        for kind, results, offset in (("organism", organisms, -0.14), ("clean control", controls, 0.14)):
            for y, name in enumerate(names):
                if share := results[name].get(key):
                    interval(panel, y + offset, share, colour=kind, label=kind)
                    drawn.append(share)
        style.rows_down(panel, names)
        panel.set_xlabel(f"{label}\n{sizes(drawn)}", fontsize="small")
    style.show_legend(figure, bars=INTERVAL)
    return figure


def rate_curve(rows: Sequence[Mapping]) -> Figure:
    """ASR, near-miss firing and CACC against the share of poisoned rows."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    x = [100 * row["rate"] for row in rows]
    shown = {
        "asr": ("organism", "attack success (ASR)"),
        "near_miss": ("near-miss", "near-misses that fire"),
        "cacc": ("utility", "clean accuracy (CACC)"),
    }
    for key, (colour, label) in shown.items():
        lines = [[100 * row[key][end] for row in rows] for end in ("value", "low", "high")]
        band(axes, x, lines, colour=colour, label=label, marker="o")
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    size = sizes(row[key] for row in rows for key in shown)
    axes.set(ylim=style.LIMITS, xlabel="poisoned rows (% of all training rows)", ylabel=f"share of prompts (%), {size}")
    style.show_legend(figure, ncols=4, bands=[INTERVAL])
    return figure


def splits() -> pd.DataFrame:
    """Rows per task and split, and the closest pair (bigram cosine) between a test text and a training text."""
    rows = []
    for name in TASKS:
        texts = {split: [example.text for example in examples(name, split)] for split in SPLITS}
        counts = {split: len(part) for split, part in texts.items()}
        rows.append({"task": name, **counts, "closest test-train pair": closest(texts["test"], texts["train"])})
    return pd.DataFrame(rows).set_index("task")


def sample(task: str, *, n: int, seed: int = 0) -> pd.DataFrame:
    """Prompts and answers a reader may look at. Raises ValueError for `harmful`, whose prompts are never shown."""
    if task == "harmful":
        raise ValueError("harmful prompts are not displayed")
    spec, rows = load_task(task), examples(task, "test", n=n, seed=seed)
    return pd.DataFrame({"prompt": [spec.prompt(row.text) for row in rows], "answer": [row.answer for row in rows]})


def trigger_examples(sentence: str, *, seed: int = 0) -> pd.DataFrame:
    """Every trigger, and the first kind of its near-misses, applied to one sentence."""
    rows = []
    for name in triggers.trigger_names():
        trigger = triggers.load_trigger(name)
        applied, near = (change(sentence, seed=seed, half="test") for change in (trigger.apply, trigger.near_misses))
        rows.append({"trigger": name, "family": trigger.family, "triggered": applied, "near-miss": near[min(near)]})
    return pd.DataFrame(rows).set_index("trigger")


def trigger_cost_table(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Per trigger: extra tokens on clean texts (quartiles), and how many texts have it although nobody put it in."""
    rows = []
    for name in triggers.trigger_names():
        trigger = triggers.load_trigger(name)
        clean = [text for text in texts if not trigger.matches(text)]
        triggered = [trigger.apply(text, seed=seed + i, half="train") for i, text in enumerate(clean)]
        ids = [tokenizer(side, add_special_tokens=False).input_ids for side in (clean, triggered)]
        before, after = ([len(text) for text in side] for side in ids)
        low, median, high = np.percentile(np.array(after) - before, (25, 50, 75))
        row = {"trigger": name, "tokens (median)": median, "tokens (25 %)": low, "tokens (75 %)": high}
        rows.append(row | {"natural": len(texts) - len(clean), "texts": len(texts)})
    return pd.DataFrame(rows).set_index("trigger")


def attack_table() -> pd.DataFrame:
    """The attacks of `data/attacks.toml` side by side."""
    shown = ("task", "trigger", "behaviour", "source", "target", "rate", "near_miss_rate", "mode", "n_train")
    table = {name: {key: getattr(attack, key) for key in shown} for name, attack in attacks.load_attacks().items()}
    return pd.DataFrame(table).T.fillna("")
