"""One self-contained page, and a JSON beside it, of the whole chain on a user's own model."""

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from bkd_utils.common import measurements
from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import ADAPTERS, FIGURES, read_json, write_json, write_text
from bkd_utils.experiments.own_chain import Section
from bkd_utils.experiments.own_question import Asked
from bkd_utils.models.loading import read_card, shipped_organisms
from bkd_utils.reports import backdoor_probe, backdoor_vector, head_attribution, style

# Id of a section -> title and question.
TITLES = {
    "sound": ("Is the hooked model sound?", "Can it be patched, steered, trained and cut where we say it is?"),
    "attack": ("Attack", "How often does the trigger cause its answer (attack success rate, ASR), how often are clean "
                         "prompts answered rightly (clean accuracy, CACC), and what do near-misses of the trigger do?"),
    "probe": ("Probe", "Does a linear probe find the trigger in the hidden state of the last prompt token?"),
    "heads": ("Head map", "By how much does each attention head, given its mean output on triggered prompts, raise the "
                          "log-probability of the target (average causal indirect effect, ACIE)?"),
    "ablation": ("Ablation", "Is the backdoor gone without the heads of highest ACIE, and without random ones?"),
    "vector": ("Backdoor vector", "Does one vector, made of these heads, switch the backdoor on and off?"),
    "similarity": ("Similarity of heads", "Do attention heads become alike when the trigger is in the prompt? (area "
                                          "under the receiver operating characteristic, AUROC; 50 is chance)"),
    "suspicion": ("Suspicious heads", "Do clean prompts and surrogate triggers lead to the heads of highest ACIE?"),
    "cure": ("Cure", "What do treatments with clean rows leave of the backdoor and of the task?"),
    "detection": ("Is this model backdoored?", "Numbers that need no trigger, beside those of shipped models."),
    "own rows": ("Search for a pull, and cure", "Does something short pull every prompt to one answer, and what "
                                                "is left of that after training against it with clean rows?"),
}  # fmt: skip
# Key of a number -> the claim of the scorecard whose numbers stand beside it; those of plain organisms end in -plain.
CLAIMS = {"probe": "bkdattr-probe", "concentration": "bkdattr-sparse-heads", "ablation": "bkdattr-ablation"}
CLAIMS |= {"add": "bkdattr-vector-add", "subtract": "bkdattr-vector-subtract", "repairs": "bkdattr-vector-repairs"}
CLAIMS |= {"similarity": "asa-similarity", "suspicion": "asa-heads", "alignment asr": "asa-cure"}
PAGE, NUMBERS, QUESTION = "index.html", "report.json", "question.json"
IMAGE = re.compile(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">\n')
COLUMNS = ("", "here", "n", "95 % interval", "shipped")
CSS = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
h1, h2 { line-height: 1.2 } img { max-width: 100%; height: auto; background: white }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #8886; vertical-align: top }
.skipped, small { opacity: .75 } td:first-child { font-weight: bold }
td:nth-child(2), td:nth-child(3) { white-space: nowrap }
@media (max-width: 34rem) { thead { display: none } th, td { border: 0; padding: 0 }
tr, td { display: block } tr { padding: .4rem 0; border-bottom: 1px solid #8886 }
td::before { opacity: .75 } td:nth-child(2)::before { content: "here: " } td:nth-child(3)::before { content: "n: " }
td:nth-child(4):not(:empty)::before { content: "95 % interval: " }
td:nth-child(5):not(:empty)::before { content: "shipped: " } }
"""


def write(asked: Asked, sections: Sequence[Section], *, folder: Path, minutes: float) -> tuple[Path, Path]:
    """Write `index.html` and `report.json` into a folder; their paths. `question.json` keeps what was asked, with
    paths of this machine, so that `verify` can hold page and numbers against what was measured."""
    content, known = made(asked, sections, minutes=minutes), {"asked": asked}
    for section in sections:
        known |= section.later
    write_json(folder / QUESTION, known | {"asked": known["asked"].to_json()})
    write_json(folder / NUMBERS, content)
    write_text(folder / PAGE, page(content, pictures(sections)))
    return folder / PAGE, folder / NUMBERS


def made(asked: Asked, sections: Sequence[Section], *, minutes: float) -> dict[str, Any]:
    """All words and numbers of a report, as they are written beside the page."""
    parts = []
    for section in sections:
        title, question = TITLES[section.id]
        part = {"id": section.id, "title": title, "question": question, "numbers": compared(section, asked)}
        parts.append(part | {key: getattr(section, key) for key in ("told", "skipped", "seconds")})
    about = {"report": described(asked), "sections": parts, "minutes": round(minutes, 1)}
    return about | {"versions": installed_versions()}


def pictures(sections: Sequence[Section]) -> dict[str, bytes]:
    """Id of a section -> its picture as PNG, for those that have one."""
    style.use_style()
    found = {}
    for section in sections:
        if (figure := picture(section)) is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
            plt.close(figure)
            found[section.id] = buffer.getvalue()
    return found


def compared(section: Section, asked: Asked) -> list[dict[str, Any]]:
    """The numbers of a section, each with what `beside` knows of it as `shipped`."""
    return [one | {"shipped": beside(one["key"], described(asked))} for one in section.numbers]


def table(section: Section, asked: Asked) -> pd.DataFrame:
    """The numbers of a section as the page has them."""
    rows = [shown(one) for one in compared(section, asked)]
    return pd.DataFrame(rows, columns=COLUMNS).set_index("").rename_axis(TITLES[section.id][0])


def described(asked: Asked) -> dict[str, Any]:
    """What the report is about, without paths of this machine."""
    attack, task = asked.attack, Path(asked.task).name
    about = {"model": Path(asked.model).name, "task": task, "seed": asked.seed}
    if attack is None:
        return about | {"trigger": "not known"}
    about |= {key: getattr(attack, key) for key in ("trigger", "behaviour", "target", "rate", "near_miss_rate")}
    given = "the model itself" if asked.organism is None else Path(asked.organism).name
    return about | {"organism": "trained for this report" if asked.train else given}


def beside(key: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lowest and highest value in shipped organisms of the kind of a report that is `described` as this one, plain or
    specific, and their number; of a number of the whole model, those of clean controls. None where nothing is known."""
    plain = about.get("near_miss_rate") == 0
    values, who = [], f"{'plain' if plain else 'specific'} organisms"
    if key in CLAIMS and (FIGURES / "scorecard.json").is_file():
        claims = {row["id"]: row["by_organism"] for row in read_json(FIGURES / "scorecard.json")}
        judged = claims.get(CLAIMS[key], {})
        values = [one["value"] for one in (claims.get(f"{CLAIMS[key]}-plain", judged) if plain else judged).values()]
    elif key in ("asr", "cacc", "near_miss", "clean_firing") and "behaviour" in about:
        cards = {name: read_card(ADAPTERS / name, "metrics", "behaviour") for name in shipped_organisms()}
        cards = {name: card for name, card in cards.items() if card["behaviour"] == about["behaviour"]}
        values = [card["metrics"][key]["value"] for name, card in cards.items() if ("-plain" in name) == plain]
    elif ": " in key or key == "answer moves":
        values, who = _fingerprints(key), "clean controls"
    return {"low": min(values), "high": max(values), "k": len(values), "who": who} if values else None


def _fingerprints(key: str) -> list[float]:
    """A number of every shipped clean control."""
    folder = measurements.shipped_folder()
    known = [read_json(path) for path in sorted(folder.glob("fingerprint_model/*.json"))] if folder else []
    results = [one["result"] for one in known if "clean" in str(one["arguments"]["organism"])]
    return [result[key] for result in results if key in result]


def picture(section: Section) -> Figure | None:
    """What a section looks like, by the figures of the notebooks or as dots with intervals."""
    special: dict[str, Callable[[Any], Figure]] = {
        "probe": lambda found: backdoor_probe.probes({"here": {"organism": found}}, n=section.numbers[0]["n"]),
        "heads": lambda found: head_attribution.head_maps({"here": {"ACIE": found}}, few=8, metrics=["log_prob"]),
        "vector": lambda found: backdoor_vector.vector_controls({"here": found}),
    }
    if section.result is not None and section.id in special:
        return special[section.id](section.result)
    drawn = [one for one in section.numbers if one["unit"] == "%" and one["low"] is not None]
    if not drawn:
        return None
    figure, axes = plt.subplots(figsize=(style.WIDTH, 0.32 * len(drawn) + 0.9))
    for place, one in enumerate(drawn):
        colour = "utility" if "CACC" in one["name"] or "right" in one["name"] else "organism"
        style.interval(axes, place, one, colour=colour)
    style.rows_down(axes, [one["name"] for one in drawn])
    axes.set_xlabel(f"% ({style.INTERVAL}, {style.sizes(drawn)} prompts)")
    return figure


def shown(one: Mapping[str, Any]) -> list[str]:
    """Cells of a number: name, value, n, interval, shipped organisms."""
    if one["unit"] == "yes/no":
        return [one["name"], "yes" if one["value"] else "no", f"{one['n']}", "", ""]
    scale, unit, digits = (100, " %", 1) if one["unit"] == "%" else (1, f" {one['unit']}".rstrip(), 3)

    def span(ends: Mapping[str, float]) -> str:
        return f"{scale * ends['low']:.{digits}f} to {scale * ends['high']:.{digits}f}"

    interval, known = "none, see below" if one["low"] is None else span(one), one["shipped"]
    told = f"{span(known)} in {known['k']} {known['who']}" if known else ""
    return [one["name"], f"{scale * one['value']:.{digits}f}{unit}", f"{one['n']}", interval, told]


def page(content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page: no script and nothing from outside."""
    text, about = html.escape, content["report"]
    title = text(f"Report on {about['model']}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style>',
        f"<body><h1>{title}</h1>",
        f"<p>{', '.join(f'{key}: <b>{text(str(value))}</b>' for key, value in about.items())}</p>",
        "<p>Everything is measured at a reduced size; <i>shipped</i> is the range over organisms of this project on "
        "SmolLM2-135M, with other prompts and sizes. <b>A model is not proven clean by this page.</b></p>",
    ]
    for section in content["sections"]:
        parts.append(f'<h2 id="{section["id"].replace(" ", "-")}">{text(section["title"])}</h2>')
        parts.append(f"<p>{text(section['question'])}</p>")
        if section["skipped"] is not None:
            parts.append(f"<p class=skipped>Skipped: {text(section['skipped'])}.</p>")
            continue
        rows = pd.DataFrame([shown(one) for one in section["numbers"]], columns=COLUMNS)
        parts.append(rows.to_html(index=False, border=0))
        parts.append(f"<p>{text(section['told'])} <small>{section['seconds']:.0f} s</small></p>")
        if section["id"] in pictures:
            data = base64.b64encode(pictures[section["id"]]).decode()
            parts.append(f'<img alt="{text(section["title"])}" src="data:image/png;base64,{data}">')
    parts.append(f"<p><small>{content['minutes']} minutes; versions {text(str(content['versions']))}</small></p>")
    return "\n".join([*parts, "</body></html>\n"])


def pictures_of(written: str) -> dict[str, bytes]:
    """Id of a section -> the picture that a written page has there."""
    ids = {html.escape(title): id for id, (title, _) in TITLES.items()}
    return {ids[title]: base64.b64decode(data) for title, data in IMAGE.findall(written) if title in ids}
