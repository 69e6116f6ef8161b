"""The sweep that holds the package against brute force, on a tiny random model of every architecture of the table.

    python tests/architectures.py                       # all of them, a few minutes
    python tests/architectures.py --only llama,gemma3_text
    python tests/architectures.py --quick               # the short list that continuous integration runs

`architecture_table.folder(name, into)` makes one of the models, `against_brute_force` has the checks.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

os.environ["HF_HUB_OFFLINE"] = "1"
if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # is read when tqdm is imported

import torch
import typer
from against_brute_force import CAPABILITIES, Case, make
from architecture_table import BY_NAME, QUICK
from transformers.utils import logging

from bkd_utils.common.files import ROOT, read_json, write_json
from bkd_utils.models.folders import ModelError
from bkd_utils.models.self_test import capabilities
from bkd_utils.reports.tables import markdown

# What the sweep found: ok, refused (by a ModelError or by the self-test), or one of the last three, which are failures.
FAILURES = ("WRONG", "traceback", "refused late")
LIMITS = {torch.float32: 3e-4, torch.bfloat16: 0.15}  # of the largest value
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "notebooks" / "pages" / "architectures.md"
LONGEST = 160  # letters of a message
IN_BF16 = ("llama", "gemma2", "gpt2")


@dataclass(frozen=True)
class Finding:
    """What came out for one capability of one architecture."""

    state: str
    off: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        return f"ok ({self.off:.0e})" if self.state == "ok" else f"{self.state}: {self.why}"


def short(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def asked(case: Case) -> dict[str, str]:
    """What the self-test says: capability -> why not, or an empty text."""
    try:
        return capabilities(case.loaded.model)
    except ModelError as error:  # refused at load
        return dict.fromkeys(CAPABILITIES, short(error))


def examine(case: Case, check: Callable, told: str | None) -> Finding:
    """Run one check; `told` is what the self-test says: why not, an empty text, or None where it does not test this."""
    try:
        found = check(case)
    except ModelError as error:
        # The self-test cannot know how long the prompts will be.
        late = told == "" and not case.known.limited
        return Finding("refused late" if late else "refused", why=told or short(error))
    except Exception as error:
        if told:
            return Finding("refused", why=told)
        where = error.__traceback__
        while where.tb_next:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
        return Finding("traceback", why=f"{type(error).__name__}: {short(error)} ({place})")
    if told:
        return Finding("refused", why=told)
    limit = LIMITS[case.dtype]
    if wrong := {name: off for name, off in found.items() if not off <= limit}:
        return Finding("WRONG", off=max(wrong.values()), why=", ".join(f"{k} off by {v:.2g}" for k, v in wrong.items()))
    return Finding("ok", off=max(found.values()))


def sweep(cases: dict[str, tuple[str, torch.dtype]]) -> dict[str, dict[str, Finding]]:
    """Every capability of every case, with a line per case while it goes on."""
    found: dict[str, dict[str, Finding]] = {}
    for i, (label, (name, dtype)) in enumerate(cases.items(), start=1):
        with tempfile.TemporaryDirectory() as into:
            case = make(name, Path(into) / "model", dtype=dtype)
            told = asked(case)
            found[label] = {which: examine(case, one, told.get(which)) for which, one in CAPABILITIES.items()}
        print(f"{i:3d}/{len(cases)} {label}", flush=True)
        for which, finding in found[label].items():
            print(f"        {which:14s}{finding}", flush=True)
    return found


def write(found: dict[str, dict[str, Finding]]) -> None:
    """Keep the results, and write the page about them."""
    rows = {name: {which: asdict(finding) for which, finding in row.items()} for name, row in found.items()}
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "transformer-lens")}
    write_json(RESULTS, {"versions": versions, "architectures": rows})
    PAGE.write_text(with_parts(PAGE.read_text(encoding="utf-8"), read_json(RESULTS)), encoding="utf-8")


def with_parts(text: str, results: dict) -> str:
    """The page's text with its generated parts between their marks. Raises ValueError if a mark is missing."""
    for name, part in page_parts(results).items():
        start, end = f"<!-- {name}: written by `python tests/architectures.py` -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs the marks {start} and {end}")
        head, tail = text.split(start)[0], text.split(end)[1]
        text = f"{head}{start}\n\n{part}\n\n{end}{tail}"
    return text


def page_parts(results: dict) -> dict[str, str]:
    """The parts of the page that are made of results: name of the part -> its Markdown."""
    rows, cells = results["architectures"], []
    columns = list(next(iter(rows.values())))
    reasons: dict[tuple[str, str], list[str]] = {}  # what is refused, why -> models
    for name, row in rows.items():
        shown = [f"{row[one]['off']:.0e}" if row[one]["state"] == "ok" else row[one]["state"] for one in columns]
        cells.append([name, *shown])
        failed = [one for one in columns if row[one]["state"] != "ok"]
        for why in dict.fromkeys(row[one]["why"] for one in failed):
            which = [one for one in failed if row[one]["why"] == why]
            what = ", ".join(which) if which != columns else "everything, when it is loaded"
            reasons.setdefault((what, why.replace("|", " ")), []).append(name)
    whole = sum(all(row[one]["state"] == "ok" for one in columns if one != "bridge") for row in rows.values())
    versions = ", ".join(" ".join(pair) for pair in results["versions"].items())
    counts = (
        f"{len(rows)} models were tried. {whole} of them can do everything that the notebooks need. With {versions}."
    )
    why = [[*key, ", ".join(names)] for key, names in reasons.items()]
    return {
        "proven": f"{counts}\n\n{markdown(['model', *columns], cells)}",
        "refused": markdown(["what", "reason", "models"], why),
    }


def main(
    only: Annotated[str, typer.Option(help="Names of the table, with commas between them.")] = "",
    quick: Annotated[bool, typer.Option(help="The short list that continuous integration runs.")] = False,
) -> None:
    """Hold the package against brute force. A run over the whole table writes its results and the page about them."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = {name: (name, torch.float32) for name in BY_NAME}
    known |= {f"{name} in bf16": (name, torch.bfloat16) for name in IN_BF16}
    names = only.split(",") if only else [*QUICK] if quick else [*known]
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    cases = {name: known[name] for name in names}
    found = sweep(cases)
    counts: dict[str, int] = {}
    for row in found.values():
        for finding in row.values():
            counts[finding.state] = counts.get(finding.state, 0) + 1
    print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    failed = any(state in FAILURES for state in counts)
    if not (only or quick):
        write(found)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
