"""Cure a user's own model of unknown trigger with clean rows: measure it before and after, keep the changed weights."""

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from bkd_utils.attention_alignment.rivals import Case, treat
from bkd_utils.attention_alignment.search import decoded, loss_toward, search, text_part
from bkd_utils.attention_alignment.searched_training import SEARCH
from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import WORK, UserError, atomic_path, check_writable, read_json, sha256_file, write_json
from bkd_utils.common.own_table import read_table
from bkd_utils.common.statistics import share
from bkd_utils.common.validation import Name, check
from bkd_utils.experiments.attention_safety_alignment import RATES, recipe_of
from bkd_utils.experiments.own_report import report_text
from bkd_utils.experiments.own_rows import label_tokens, own_rows
from bkd_utils.models.changes import apply_changes, changed_entries
from bkd_utils.models.folders import CHANGES, DEFAULT_MODEL, ModelError, model_folder
from bkd_utils.models.generation import first_logits
from bkd_utils.models.identity import short_name
from bkd_utils.models.loading import Loaded, adapter_folder, base_of, load, pick_device
from bkd_utils.models.tokens import Row, end_id
from bkd_utils.organisms.cards import write_treated

METHODS = ("searched", "searched, attention", "fine-tuning")
LENGTHS = (2, 3, 5)  # tokens of the perturbations that are searched for to measure a pull, one search each
N_JUDGED = 32  # validation rows on which a search is judged, at most
FREE = "one first token"  # in place of a label where answers are free
REPORT = "report.json"


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
    """Treat a model, or an organism of it, with at most `rows` rows of a CSV file; returns the folder of the result.
    The folder, by default below `work/cured`, gets the changed weights, a report and its text; that of an organism is
    an organism again. An existing one is an error, unless a cure wrote it and it is replaced by `force`. Raises as
    `read_table`, `load` and `own_rows` do, ValueError for an unknown method, UserError for a full disk. Source:
    ours."""
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


def measure(
    loaded: Loaded, *, training: Sequence[Row], validation: Sequence[Row], towards: Mapping[str, int | None], seed: int
) -> dict[str, Any]:
    """What validation rows say of a model: `accuracy` of the first answer token, and `pulls` by label. Perturbations
    are searched for on training rows, `LENGTHS` for each first token in `towards` (None: the search chooses), with the
    same seeds every time. A pull is the lowest `loss_toward`, its token, and per vector of that perturbation the
    nearest tokens."""
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
    return {"accuracy": asdict(share(hits)), "pulls": pulls}


def load_cured(folder: str | Path, *, device: str = "auto") -> Loaded:
    """The treated model of a folder that `cure` wrote. Raises ModelError if the folder is none, if its changes are not
    those of its report, or if another model is where the untreated one was."""
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
    need = sum(parameter.numel() for parameter in loaded.model.parameters()) * (4 + 1 / 8)
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
