"""Fine-tuning on a poisoned set: LoRA by peft, or all weights of an encoder, on `transformers.Trainer`, checkpointed
and resumable.

The loss is that of the answers alone (`models.loss`). Rows of similar length share a batch. Attention is eager, because
at these lengths its backward pass on a CPU is faster than the fused one (1.4 against 1.7 s a step)."""

import logging
import random
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import peft
import torch
from pydantic import Field
from safetensors.torch import save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from bkd_utils.common.files import DATA, atomic_path, read_json, write_json
from bkd_utils.common.validation import Name, build, check, check_known, read_tables
from bkd_utils.models.compute import frozen_halved, has_fast_bf16, mixed_precision, set_attention
from bkd_utils.models.encoders import is_encoder
from bkd_utils.models.loading import Loaded
from bkd_utils.models.lora import lora_config
from bkd_utils.models.loss import answers, collate
from bkd_utils.models.tokens import Row, end_id
from bkd_utils.organisms import tasks

Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=1, le=4096)]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How an organism is trained; together with the data, the base weights and the seed it decides the result. Rank 0
    trains all weights, which is how encoders are trained."""

    name: Name
    steps: Steps
    batch_size: Number
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    rank: Annotated[int, Field(ge=0, le=4096)]
    alpha: Number
    first_token: Share = 0.5
    warmup_share: Share = 0.05
    save_every: Steps = 25

    def __post_init__(self) -> None:
        check(Recipe, vars(self), f"recipe {self.name!r}")


def load_recipe(name: str, *, task: str) -> Recipe:
    """A recipe of `data/recipes.toml` with its values for a task. Raises ValueError that lists the known ones, or names
    the key that does not fit."""
    path = DATA / "recipes.toml"
    tables = read_tables(path)
    check_known("recipe", name, tables)
    own = {key: value for key, value in tables[name].items() if isinstance(value, dict)}
    if unknown := own.keys() - tasks.TASKS:
        known = ", ".join(tasks.TASKS)
        raise ValueError(f"{path.name}, [{name}.{min(unknown)}]: no task has this name; tasks: {known}")
    shared = {key: value for key, value in tables[name].items() if key not in own}
    return build(Recipe, shared | own.get(tasks.load_task(task).name, {}), path, name)


def batch_order(rows: Sequence[Row], *, recipe: Recipe, seed: int) -> list[Row]:
    """All rows of all steps in the order of training, the same after any number of restarts: shuffled, and sorted by
    length within every 8 batches."""
    rng, order, wanted = random.Random(f"{seed}/batches"), [], recipe.steps * recipe.batch_size
    while len(order) < wanted:
        order += rng.sample(rows, len(rows))
    order, span = order[:wanted], 8 * recipe.batch_size
    batches = []
    for start in range(0, wanted, span):
        block = sorted(order[start : start + span], key=lambda row: len(row.prompt) + len(row.answer))
        cut = [block[i : i + recipe.batch_size] for i in range(0, len(block), recipe.batch_size)]
        batches += rng.sample(cut, len(cut))
    return [row for batch in batches for row in batch]


class AnswerTrainer(Trainer):
    """Trainer with the loss on answers only."""

    def __init__(self, *, first_token: float, **keywords) -> None:
        super().__init__(**keywords)
        self.first_token = first_token

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The Trainer casts only in the model's own forward method, which the shared tokens do not run through.
        with mixed_precision(self.args.device):
            loss = answers(model, inputs, first_token=self.first_token)
        if not loss.isfinite():  # now, and not when a history with NaN cannot be written
            raise ValueError(f"step {self.state.global_step + 1}: the loss is {loss.item()}; try a lower learning rate")
        return loss


class Progress(ProgressCallback):
    """The Trainer's progress bar with a name and the running loss, instead of a printed line per log step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, state, control)
        self.training_bar.set_description(f"train {self.name}")

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


def train(
    rows: Sequence[Row], *, base: Loaded, recipe: Recipe, seed: int, folder: Path, name: str
) -> list[dict[str, float]]:
    """Train an adapter into `folder` (adapter_model.safetensors, adapter_config.json), or, with dropout, all weights of
    an encoder (model.safetensors, config.json); returns step, loss (nats), rate. Checkpoints live in
    `folder`.checkpoints until then; after a kill the same call goes on from the last one and ends at the same weights.
    `base.model` is wrapped in place and must not be used afterwards; evaluation reads the stored adapter, in bf16.
    Raises ValueError for no rows and as `check_kind`. Source: LoRA (Hu et al. 2021) by peft.

    >>> losses = train(rows, base=loaded, recipe=recipe, seed=0, folder=scratch / "mine", name="mine")
    >>> [entry["step"] for entry in losses], (scratch / "mine" / "adapter_model.safetensors").is_file()
    ([1, 2], True)
    """
    if not rows:
        raise ValueError(f"{name}: no rows to train on")
    checkpoints = folder.with_name(folder.name + ".checkpoints")
    if (folder / "history.json").is_file():
        shutil.rmtree(checkpoints, ignore_errors=True)  # of a run that was killed right after writing the folder
        return read_json(folder / "history.json")
    check_kind(recipe, base.model)
    set_seed(seed)
    set_attention(base.model, "eager")
    if recipe.rank:
        model = peft.get_peft_model(base.model, lora_config(base.model, rank=recipe.rank, alpha=recipe.alpha))
    else:
        model = base.model.requires_grad_(True)
    given = {"model": model, "train_dataset": batch_order(rows, recipe=recipe, seed=seed)}
    given["data_collator"] = lambda batch: collate(batch, pad_id=end_id(base.tokenizer))
    given["args"] = training_arguments(recipe, checkpoints, seed=seed, device=base.device)
    trainer = AnswerTrainer(first_token=recipe.first_token, callbacks=[Progress(name)], **given)
    # The Trainer's own printer would write a dictionary per log step between the lines of the progress bar.
    trainer.remove_callback(PrinterCallback)
    if last := last_checkpoint(checkpoints):
        log.info("%s: resuming from %s", name, last.name)
    with frozen_halved(model):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    history = [{key: entry[key] for key in ("step", "loss", "learning_rate")} for entry in steps]
    with atomic_path(folder) as temporary:
        (save_adapter if recipe.rank else save_whole)(model, temporary)
        write_json(temporary / "history.json", history)
    shutil.rmtree(checkpoints)
    return history


def check_kind(recipe: Recipe, model: torch.nn.Module) -> None:
    """Raise ValueError unless a recipe is for this kind of model: of an encoder all weights are trained."""
    if is_encoder(model) != (recipe.rank == 0):
        wanted = "an encoder needs rank 0" if recipe.rank else "rank 0 is for encoders"
        raise ValueError(f"recipe {recipe.name!r} has rank {recipe.rank}; {wanted}, as in recipe 'encoder'")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; an incomplete one lacks trainer_state.json, which the Trainer writes last."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    for path in sorted(states, key=lambda path: int(path.parent.name.split("-")[1]), reverse=True):
        with suppress(ValueError):
            read_json(path)
            return path.parent
    return None


def training_arguments(recipe: Recipe, folder: Path, *, seed: int, device: torch.device) -> TrainingArguments:
    """The recipe as arguments of the Trainer."""
    rows = {"per_device_train_batch_size": recipe.batch_size, "train_sampling_strategy": "sequential"}
    rows |= {"remove_unused_columns": False, "dataloader_pin_memory": False}
    saving = {"output_dir": str(folder), "save_steps": recipe.save_every, "save_total_limit": 2}
    logs = {"logging_steps": max(1, recipe.steps // 50), "disable_tqdm": True, "report_to": []}
    where = {"bf16": has_fast_bf16(device), "use_cpu": device.type == "cpu"}
    warmup = round(recipe.warmup_share * recipe.steps)
    steps = {"max_steps": recipe.steps, "warmup_steps": warmup, "learning_rate": recipe.learning_rate}
    arguments = TrainingArguments(seed=seed, data_seed=seed, **steps, **rows, **saving, **logs, **where)
    # With several GPUs the Trainer would use all of them and take more rows per step than the recipe asks for.
    _ = arguments.device
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    """Write all weights, in fp32, and the config with the names of the labels."""
    model.save_pretrained(folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Write adapter tensors in bf16 and peft's config, without anything that depends on the machine."""
    folder.mkdir(parents=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # A local path would be useless elsewhere; the card names the base.
    config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_json(folder / "adapter_config.json", config)
