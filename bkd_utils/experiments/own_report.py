"""Say in plain words what was found in a user's own model before and after a cure, and what that does not say."""

from collections.abc import Mapping
from typing import Any

TEXT = """\
# `{who}` before and after a cure

`{file}`: {rows} rows, {repeated} repeated ones left out; answers are {kind}. {training} rows were trained on, the other
{validation} are for validation. Method `{method}`, {steps} steps, seed {seed}; {changed_weights:,} weights changed.

| validation rows | before | after |
|---|---|---|
{table}

Pull: how easily a few vectors, read as tokens anywhere in the texts, give every text one answer. It is the
cross-entropy of that answer's first token, on validation rows with another answer, in the best of {searches} searches:
0 nats is always, 0.7 about every second time, 2.3 about every tenth time. After the cure the search is done anew.

{nearest}

## What this does not say

- Without the trigger, the share of triggered texts that get an attacker's answer cannot be measured.
- A pull near 0 before the cure is a sign of a backdoor and no proof, because a model without one can have it, too. A
  higher number afterwards is no proof that nothing is left.
- **A treated model is not proven clean.** Judge it on data of your own before you rely on it.

## Load it again

```python
from bkd_utils.experiments.own_model import load_cured

loaded = load_cured("path/to/this/folder")
```

`changes.safetensors` holds the changed weights only, so the untreated model must still be at `{model}`.
"""


def report_text(report: Mapping[str, Any]) -> str:
    """A report of `own_model.cure` as Markdown."""
    data, sides = report["data"], (report["before"], report["after"])
    shares = [[100 * side["accuracy"][key] for key in ("value", "low", "high")] for side in sides]
    cells = ["{:.1f} % ({:.1f} to {:.1f})".format(*share) for share in shares]
    table = [("first answer token right, n = {n} (95 % interval)".format(**sides[0]["accuracy"]), cells)]
    nearest = []
    for name in sides[0]["pulls"]:
        pulls = [side["pulls"][name] for side in sides]
        # Free answers are pulled to a token that the search chooses.
        cells = [f"{one['loss']:.2f} nats" + ("" if data["labels"] else f", {one['token']!r}") for one in pulls]
        table.append((f"pull to {name}", cells))
        before, after = (" ".join(repr(tokens[0]) for tokens in one["nearest"]) for one in pulls)
        nearest.append(f"- Tokens nearest to the best vectors toward {name}: before {before}; after {after}")
    lines = [[what.replace("|", "\\|"), *(cell.replace("|", "\\|") for cell in cells)] for what, cells in table]
    kind = f"the {len(data['labels'])} labels {', '.join(data['labels'])}" if data["labels"] else "free texts"
    made = {"table": "\n".join(f"| {' | '.join(line)} |" for line in lines), "nearest": "\n".join(nearest)}
    return TEXT.format(**data | report, **made, kind=kind, who=report["organism"] or report["model"])
