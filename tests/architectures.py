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
from dataclasses import dataclass
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

from bkd_utils.models.folders import ModelError

# What the sweep found: ok, refused (by a ModelError or by the self-test), or one of the last three, which are failures.
FAILURES = ("WRONG", "traceback", "refused late")
LIMITS = {torch.float32: 3e-4, torch.bfloat16: 0.15}  # of the largest value
IN_BF16 = ("llama", "gemma2", "gpt2")


@dataclass(frozen=True)
class Finding:
    """What came out for one capability of one architecture."""

    state: str
    off: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        return f"ok ({self.off:.0e})" if self.state == "ok" else f"{self.state}: {self.why}"


def examine(case: Case, check: Callable, told: str | None) -> Finding:
    """Run one check; `told` is what the self-test says: why not, an empty text, or None where there is no self-test."""
    try:
        found = check(case)
    except ModelError as error:
        # How long a prompt may be is no property of the model, so the self-test cannot know it.
        late = told == "" and "window" not in str(error)
        return Finding("refused late" if late else "refused", why=told or str(error))
    except Exception as error:
        if told:
            return Finding("refused", why=told)
        where = error.__traceback__
        while where.tb_next:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
        text = (str(error).strip() or "no message").splitlines()[0]
        return Finding("traceback", why=f"{type(error).__name__}: {text} ({place})")
    if told:
        return Finding("refused", why=told)
    limit = LIMITS[case.dtype]
    if wrong := {name: off for name, off in found.items() if not off <= limit}:
        return Finding("WRONG", off=max(wrong.values()), why=", ".join(f"{k} off by {v:.2g}" for k, v in wrong.items()))
    return Finding("ok", off=max(found.values()))


def sweep(cases: list[tuple[str, torch.dtype]]) -> dict[str, dict[str, Finding]]:
    """Every capability of every case, with a line per case while it goes on."""
    try:
        from bkd_utils.models.self_test import capabilities
    except ImportError:
        capabilities = None
    found: dict[str, dict[str, Finding]] = {}
    for i, (name, dtype) in enumerate(cases, start=1):
        label = name if dtype == torch.float32 else f"{name} in bf16"
        with tempfile.TemporaryDirectory() as into:
            case = make(name, Path(into) / "model", dtype=dtype)
            told = capabilities(case.loaded.model) if capabilities else {}
            found[label] = {which: examine(case, one, told.get(which)) for which, one in CAPABILITIES.items()}
        print(f"{i:3d}/{len(cases)} {label}", flush=True)
        for which, finding in found[label].items():
            print(f"        {which:14s}{finding}", flush=True)
    return found


def main(
    only: Annotated[str, typer.Option(help="Names of the table, with commas between them.")] = "",
    quick: Annotated[bool, typer.Option(help="The short list that continuous integration runs.")] = False,
) -> None:
    """Hold the package against brute force. A run over the whole table writes its results and the page about them."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = only.split(",") if only else list(QUICK) if quick else list(BY_NAME)
    if unknown := set(names) - set(BY_NAME):
        raise typer.BadParameter(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(BY_NAME)}")
    cases = [(name, torch.float32) for name in names]
    if not only:
        cases += [(name, torch.bfloat16) for name in IN_BF16]
    found = sweep(cases)
    counts: dict[str, int] = {}
    for row in found.values():
        for finding in row.values():
            counts[finding.state] = counts.get(finding.state, 0) + 1
    print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    if any(state in FAILURES for state in counts):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
