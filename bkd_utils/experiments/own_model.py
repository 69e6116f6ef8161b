"""Cure a user's own model of unknown trigger with clean rows: measure it before and after, keep the changed weights."""

import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from bkd_utils.attention_alignment.rivals import Case, treat
from bkd_utils.attention_alignment.search import decoded, loss_toward, search, text_part
from bkd_utils.attention_alignment.searched_training import N_TOKENS, SEARCH
from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import WORK, UserError, atomic_path, check_writable, read_json, sha256_file, write_json
from bkd_utils.common.own_table import MOST_LABELS, OwnTable, read_table
from bkd_utils.common.statistics import share
from bkd_utils.common.validation import Name, check
from bkd_utils.experiments.attention_safety_alignment import RATES, recipe_of
from bkd_utils.experiments.head_safety import ANSWER_TOKENS
from bkd_utils.models.changes import apply_changes, changed_entries
from bkd_utils.models.context import check_fits
from bkd_utils.models.folders import CHANGES, DEFAULT_MODEL, ModelError, model_folder
from bkd_utils.models.generation import first_logits
from bkd_utils.models.identity import model_identity, short_name
from bkd_utils.models.loading import Loaded, adapter_folder, base_of, load, pick_device
from bkd_utils.models.tokens import Row, Turn, answer_ids, end_id, labels_of, prompt_ids
from bkd_utils.organisms.cards import write_treated

METHODS = ("searched", "searched, attention", "fine-tuning")
LENGTHS = (2, 3, 5)  # tokens of the perturbations that are searched for to measure a pull, one search each
N_JUDGED = 32  # validation rows on which a search is judged, at most
FREE = "one first token"  # in place of a label where answers are free
REPORT = "report.json"
JUDGES, LEAST_JUDGES = 5, 16  # one in so many rows is for validation, but at least so many
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


def cure(
    address: str = DEFAULT_MODEL,
    *,
    data: Path,
    organism: str | None = None,
    method: str = METHODS[0],
    out: Path | None = None,
    force: bool = False,
    steps: int = 128,
    rows: int = 1280,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Treat a model, or an organism of it, with at most `rows` rows of a CSV file; returns the folder of the result, by
    default below `work/cured`: changed weights, a report and its text; that of an organism is an organism again. Raises
    as `read_table`, `load` and `own_rows` do, ValueError for an unknown method, UserError for a full disk and for a
    folder that is there, unless a cure wrote it and `force` replaces it. Source: ours."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {'; '.join(METHODS)}")
    table, folder = read_table(data, limit=rows, seed=seed), model_folder(address)
    address = str(folder) if folder == Path(address).expanduser().resolve() else address  # it is read from elsewhere
    name = short_name(address) if organism is None else adapter_folder(organism).name
    target = Path(out or WORK / "cured" / name).expanduser().absolute()
    _check_target(target, force=force, organism=organism)
    loaded = load(address, organism=organism, device=device)
    _check_space(loaded, target)
    labels = label_tokens(loaded, table.labels)
    training, validation = own_rows(loaded, table, seed=seed)
    recipe = recipe_of(steps=steps, learning_rate=RATES[method])
    how = {"recipe": recipe, "pad_id": end_id(loaded.tokenizer), "labels": list(labels.values()), "seed": seed}
    asked = {"training": training, "validation": validation, "towards": labels or {FREE: None}, "seed": seed}
    report: dict[str, Any] = {"before": measure(loaded, **asked)}
    count = treat(Case(loaded.model, training, **how), method=method)
    report |= {"after": measure(loaded, **asked), "changed_weights": count, "searches": len(LENGTHS)}
    report["data"] = {"file": table.name, "sha256": table.sha256, "rows": len(table.entries), "labels": table.labels}
    report["data"] |= {"repeated": table.repeated, "training": len(training), "validation": len(validation)}
    report |= {"model": address, "identity": loaded.identity, "organism": loaded.organism, "method": method}
    report |= {"steps": steps, "batch_size": recipe.batch_size, "learning_rate": recipe.learning_rate, "seed": seed}
    _write(loaded, target, report | {"device": loaded.device.type, "versions": installed_versions()})
    return target


def cure_once(
    address: str, *, data: Path, organism: str | None, out: Path, steps: int, rows: int, seed: int
) -> dict[str, Any]:
    """The report of the cure in `out`, if it is of this model, organism, table, number of steps and seed; else of one
    that is made now and replaces it. Raises UserError in a replay (BKD_REPLAY) where it would have to be made, and as
    `cure` does."""
    name = organism and adapter_folder(organism).name
    same = {"identity": model_identity(address), "organism": name, "steps": steps, "seed": seed}
    known = read_json(out / REPORT) if (out / REPORT).is_file() else {}
    if {key: known.get(key) for key in same} == same and known["data"]["sha256"] == sha256_file(data):
        return known
    if os.environ.get("BKD_REPLAY"):
        raise UserError(f"{out} holds no cure of this model with these rows")
    cure(address, data=data, organism=organism, out=out, force=True, steps=steps, rows=rows, seed=seed)
    return read_json(out / REPORT)


def label_tokens(loaded: Loaded, labels: Sequence[str]) -> dict[str, int]:
    """Label -> first token of that answer. Raises ValueError if two begin alike, or a classifier has other labels."""
    own = labels_of(loaded.tokenizer)  # a classifier's tokenizer knows its labels; other models may answer anything
    if own and {name.strip().casefold() for name in own} != {name.casefold() for name in labels}:
        these = ", ".join(map(repr, labels)) or f"more than {MOST_LABELS}"
        raise ValueError(f"the labels of the model are {', '.join(map(repr, own))}, those of the data {these}")
    tokens: dict[str, int] = {}
    for label in labels:
        token = answer_ids(loaded.tokenizer, label)[0]
        if alike := [other for other, one in tokens.items() if one == token]:
            raise ValueError(f"the labels {alike[0]!r} and {label!r} begin with the same token; rename one of them")
        tokens[label] = token
    return tokens


def own_rows(loaded: Loaded, table: OwnTable, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those for validation: one in `JUDGES`, at least `LEAST_JUDGES`, drawn by the seed. Each
    label has its share of both. Free answers are cut at `ANSWER_TOKENS` tokens. Raises ModelError with the row for a
    prompt that does not fit the model, with room for its answer and a perturbation."""
    n = len(table.entries)
    order, n_judges = random.Random(f"{seed}/validation").sample(table.entries, n), max(LEAST_JUDGES, n // JUDGES)
    if table.labels:
        order.sort(key=lambda entry: entry.answer)
    chosen = {order[i * n // n_judges].number for i in range(n_judges)}
    training, validation = [], []
    for entry in table.entries:
        turn = Turn(table.template.replace("{text}", entry.text), text=entry.text)
        prompt = tuple(prompt_ids(loaded.tokenizer, turn))
        answer = tuple(answer_ids(loaded.tokenizer, entry.answer)[:ANSWER_TOKENS])
        try:
            check_fits(loaded.model, len(prompt) + len(answer) + max(N_TOKENS))
        except ModelError as error:
            raise ModelError(f"{table.name}, row {entry.number}: {error}") from error
        row = Row(prompt, answer, kind="clean", uid=str(entry.number), is_label=bool(labels_of(loaded.tokenizer)))
        (validation if entry.number in chosen else training).append(row)
    return training, validation


def measure(
    loaded: Loaded, *, training: Sequence[Row], validation: Sequence[Row], towards: Mapping[str, int | None], seed: int
) -> dict[str, Any]:
    """What validation rows say of a model: `accuracy` of the first answer token, and `pulls` by label, each the lowest
    `loss_toward` (nats), its token and the nearest tokens of each vector. Perturbations are searched for on training
    rows, `LENGTHS` for each first token in `towards` (None: the search chooses), with the same seeds every time."""
    likely = first_logits(loaded.model, [row.prompt for row in validation], end_id=end_id(loaded.tokenizer)).argmax(-1)
    hits = [token == row.answer[0] for token, row in zip(likely.tolist(), validation, strict=True)]
    # What all prompts share, because a prompt for validation may begin in another way than those for training.
    before, after = text_part([row.prompt for row in (*training, *validation)])
    pulls = {}
    for name, token in tqdm(towards.items(), desc="searching", unit="answer", mininterval=2, leave=False):
        others = [row for row in validation if row.answer[0] != token]
        judges, tried = random.Random(f"{seed}/judges").sample(others, min(N_JUDGED, len(others))), []
        for i, n_tokens in enumerate(LENGTHS):
            # Not a seed of `SearchedTraining`, whose perturbations the model has been trained against.
            own = seed * 1_000_003 + 1_000_000 + i
            found = search(loaded.model, training, toward=token, n_tokens=n_tokens, seed=own, **SEARCH)
            found = replace(found, before=before, after=after)
            tried.append((loss_toward(loaded.model, judges, found, seed=seed), i, found))
        loss, _, best = min(tried)
        pulls[name] = {"loss": loss, "token": loaded.tokenizer.decode([best.toward])}
        pulls[name]["nearest"] = decoded(loaded.model, loaded.tokenizer, best)
    return {"accuracy": share(hits), "pulls": pulls}


def load_cured(folder: str | Path, *, device: str = "auto") -> Loaded:
    """The treated model of a folder that `cure` wrote. Raises ModelError for another folder, or if its changes or the
    untreated model are not those of its report."""
    folder = Path(folder).expanduser().absolute()
    if not _is_cured(folder):
        raise ModelError(f"{folder} is no folder that a cure has written: {REPORT} or {CHANGES} is missing")
    report = read_json(folder / REPORT)
    if sha256_file(folder / CHANGES) != report["changes_sha256"]:
        raise ModelError(f"{folder / CHANGES} does not match the sha256 in {REPORT}; cure the model again")
    if report["organism"] is not None:
        return load(report["model"], organism=folder, device=device)
    loaded = load(report["model"], device="cpu")
    if loaded.identity != report["identity"]:
        raise ModelError(f"{report['model']} holds another model than the one that was treated")
    apply_changes(loaded.model, folder)
    loaded.model.to(pick_device(device))
    return loaded


def _is_cured(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (REPORT, CHANGES))


def _check_target(target: Path, *, force: bool, organism: str | None) -> None:
    """Raise UserError for a folder that is there and may not be replaced, or that cannot be written."""
    if organism is not None:
        check(Name, target.name, "name of the folder")  # it becomes that of an organism
    if target.exists() and not force:
        raise UserError(f"{target} is there already; choose another --out, or replace it with --force")
    if target.exists() and not _is_cured(target):
        raise UserError(f"{target} is not replaced, because no cure has written it")
    check_writable(target.parent)


def _check_space(loaded: Loaded, target: Path) -> None:
    """Raise UserError unless all weights, with a bit for each that tells whether it changed, fit on the disk."""
    need = loaded.model.num_parameters() * (4 + 1 / 8)
    free = shutil.disk_usage(target.parent).free
    if free < need:
        raise UserError(f"{target.parent} has {free / 1e9:.2f} GB left, the changes may need {need / 1e9:.2f} GB")


def _write(loaded: Loaded, target: Path, report: dict[str, Any]) -> None:
    """Write the changed weights, the report and its text; all or nothing."""
    treatment = {key: report[key] for key in ("method", "steps", "seed")} | {"rows": report["data"]["training"]}
    with atomic_path(target) as temporary:
        temporary.mkdir()
        try:
            if loaded.organism is None:
                changes = changed_entries(loaded.model, base_of(loaded, device="cpu").model)
                save_file(changes, temporary / CHANGES, metadata={"format": "pt"})
            else:
                write_treated(loaded, temporary, name=target.name, treatment=treatment, measured={})
        except SafetensorError as error:  # as for a full disk
            raise UserError(f"{target} cannot be written: {error}") from error
        report["changes_sha256"] = sha256_file(temporary / CHANGES)
        write_json(temporary / REPORT, report)
        (temporary / "README.md").write_text(report_text(report), encoding="utf-8")


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
