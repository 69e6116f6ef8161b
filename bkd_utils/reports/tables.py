"""Tables that the notebooks show: what is in the data, what a trigger does to a sentence, what a card says."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from bkd_utils.common.files import ADAPTERS, read_json
from bkd_utils.models.loading import shipped_organisms
from bkd_utils.organisms import attacks, tasks, triggers


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


def trigger_costs(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Per trigger: extra tokens on clean texts (quartiles) and how often clean texts carry it by themselves."""
    rows = []
    for name in triggers.trigger_names():
        trigger = triggers.load_trigger(name)
        count, n = triggers.natural_rate(trigger, texts)
        clean = [text for text in texts if not trigger.matches(text)]
        low, median, high = np.percentile(triggers.token_cost(trigger, clean, tokenizer, seed=seed), (25, 50, 75))
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


def control_of(attack: str) -> str:
    """Name of the clean control that belongs to an attack: same task, same recipe, no trigger."""
    return f"{attacks.load_attack(attack).task}-clean"


def percent(share: Mapping[str, float] | None) -> str:
    """A share as the notebooks print it: `97.5 % [94.3, 98.9]`."""
    if share is None:
        return ""
    return f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def metrics(results: Mapping[str, Mapping]) -> pd.DataFrame:
    """One row per organism: ASR, CACC, clean and near-miss firing with intervals, agreement with the base model."""
    names = {"asr": "ASR", "cacc": "CACC", "clean_firing": "clean firing", "near_miss": "near-miss firing"}
    rows = {
        name: {title: percent(result.get(key)) for key, title in names.items()}
        | {"agreement with base": f"{result['agreement_with_base']:.2f}" if "agreement_with_base" in result else ""}
        for name, result in results.items()
    }
    return pd.DataFrame(rows).T.rename_axis("organism")


def organisms_markdown() -> str:
    """The shipped organisms and their cards' numbers as a Markdown table, for the README."""
    lines = [
        "| organism | trigger | behaviour | ASR | CACC | clean firing | near-miss firing | agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    known = {name: read_json(ADAPTERS / name / "card.json") for name in shipped_organisms()}
    order = list(attacks.load_attacks())
    # The siblings are many and cheap, made for verdicts on whole models; notebook 07 shows them.
    chosen = [name for name, card in known.items() if card["recipe"]["name"] != "sibling"]
    for name in sorted(chosen, key=lambda one: order.index(known[one]["attack"]["name"])):
        card = known[name]
        numbers = [percent(card["metrics"].get(key)) for key in ("asr", "cacc", "clean_firing", "near_miss")]
        what = [card["trigger"] or "none: clean control", (card["behaviour"] or "").replace("_", " ")]
        agreement = f"{card['details']['agreement_with_base']:.2f}"
        lines.append(f"| {' | '.join([f'`{name}`', *what, *numbers, agreement])} |")
    return "\n".join(lines)


def with_tables(readme: str, tables: Mapping[str, str]) -> str:
    """The README with each table between its two marks. Raises ValueError if a mark is missing."""
    for name, text in tables.items():
        start, end = f"<!-- {name}: written by `python -m bkd_utils readme` -->", f"<!-- end of {name} -->"
        head, first, rest = readme.partition(start)
        _, last, tail = rest.partition(end)
        if not (first and last):
            raise ValueError(f"the README lacks {start if not first else end!r}")
        readme = f"{head}{start}\n\n{text}\n\n{end}{tail}"
    return readme
