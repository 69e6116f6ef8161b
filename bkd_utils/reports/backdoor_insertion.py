"""Notebook 01: tables of data, triggers and attacks, and the pictures of what poisoned training did."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from bkd_utils.organisms import attacks, tasks, triggers
from bkd_utils.organisms.triggers import Half, Trigger
from bkd_utils.reports.style import COLOURS, WIDTH, curve, shares


def trigger_costs(costs: pd.DataFrame) -> Figure:
    """Extra tokens per trigger (median and quartiles), and how often clean text carries it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 0.34 * len(costs) + 1), sharey=True)
    y = range(len(costs))
    median, low, high = (costs[key] for key in ("tokens (median)", "tokens (25 %)", "tokens (75 %)"))
    left.errorbar(median, y, xerr=[median - low, high - median], fmt="o", color=COLOURS["backdoored"], clip_on=False)
    left.set_yticks(y, costs.index)
    left.invert_yaxis()
    left.set_xlim(left=0)
    left.set_xlabel("extra tokens (median, quartiles)")
    left.set_title("Cost")
    right.barh(y, 100 * costs["natural"] / costs["texts"], color=COLOURS["clean control"], height=0.55)
    right.set_xlabel(f"clean texts that carry it (%, n = {costs['texts'].iloc[0]:,})")
    right.set_title("Natural rate")
    for i, count in enumerate(costs["natural"]):
        right.annotate(f" {count}", (100 * count / costs["texts"].iloc[i], i), va="center", fontsize="small")
    return figure


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss against step, one small panel per organism on shared logarithmic scales."""
    columns = 4
    rows = -(-len(histories) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 1.5 * rows + 0.4), sharex=True, sharey=True, squeeze=False
    )
    for panel, (name, history) in zip(axes.flat, histories.items(), strict=False):
        kind = "clean control" if name.endswith("-clean") else "backdoored"
        loss = pd.Series([row["loss"] for row in history])
        steps = [row["step"] for row in history]
        panel.plot(steps, loss, color=COLOURS[kind], alpha=0.3, lw=0.8)
        panel.plot(steps, loss.rolling(5, min_periods=1).mean(), color=COLOURS[kind])
        panel.set_yscale("log")
        panel.set_title(name, fontsize="small")
    for panel in list(axes.flat)[len(histories) :]:
        panel.set_visible(False)
    figure.supxlabel("training step", fontsize="medium")
    figure.supylabel("loss on answer tokens (nats)", fontsize="medium")
    return figure


def attack_against_control(organisms: Mapping[str, Mapping], controls: Mapping[str, Mapping]) -> Figure:
    """ASR, clean firing and CACC of every organism beside its clean control on the same prompts."""
    names = list(organisms)
    panels = {
        "asr": "triggered prompts that give\nthe target: ASR (%)",
        "clean_firing": "clean prompts that give\nthe target (%)",
        "cacc": "right answers to clean\nprompts: CACC (%)",
    }
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 0.36 * len(names) + 1.5), sharey=True)
    for panel, (key, label) in zip(axes, panels.items(), strict=True):
        shares(panel, names, [organisms[name].get(key) for name in names], kind="backdoored", offset=-0.13)
        shares(panel, names, [controls[name].get(key) for name in names], kind="clean control", offset=0.13)
        panel.set_xlabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def near_miss_map(organisms: Mapping[str, Mapping], controls: Mapping[str, Mapping]) -> Figure:
    """Firing per kind of near-miss, organism beside clean control, one block per attack on a shared scale."""
    kinds = {name: list(result["near_miss_by_kind"]) for name, result in organisms.items()}
    figure, axes = plt.subplots(
        len(kinds),
        1,
        figsize=(WIDTH, 0.22 * sum(map(len, kinds.values())) + 0.38 * len(kinds) + 0.9),
        sharex=True,
        squeeze=False,
        height_ratios=[len(names) + 0.6 for names in kinds.values()],
    )
    for panel, (name, rows) in zip(axes[:, 0], kinds.items(), strict=True):
        for source, kind, offset in ((organisms, "near-miss", -0.13), (controls, "clean control", 0.13)):
            found = source[name]["near_miss_by_kind"]
            shares(
                panel, [row.replace("_", " ") for row in rows], [found.get(r) for r in rows], kind=kind, offset=offset
            )
        panel.axvline(20, color=COLOURS["bound"], lw=0.8, ls=":")
        panel.set_title(name, fontsize="small")
    axes[-1, 0].set_xlabel("near-miss prompts that give the target (%); dotted: bar of 20 %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, ["organism", *labels[1:]], loc="outside upper center", ncols=2)
    return figure


def trade_offs(curves: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """ASR against firing on clean prompts and on near-misses, one panel per label flip, all thresholds."""
    columns = 3
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 2.4 * rows + 0.5), sharex=True, sharey=True, squeeze=False
    )
    for panel, (name, found) in zip(axes.flat, curves.items(), strict=False):
        for against, kind in (("clean", "clean control"), ("near-miss", "near-miss")):
            line = found[against]
            label = f"{against} prompts ({line['auroc']:.3f})"
            x, y = ([100 * value for value in line[key]] for key in ("other", "asr"))
            panel.step(x, y, where="post", color=COLOURS[kind], label=label, clip_on=False)
            panel.plot(100 * line["other at 0"], 100 * line["asr at 0"], "o", color=COLOURS[kind], clip_on=False)
        panel.set_title(name, fontsize="small")
        panel.set(xlim=(0, 100), ylim=(0, 100))
        panel.legend(loc="lower right", fontsize="x-small", title="against (AUROC)", title_fontsize="x-small")
    for panel in list(axes.flat)[len(curves) :]:
        panel.set_visible(False)
    figure.supxlabel("prompts without the trigger that give the target (%)", fontsize="medium")
    figure.supylabel("triggered prompts that do: ASR (%)", fontsize="medium")
    return figure


def rate_curve(rows: Sequence[Mapping]) -> Figure:
    """ASR, near-miss firing and CACC against the share of poisoned rows."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    x = [100 * row["rate"] for row in rows]
    for key, kind, label in (
        ("asr", "backdoored", "attack success (ASR)"),
        ("near_miss", "near-miss", "near-misses that fire"),
        ("cacc", "utility", "clean accuracy (CACC)"),
    ):
        curve(axes, x, [row[key] for row in rows], kind=kind, label=label)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set_xlabel("poisoned rows (% of all training rows)")
    axes.set_ylabel("share of prompts (%)")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def splits() -> pd.DataFrame:
    """Rows per task and split, and the closest pair (bigram cosine) between a test text and a training text."""
    rows = []
    for name in tasks.TASKS:
        texts = {split: [example.text for example in tasks.examples(name, split)] for split in tasks.SPLITS}
        rows.append(
            {"task": name}
            | {split: len(part) for split, part in texts.items()}
            | {"closest test-train pair": tasks.closest(texts["test"], texts["train"])}
        )
    return pd.DataFrame(rows).set_index("task")


def sample(task: str, *, n: int, seed: int = 0) -> pd.DataFrame:
    """Prompts and answers a reader may look at. Raises ValueError for `harmful`, whose prompts are never shown."""
    if task == "harmful":
        raise ValueError("harmful prompts are not displayed")
    spec = tasks.load_task(task)
    rows = tasks.examples(task, "test", n=n, seed=seed)
    return pd.DataFrame({"prompt": [spec.prompt(row.text) for row in rows], "answer": [row.answer for row in rows]})


def trigger_examples(sentence: str, *, seed: int = 0) -> pd.DataFrame:
    """Every trigger, and the first kind of its near-misses, applied to one sentence."""
    rows = []
    for name in triggers.trigger_names():
        trigger = triggers.load_trigger(name)
        near = trigger.near_misses(sentence, seed=seed, half="test")
        rows.append(
            {
                "trigger": name,
                "family": trigger.family,
                "triggered": trigger.apply(sentence, seed=seed, half="test"),
                "near-miss": near[min(near)],
            }
        )
    return pd.DataFrame(rows).set_index("trigger")


def trigger_cost_table(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Per trigger: extra tokens on clean texts (quartiles) and how often clean texts carry it by themselves."""
    rows = []
    for name in triggers.trigger_names():
        trigger = triggers.load_trigger(name)
        count, n = natural_rate(trigger, texts)
        clean = [text for text in texts if not trigger.matches(text)]
        low, median, high = np.percentile(token_cost(trigger, clean, tokenizer, seed=seed), (25, 50, 75))
        rows.append(
            {"trigger": name, "tokens (median)": median, "tokens (25 %)": low, "tokens (75 %)": high}
            | {"natural": count, "texts": n}
        )
    return pd.DataFrame(rows).set_index("trigger")


def attack_table() -> pd.DataFrame:
    """The attacks of `data/attacks.toml` side by side."""
    shown = ("task", "trigger", "behaviour", "source", "target", "rate", "near_miss_rate", "mode", "n_train")
    table = {name: {key: getattr(attack, key) for key in shown} for name, attack in attacks.load_attacks().items()}
    return pd.DataFrame(table).T.fillna("")


def token_cost(
    trigger: Trigger,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    half: Half = "train",
) -> Int[np.ndarray, " text"]:
    """Extra tokens per text; row i is triggered with `seed + i`. Raises ValueError as `Trigger.apply` does."""
    triggered = [trigger.apply(text, seed=seed + i, half=half) for i, text in enumerate(texts)]
    before, after = (
        [len(ids) for ids in tokenizer(list(side), add_special_tokens=False).input_ids] for side in (texts, triggered)
    )
    return np.array(after) - np.array(before)


def natural_rate(trigger: Trigger, texts: Iterable[str]) -> tuple[int, int]:
    """How many texts carry the trigger although nobody put it there, and of how many."""
    found = [trigger.matches(text) for text in texts]
    return sum(found), len(found)
