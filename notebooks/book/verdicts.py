"""The page of all claims as a table to sort and filter, from `figures/scorecard.json`."""

from collections import Counter
from html import escape

from bkd_utils.common.files import FIGURES, read_json

COLUMNS = ("claim", "paper", "reading", "published", "our criterion", "passes", "verdict", "figure")
PASSED = {True: "pass", False: "fail", None: "undecided"}


def page() -> str:
    """A row for each claim; the organisms behind it fold out."""
    rows = read_json(FIGURES / "scorecard.json")
    heads = "".join(f'<th><button type="button">{name}</button></th>' for name in COLUMNS)
    choices = "".join(_choice(name, sorted({row[name] for row in rows if row[name]})) for name in ("paper", "verdict"))
    readings = _choice("reading", sorted({row["reading"] for row in rows if row["reading"]}))
    return f"""# Scorecard

Every claim that was checked, with the criterion that was fixed before the numbers were computed. A click on the head of a column sorts by it. *Passes* counts organisms, models that were backdoored on purpose, and folds out to each number with its 95 % interval. The same table without sorting is on [a page of its own](notebooks/pages/scorecard.md), and the numbers are in <a href="figures/scorecard.json">scorecard.json</a>.

```{{raw}} html
<form class="filters" id="filters">
<label>search <input type="search" name="text" autocomplete="off"></label>{choices}{readings}
<output id="shown"></output></form>
<div class="scorecard"><table id="claims"><thead><tr>{heads}</tr></thead><tbody>
{"".join(map(_row, rows))}</tbody></table></div>
<script src="_static/scorecard.js"></script>
```
"""


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
    kept = " ".join(f'data-{name}="{escape(row[name])}"' for name in ("paper", "verdict", "reading"))
    return f'<tr id="{row["id"]}" {kept}>{made}</tr>\n'


def _number(one: dict) -> str:
    if one["value"] is None:
        return f"not measured, {PASSED[one['passed']]}"
    interval = "" if one["low"] is None else f" [{one['low']:.3g}, {one['high']:.3g}]"
    return f"{one['value']:.3g}{interval}, n = {one['n']}, {PASSED[one['passed']]}"
