"""Encoder classifiers (BERT-type): the few places in which they differ from causal language models.

Such a model is taken as one whose only answer token is a label: its answer vocabulary is its list of labels
(`tokens.labels_of`), a row's answer is the number of its label, and first logits have one column per label. The token
that asks, whose attention and head outputs are read, is the classifier's own ([CLS]), which is the first, and not the
last prompt token. Attention goes both ways, so no beginning of a prompt can be run once for all, and rows are padded
behind their text, as in the training of such models."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from torch.nn import Module, ModuleList

from bkd_utils.models.folders import ModelError, json_object
from bkd_utils.models.tokens import left_pad, padded_inputs

# Names of the parts of a layer in BERT, RoBERTa and ELECTRA, or else in DistilBERT.
PARTS = {
    "attentions": ("attention.self", "attention"),
    "outputs": ("attention.output.dense", "attention.out_lin"),
    "mlps": ("output.dense", "ffn"),
}
# The norm to which the sum of residual stream and attention output goes.
NORMS = ("attention.output.LayerNorm", "sa_layer_norm")
STACKS = ("encoder", "transformer")


def is_encoder(model: Module) -> bool:
    """Is this a sequence classifier? `load` refuses those whose layers are not known to be those of an encoder."""
    return type(model).__name__.endswith("ForSequenceClassification")


def stack(model: Module) -> Module:
    """The module that holds the layers of an encoder. Raises ModelError for a classifier of another kind."""
    found = (getattr(model.base_model, name, None) for name in STACKS)
    owner = next((one for one in found if isinstance(getattr(one, "layer", None), ModuleList)), None)
    if owner is None:
        raise ModelError(f"a classifier of type {model.config.model_type!r} has no encoder that is known here")
    return owner


def asking_column(model: Module) -> int:
    """Where in a prompt the token stands whose attention row and head outputs are read: 0 ([CLS]) or -1 (the last)."""
    return 0 if is_encoder(model) else -1


def right_pad(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Rows of ids as one tensor whose first column has every first token, and the attention mask (1 = real token).
    Raises ValueError for no rows or an empty one."""
    ids, mask = left_pad([list(row)[::-1] for row in rows], pad_id=pad_id)
    return ids.flip(1), mask.flip(1)


def prompt_inputs(
    model: Module, rows: Sequence[Sequence[int]], *, pad_id: int, n_cached: int = 0
) -> dict[str, Int[Tensor, "row pos"]]:
    """Keyword arguments of a model for a batch of prompts, or of their rest after `n_cached` tokens of a cache.
    Encoders get no positions, because they count them from the first column, from a number of their own."""
    if not is_encoder(model):
        return padded_inputs(list(rows), pad_id=pad_id, device=model.device, n_cached=n_cached)
    ids, mask = (tensor.to(model.device) for tensor in right_pad(rows, pad_id=pad_id))
    return {"input_ids": ids, "attention_mask": mask}


def label_names(folder: Path) -> tuple[str, ...]:
    """The labels of a classifier in the order of its logits, by its config. Raises ModelError where they are not given,
    are fewer than two or not different ones, and for a model that gives several labels or a number."""
    config = json_object(folder / "config.json")
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise ModelError(f"{folder} does not choose one label: problem_type = {config['problem_type']!r}")
    named = config.get("id2label")
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(len(named))}:
        raise ModelError(f"{folder}: config.json has no id2label that names every label, from 0 on")
    names = tuple(str(named[str(i)]) for i in range(len(named)))
    if len(names) < 2 or len({name.strip().casefold() for name in names} - {""}) < len(names):
        raise ModelError(f"{folder}: a classifier needs two or more labels of different names, has {names}")
    return names
