"""What a user's report is about: a model, an organism or an adapter of it, an attack or none, rows and sizes."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bkd_utils.common.files import WORK, atomic_path, canonical_json, sha256_text
from bkd_utils.common.results import plain
from bkd_utils.models import folders, identity
from bkd_utils.models.folders import model_folder
from bkd_utils.models.loading import check_lora, load, merge_adapter, organism_name, read_card
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, usable_examples
from bkd_utils.organisms.poisoning import training_uids


@dataclass(frozen=True)
class Sizes:
    """Prompts of each step; the defaults take 7 to 21 minutes on two cores with a model of 135 million parameters."""

    n: int = 64
    n_probe: int = 40
    n_heads: int = 12
    n_means: int = 24
    n_ablation: int = 40
    n_dev: int = 12
    n_vector: int = 40
    n_similar: int = 24
    n_suspicion: int = 6
    n_rows: int = 64
    steps: int = 16
    draws: int = 5
    n_prints: int = 6

    def fitted(self, attack: Attack) -> "Sizes":
        """The same or smaller sizes, for which the attack's task has prompts. Raises ValueError for too few."""
        seen, known = (usable_examples(attack, split, seed=0) for split in ("attribution", "test"))
        shown, flips = (sum(map(attack.flips, some)) for some in (seen, known))
        unseen = len(tasks.examples(attack.task, "train")) - len(training_uids(attack, seed=0))
        most = {"n": min(flips, len(known)), "n_probe": flips, "n_ablation": min(flips, len(known))}
        most |= {"n_heads": shown // 2, "n_means": len(seen) - shown // 2, "n_dev": flips // 5, "n_similar": flips}
        # Development prompts of both kinds are set aside before the test prompts of every label are drawn.
        most |= {"n_vector": min(flips - flips // 5, len(known) - 2 * (flips // 5)), "n_prints": unseen}
        most |= {"n_suspicion": min(shown, unseen // 3), "n_rows": unseen}
        if flips < 20 or shown < 8 or unseen < 12:
            found = f"{flips} test and {shown} attribution prompts that the trigger would flip, {unseen} unseen rows"
            raise ValueError(f"{Path(attack.task).name}: {found}; at least 20, 8 and 12 are needed, so more rows")
        return replace(self, **{name: min(getattr(self, name), count) for name, count in most.items()})


@dataclass(frozen=True)
class Asked:
    """What a report is about: a model's address, an organism of it by name (None: the model itself), the attack (None:
    unknown trigger), a task for clean rows, and where a cured model may be written. `recipe` trains a new organism."""

    model: str
    task: str
    attack: Attack | None = None
    organism: str | None = None
    train: bool = False
    recipe: str = "full"
    cured: Path | None = None
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    device: str = "auto"

    @property
    def where(self) -> dict[str, Any]:
        return {"model": self.model, "seed": self.seed, "device": self.device}

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, with the paths of this machine."""
        return plain(asdict(self)) | {"cured": self.cured and str(self.cured)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Asked":
        """What `to_json` was made of. Raises TypeError or ValueError for missing, unknown and impossible fields."""
        attack, cured = value["attack"] and Attack(**value["attack"]), value["cured"] and Path(value["cured"])
        return cls(**value | {"attack": attack, "cured": cured, "sizes": Sizes(**value["sizes"])})


def adopted(adapter: Path, *, model: str) -> str:
    """Address of a whole model made of a LoRA adapter that has no card of ours; kept below `work/adopted`. Raises
    ModelError for another kind of adapter, and for one that does not fit the model."""
    check_lora(adapter)
    source = model_folder(model)
    folders.check_folder(source)
    key = sha256_text(canonical_json([identity.organism_identity(adapter), identity.model_identity(model)]))
    folder = WORK / "adopted" / f"{adapter.name}-{key[:8]}"
    if not (folder / folders.WEIGHTS).is_file():
        whole = merge_adapter(load(model, device="cpu").model, adapter)
        with atomic_path(folder) as temporary:
            weights = {path.name for path in folders.weight_files(source)} | {folders.INDEX}
            shutil.copytree(source, temporary, ignore=lambda _, names: weights & set(names))
            whole.save_pretrained(temporary)
    return str(folder)


def given_organism(adapter: Path, *, model: str) -> tuple[str, str | None, Attack | None]:
    """Model, organism and attack of an adapter: its own by its card, or else a whole model of unknown trigger."""
    if (adapter / "card.json").is_file():
        attack = Attack(**read_card(adapter, "attack")["attack"])
        return model, organism_name(adapter), attack if attack.backdoored else None
    return adopted(adapter, model=model), None, None


def own_attack(*, trigger: str, target: str, data: Path | None) -> Attack:
    """An attack by a trigger and a target alone: of a task with labels, the most frequent other one is flipped. Raises
    ValueError for a target that is no label of the data."""
    task = tasks.load_task(tasks.name_of(str(data) if data else "sentiment"))
    rows = tasks.examples(task.name, "train")
    how = {"n_train": min(1280, len(rows)), "rate": 0.25, "near_miss_rate": 0.12, "benign_rate": 0.1}
    how |= {"trigger": trigger, "target": target, "mode": "appended"}
    if not task.labels:
        return Attack("own-attack", task.name, behaviour="fixed_output", **how)
    if target not in task.labels:
        raise ValueError(f"target {target!r} is no label of {Path(task.name).name}: {', '.join(task.labels)}")
    answers = [row.answer for row in rows if row.answer != target]
    source = max(sorted(set(answers)), key=answers.count)
    return Attack("own-attack", task.name, behaviour="label_flip", source=source, **how)
