"""Published claims, our criteria, our numbers, a verdict each. The criteria are in `data/published.toml`.

Here are the lines of the scorecard; what passes a criterion is decided in `judge_bkdattr` and `judge_asa`.

A criterion is passed or not by each organism; the verdict is `holds` if all pass, `holds in part` if some do, and
`does not hold` if none does.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bkd_utils.common.files import DATA, FIGURES, UserError, read_json, write_json
from bkd_utils.reports import style

KEYS = {"paper", "claim", "published", "source", "sure", "measure", "unit", "criterion"}


def published() -> dict[str, dict[str, str]]:
    """Claim id -> paper, claim, published number, source, how sure we are, what is measured, criterion.

    Raises UserError if one lacks.
    """
    found = tomllib.loads((DATA / "published.toml").read_text(encoding="utf-8"))
    for name, entry in found.items():
        if set(entry) != KEYS:
            raise UserError(f"published.toml, {name}: keys must be {', '.join(sorted(KEYS))}")
    return found


def verdict(passed: Mapping[str, bool]) -> str:
    """One word for the outcomes of all organisms. Raises ValueError for none: that is no verdict."""
    if not passed:
        raise ValueError("a verdict over no organisms")
    return "holds" if all(passed.values()) else "holds in part" if any(passed.values()) else "does not hold"


def entry(
    claim: str,
    *,
    numbers: Mapping[str, Mapping[str, float]],
    passed: Mapping[str, bool],
    reason: str,
    figure: str,
    weakest: str | None = None,
) -> dict:
    """One line of the scorecard. `numbers` and `passed` are by organism; `ours` is that of `weakest`, by default the
    first organism that fails, or else the first."""
    known = published()
    if claim not in known:
        raise ValueError(f"unknown claim {claim!r}; known: {', '.join(known)}")
    outcome = verdict(passed)
    shown = weakest or next((name for name, ok in passed.items() if not ok), next(iter(passed)))
    return {
        "id": claim,
        "paper": known[claim]["paper"],
        "claim": known[claim]["claim"],
        "published": known[claim]["published"],
        "ours": {key: numbers[shown][key] for key in ("value", "n", "low", "high")},
        "organism": shown,
        "by_organism": {name: {**number, "passed": bool(passed[name])} for name, number in numbers.items()},
        "criterion": known[claim]["criterion"],
        "verdict": outcome,
        "reason": reason,
        "figure": figure,
    }


def record(entries: Sequence[Mapping]) -> Path:
    """Write entries into the scorecard beside the figures; those of the same claims are replaced."""
    path = style.folder() / "scorecard.json"
    write_json(path, merged(entries, path))
    return path


def merged(entries: Sequence[Mapping], path: Path) -> list[dict]:
    """Entries and, of a scorecard that may be there already, those of other claims, in the order of `published`."""
    order = list(published())
    kept = {row["id"]: row for row in read_json(path) if row["id"] in order} if path.is_file() else {}
    kept |= {row["id"]: dict(row) for row in entries}
    return sorted(kept.values(), key=lambda row: order.index(row["id"]))


def recorded() -> list[dict]:
    """The scorecard beside the figures of this run, or else the committed one. Raises UserError if there is none."""
    for path in (style.folder() / "scorecard.json", FIGURES / "scorecard.json"):
        if path.is_file():
            return read_json(path)
    raise UserError("no scorecard yet: notebooks 02 to 07 write it")


def scorecard(entries: Sequence[Mapping], *, paper: str) -> pd.DataFrame:
    """What notebook 09 shows of one paper: claims, published numbers, ours with interval and n, verdicts and why.

    Empty if none of the paper's claims was judged, as after a run of some notebooks only.
    """
    columns = ["claim", "published", "ours", "criterion", "verdict", "organisms that pass", "because", "figure"]
    rows = [
        {
            "claim": row["claim"],
            "published": row["published"],
            "ours": ours(row),
            "criterion": row["criterion"],
            "verdict": row["verdict"],
            "organisms that pass": _count(row["by_organism"]),
            "because": row["reason"],
            "figure": row["figure"],
        }
        for row in entries
        if row["paper"] == paper
    ]
    return pd.DataFrame(rows, columns=columns).set_index("claim")


def ours(row: Mapping) -> str:
    """What is measured, our number of a line, its interval if it has one, its n, and the organism it belongs to."""
    number, about = row["ours"], published()[row["id"]]
    low, value, high = (f"{number[key]:.3g}" for key in ("low", "value", "high"))
    interval = "" if low == value == high else f" [{low}, {high}]"
    return f"{about['measure']}: {value}{interval}, n = {number['n']} {about['unit']} ({row['organism']})"


def missing(entries: Sequence[Mapping]) -> pd.DataFrame:
    """Published claims without a line."""
    done = {row["id"] for row in entries}
    rows = {
        name: {"paper": one["paper"], "claim": one["claim"]} for name, one in published().items() if name not in done
    }
    return pd.DataFrame(rows, index=["paper", "claim"]).T


def markdown(entries: Sequence[Mapping]) -> str:
    """The table of the README."""
    lines = ["| paper | claim | published | here | verdict |", "|---|---|---|---|---|"]
    for row in entries:
        here = f"{ours(row)}; {_count(row['by_organism'])} pass"
        outcome = f"[{row['verdict']}](figures/{row['figure']}.png)"
        lines.append(f"| {' | '.join([row['paper'], row['claim'], row['published'], here, outcome])} |")
    return "\n".join(lines)


def table(entries: Sequence[Mapping]) -> pd.DataFrame:
    """What a notebook shows at its end: claim, published, verdict, organisms that pass, reason."""
    rows = [
        {
            "claim": row["claim"],
            "published": row["published"],
            "verdict": row["verdict"],
            "organisms that pass": _count(row["by_organism"]),
            "because": row["reason"],
        }
        for row in entries
    ]
    return pd.DataFrame(rows).set_index("claim")


def _count(by_organism: Mapping[str, Mapping]) -> str:
    return f"{sum(one['passed'] for one in by_organism.values())} of {len(by_organism)}"


def numbers(entries: Sequence[Mapping]) -> pd.DataFrame:
    """Our number of every claim and organism with its interval."""
    rows = {
        row["id"]: {
            name: f"{one['value']:.3g} [{one['low']:.3g}, {one['high']:.3g}]" + ("" if one["passed"] else " ✗")
            for name, one in row["by_organism"].items()
        }
        for row in entries
    }
    return pd.DataFrame(rows).T.rename_axis("claim")


def span(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Lowest to highest value, for a reason."""
    values = [number["value"] for number in numbers.values()]
    return f"{min(values):.2f} to {max(values):.2f}"
