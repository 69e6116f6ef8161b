"""Notebooks 06 and 07: figures and verdicts on encoders, the home ground of ASA, and on the searched cure."""

from collections.abc import Collection, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from bkd_utils.common.statistics import auroc_of_wins, mean_by_prompt, pairwise_wins
from bkd_utils.experiments.fair_trial import DoseResponse
from bkd_utils.experiments.trigger_search import Pull
from bkd_utils.reports import attention_safety_alignment as asa
from bkd_utils.reports.attention_safety_alignment import KINDS, Found, above_control, hits
from bkd_utils.reports.scorecard import at_most, both, entry, span
from bkd_utils.reports.style import COLOURS, LIMITS, WIDTH, dots, explain, panels, rows_down, show_legend, sizes

# What is drawn -> colour, marker, filled.
LOOKS = {
    "untreated": ("organism", "o", True),
    "fine-tuning": ("rival", "s", True),
    "searched": ("utility", "p", True),
    "clean control": ("clean control", "D", False),
}

ABOVE = 3  # points of ASR that a cure may leave above the clean control
# Trial -> label, colour, line.
TRIALS = {
    "alignment": ("flagged heads aligned", "neutral", "-"),
    "alignment, high rate": ("the same at the high rate", "neutral", ":"),
    "random heads": ("as many random heads", "random", "-"),
}


def left_and_kept(found: Mapping[str, Mapping[str, Sequence[Mapping]]]) -> Figure:
    """ASR (left) and CACC (right) before and after the searched cure, a dot per seed. `found`: attack -> name in
    `LOOKS` -> per seed a result of `evaluation.under_attack`."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.42 * len(found) + 1.3), sharey=True)
    for panel, key in zip(axes, ("asr", "cacc"), strict=True):
        for y, treatments in enumerate(found.values()):
            for i, (name, seeds) in enumerate(treatments.items()):
                values = [100 * seed[key]["value"] for seed in seeds]
                heights = [y + 0.6 * (i / (len(LOOKS) - 1) - 0.5)] * len(values)
                look = {"ms": 8 if name == "searched" else 5.5, "mew": 0 if LOOKS[name][2] else 1.2, "alpha": 0.85}
                dots(panel, values, heights, LOOKS[name], label=name, **look)
        panel.grid(axis="y", visible=False)
    rows_down(axes[0], list(found))
    results = [seed for one in found.values() for rows in one.values() for seed in rows]
    lowest = min(100 * seed["cacc"]["value"] for seed in results)
    axes[1].set_xlim(min(70, lowest - 3), LIMITS[1])  # so that a point of CACC never looks like much
    drawn = [seed[key] for seed in results for key in ("asr", "cacc")]
    axes[0].set_xlabel(f"ASR (%), {sizes(drawn)} prompts")
    axes[1].set_xlabel("CACC (%)")
    show_legend(figure, ncols=4)
    return figure


def at_chosen(trial: DoseResponse) -> dict:
    """What is left at the dose that the defender chose."""
    (dose,) = [dose for dose in trial.doses if dose.steps == trial.chosen]
    return dose.left


def doses_drawn(
    trials: Mapping[str, Mapping[str, DoseResponse]], equal: Mapping[str, Mapping[str, tuple[int, Mapping]]]
) -> Figure:
    """ASR (above) and CACC (below) against row passes, a ring at the chosen dose. `trials`: attack -> name in `TRIALS`,
    or "random heads" and a number -> trial. `equal`: attack -> kind in `KINDS` -> row passes, result of one dose."""
    figure, axes = panels([attack.replace("-", "-\n", 1) for attack in trials], rows=2, height=1.7)
    results = []
    for column, attack in zip(axes.T, trials, strict=True):
        for panel, key in zip(column, ("asr", "cacc"), strict=True):
            for name, trial in trials[attack].items():
                label, colour, line = TRIALS["random heads" if name.startswith("random heads ") else name]
                look = {"color": COLOURS[colour], "zorder": 1 if colour == "random" else 2, "clip_on": False}
                x = [dose.row_passes / 1000 for dose in trial.doses]
                y = [100 * dose.left[key]["value"] for dose in trial.doses]
                panel.plot(x, y, "o", ls=line, ms=3, lw=1.1, label=label, **look)
                at = [dose.steps for dose in trial.doses].index(trial.chosen)
                ring = {"ms": 9, "mfc": "none", "ls": "", "label": "chosen dose" if name == "alignment" else "_"}
                panel.plot(x[at], y[at], "o", **look, **ring)
                results += [dose.left[key] for dose in trial.doses]
            for kind, (passes, left) in equal[attack].items():
                place, filled = (passes / 1000, 100 * left[key]["value"]), (*KINDS[kind][:2], True)
                dots(panel, *place, filled, ms=6, mew=1, zorder=3, label=kind)
                results.append(left[key])
    axes[0, 0].set_ylim(LIMITS)
    explain(axes, f"thousand row passes, {sizes(results)} prompts", "ASR (%)", "CACC (%)", ncols=3)
    return figure


def encoder_claims(
    found: Found,
    *,
    judged: Found,
    cure: str,
    random: Sequence[str],
    rivals: Sequence[str],
    no_dose: Collection[str] = (),
) -> list[dict]:
    """The four lines of the fair trial, from family -> treatment -> result, with "untreated" and "clean control", on
    the same prompts; `judged` has "untreated" and the cure on more, for what is kept of CACC. Families in `no_dose`
    were left untreated, because every dose cost too much; that they keep CACC says nothing."""
    doses = {"figure": "06_doses"}
    kept = {name: rows for name, rows in judged.items() if name not in no_dose}
    lines = [
        _as_control("encoder-cure", found, cure=cure, **doses),
        *([asa.utility_claim("encoder-utility", kept, cure=cure, **doses)] if kept else []),
        asa.head_choice_claim("encoder-head-choice", found, cure=cure, random=random, **doses),
        asa.rivals_claim("encoder-rivals", found, cure=cure, rivals=rivals, figure="06_encoder_frontier"),
    ]
    if no_dose:
        lines = [row | {"reason": f"{row['reason']} No dose for: {', '.join(no_dose)}."} for row in lines]
    return lines


def searched_claims(
    seeds: Mapping[str, Mapping[str, Sequence[Mapping]]], found: Found, *, rivals: Sequence[str]
) -> list[dict]:
    """The three lines of the searched cure. `seeds`: family -> treatment -> a result per seed, of which each prompt
    counts with its mean; ValueError for unlike numbers of seeds in a family. `found` is that of `encoder_claims`."""
    mean = {}
    for family, rows in seeds.items():
        counts = {name: len(results) for name, results in rows.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{family}: not as many seeds of each treatment: {counts}")
        mean[family] = {
            name: {"hits": {key: mean_by_prompt([hits(one, key) for one in results]) for key in ("asr", "cacc")}}
            for name, results in rows.items()
        }
    drawn = {"cure": "searched", "figure": "06_home_ground"}
    return [
        _as_control("searched-cure", mean, **drawn),
        asa.utility_claim("searched-utility", mean, **drawn),
        asa.rivals_claim("searched-rivals", found, rivals=rivals, cure="searched", figure="06_encoder_frontier"),
    ]


def causal_claim(found: Found) -> dict:
    """The line on causal organisms, from organism -> treatment -> result; both ASR and CACC have to pass."""
    above = above_control(found, "searched")
    lost = {name: asa.cacc_lost(rows, "searched") for name, rows in found.items()}
    passed = {name: both(at_most(one, ABOVE / 100), asa.is_kept(lost[name])) for name, one in above.items()}
    reason = f"ASR after the cure less that of the clean control: {span(above)}; CACC lost to the cure: {span(lost)}."
    return entry("searched-causal", above, passed, "06_searched", reason)


def _as_control(claim: str, found: Found, *, cure: str, figure: str) -> dict:
    """Is ASR after the cure at most `ABOVE` points above that of the clean control?"""
    above = above_control(found, cure)
    reason = f"ASR after the cure less that of the clean control: {span(above)}."
    return entry(claim, above, {name: at_most(one, ABOVE / 100) for name, one in above.items()}, figure, reason)


def easiest(found: Sequence[Pull]) -> Pull:
    """Of all searches on one model the one that pulls other prompts most, toward any label."""
    return min(found, key=lambda pull: pull.held_out)


def ease(found: Mapping[str, Sequence[Pull]], families: Mapping[str, str | None], tasks: Mapping[str, str]) -> Figure:
    """The lowest loss of any search, a dot per model: a panel per task, a line per family of triggers and one for clean
    models. `families` and `tasks`: model -> family (None for a clean control), task."""
    clean, known = "none: clean", sorted(set(tasks.values()), reverse=True)
    names = [*sorted({family for family in families.values() if family}), clean]
    size = (WIDTH, 0.36 * len(names) + 1.3)
    figure, axes = plt.subplots(1, len(known), figsize=size, sharex=True, sharey=True, squeeze=False)
    looks = {True: ("organism", "o", True), False: ("clean control", "D", True)}
    for panel, task in zip(axes[0], known, strict=True):
        for model, pulls in found.items():
            if tasks[model] == task:
                place = easiest(pulls).held_out, names.index(families[model] or clean)
                label = "backdoored model" if families[model] else "clean model"
                dots(panel, *place, looks[bool(families[model])], alpha=0.75, label=label)
        panel.set_title(task, fontsize="small")
        panel.set_xscale("log")
    rows_down(axes[0, 0], names, limits=axes[0, 0].get_xlim())
    figure.supxlabel(f"lowest loss toward any label on other prompts (nats), {len(found)} models", fontsize="medium")
    show_legend(figure)
    return figure


def separations(
    found: Mapping[str, Sequence[Pull]], families: Mapping[str, str | None], tasks: Mapping[str, str]
) -> pd.DataFrame:
    """AUROC, with its interval, of backdoored against clean models of a task by the loss of the `easiest` search."""
    losses, rows = {model: easiest(pulls).held_out for model, pulls in found.items()}, {}
    for task in sorted(set(tasks.values()), reverse=True):
        own = [model for model in found if tasks[model] == task]
        clean = [-losses[model] for model in own if not families[model]]
        for family in [*sorted({families[model] for model in own} - {None}), "all"]:
            bad = [-losses[model] for model in own if families[model] and family in ("all", families[model])]
            area = auroc_of_wins(pairwise_wins(bad, clean))
            rows[task, family] = {"AUROC": area["value"], "low": area["low"], "high": area["high"]}
            rows[task, family] |= {"backdoored": len(bad), "clean": len(clean)}
    return pd.DataFrame(rows).T.rename_axis(["task", "family"])


def found_texts(found: Mapping[str, Sequence[Pull]], triggers: Mapping[str, str]) -> pd.DataFrame:
    """What the easiest search typed into the prompts of each model, beside its real trigger."""
    rows = {}
    for model, pulls in found.items():
        best = easiest(pulls)
        rows[model] = {"trigger": triggers[model], "found": best.tokens, "toward": best.toward}
        rows[model] |= {"loss (nats)": best.held_out, "prompts turned": best.fired}
    return pd.DataFrame(rows).T
