"""The page of all claims as a table to sort and filter, from `figures/scorecard.json`."""

from collections import Counter
from html import escape
from pathlib import Path
from string import Template

from bkd_utils.common.files import FIGURES, read_json

COLUMNS = ("claim", "paper", "reading", "verdict", "passes", "published", "our criterion", "figure")
CHOICES = ("paper", "verdict", "reading")
PASSED = {True: "pass", False: "fail", None: "undecided"}


def page() -> str:
    """A row for each claim; the organisms behind it fold out."""
    rows = read_json(FIGURES / "scorecard.json")
    heads = "".join(f'<th><button type="button">{name}</button></th>' for name in COLUMNS)
    choices = "".join(_choice(name, sorted({row[name] for row in rows if row[name]})) for name in CHOICES)
    text = Template(Path(__file__).with_name("scorecard.md").read_text(encoding="utf-8"))
    return text.substitute(choices=choices, heads=heads, rows="".join(map(_row, rows)))


def _choice(name: str, values: list[str]) -> str:
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>'


def _row(row: dict) -> str:
    passed = Counter(PASSED[one["passed"]] for one in row["by_organism"].values())
    each = "".join(f"<li>{escape(name)}: {_number(one)}</li>" for name, one in row["by_organism"].items())
    counted = f"{passed['pass']} of {len(row['by_organism'])}"
    folded = f"<details><summary>{counted}</summary><ul>{each}</ul><p>{escape(row['reason'])}</p></details>"
    cells = {
        "claim": f"<strong>{escape(row['claim'])}</strong><br><code>{row['id']}</code>",
        "paper": escape(row["paper"]),
        "reading": escape(row["reading"]),
        "published": f"{escape(row['published'])}<br><small>{escape(row['provenance'])}</small>",
        "our criterion": escape(row["criterion"]),
        "passes": folded,
        "verdict": f'<span class="verdict {row["verdict"]}">{row["verdict"]}</span>',
        "figure": f'<a href="gallery.html#{row["figure"]}">{row["figure"]}</a>',
    }
    share = passed["pass"] / max(len(row["by_organism"]), 1)
    order = {"passes": f' data-order="{share:.6f}"'}
    made = "".join(f'<td data-name="{name}"{order.get(name, "")}>{cells[name]}</td>' for name in COLUMNS)
    kept = " ".join(f'data-{name}="{escape(row[name])}"' for name in CHOICES)
    return f'<tr id="{row["id"]}" {kept}>{made}</tr>\n'


def _number(one: dict) -> str:
    if one["value"] is None:
        return f"not measured, {PASSED[one['passed']]}"
    interval = "" if one["low"] is None else f" [{one['low']:.3g}, {one['high']:.3g}]"
    return f"{one['value']:.3g}{interval}, n = {one['n']}, {PASSED[one['passed']]}"
