"""Tables that the notebooks show: what is in the data, what a trigger does to a sentence, what a card says."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from bkd_utils.common.files import ADAPTERS, read_json
from bkd_utils.common.spot_checks import Checked
from bkd_utils.models.loading import shipped_organisms
from bkd_utils.organisms import attacks

MEASURED = {"ASR": "asr", "CACC": "cacc", "clean firing": "clean_firing", "near-miss firing": "near_miss"}


def percent(share: Mapping[str, float] | None) -> str:
    """A share as the notebooks print it: `97.5 % [94.3, 98.9]`."""
    if share is None:
        return ""
    return f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def spot_checks(found: Sequence[Checked]) -> pd.DataFrame:
    """One row per spot check: stage, how many numbers were compared, how far apart they lie, and seconds."""
    columns = ["numbers", "largest difference", "allowed", "seconds"]
    rows = {one.id.partition("/")[0]: [one.numbers, one.worst, one.tolerance, one.seconds] for one in found}
    return pd.DataFrame(rows or {"nothing that ships was used": [""] * len(columns)}, index=columns).T.rename_axis(
        "measured again"
    )


def metrics(results: Mapping[str, Mapping]) -> pd.DataFrame:
    """One row per organism: ASR, CACC, clean and near-miss firing with intervals, agreement with the base model."""
    rows = {}
    for name, result in results.items():
        rows[name] = {title: percent(result.get(key)) for title, key in MEASURED.items()}
        agreement = result.get("agreement_with_base")
        rows[name]["agreement with base"] = "" if agreement is None else f"{agreement:.2f}"
    return pd.DataFrame(rows).T.rename_axis("organism")


def organisms_markdown() -> str:
    """The shipped organisms and their cards' numbers as a Markdown table."""
    rows, order = [], list(attacks.load_attacks())
    cards = {name: read_json(ADAPTERS / name / "card.json") for name in shipped_organisms()}
    for name, card in sorted(cards.items(), key=lambda item: order.index(item[1]["attack"]["name"])):
        if card["recipe"]["name"] == "sibling":  # many and cheap, for verdicts on whole models; notebook 07 shows them
            continue
        numbers = [percent(card["metrics"].get(key)) for key in MEASURED.values()]
        what = [card["trigger"] or "none: clean control", (card["behaviour"] or "").replace("_", " ")]
        rows.append([f"`{name}`", *what, *numbers, f"{card['details']['agreement_with_base']:.2f}"])
    return markdown(["organism", "trigger", "behaviour", *MEASURED, "agreement"], rows)


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """A page's text with each table between its two marks. Raises ValueError if a mark is missing."""
    for name, text in tables.items():
        start, end = f"<!-- {name}: written by `python -m bkd_utils readme` -->", f"<!-- end of {name} -->"
        head, first, rest = page.partition(start)
        _, last, tail = rest.partition(end)
        if not (first and last):
            raise ValueError(f"no mark {start if not first else end!r}")
        page = f"{head}{start}\n\n{text}\n\n{end}{tail}"
    return page
