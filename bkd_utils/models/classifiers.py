"""A new classifier on a bare encoder, to be trained; `loading` loads those that are trained."""

import re
from collections.abc import Sequence

import torch
from transformers.utils import logging

from bkd_utils.models import folders, identity
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import Loaded, load_tokenizer, read_weights, ready, refuse_faults
from bkd_utils.models.tokens import check_tokenizer

# In checkpoints of encoders: numbers of positions, which are no weights, and heads for other tasks.
BESIDE_ENCODER = re.compile(r"(.*\.)?position_ids|(cls|lm_head|vocab_\w+|\w+_predictions|generator_\w+)\..*")


def new_classifier(address: str, *, labels: Sequence[str], seed: int, device: str = "auto") -> Loaded:
    """A bare encoder with a new classifier in front of its answers, whose weights are drawn with the seed. What is
    drawn is all that the encoder's folder lacks: the classifier and, in some families, the layer before it. Raises
    ModelError for another model, for fewer than two labels, and as `load` does."""
    folder = folders.model_folder(address)
    folders.check_folder(folder)
    if folders.kind(folder) != "encoder":
        raise ModelError(f"{address} is no bare encoder, so it gets no new classifier")
    if len(labels) < 2:
        raise ModelError(f"{address} is an encoder and can only tell labels apart; the task has {len(labels)}")
    tokenizer = load_tokenizer(address, labels=labels)
    with folders.named(folder):
        check_tokenizer(tokenizer)
    named = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    named |= {"label2id": {label: i for i, label in enumerate(labels)}}
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would warn that the classifier is new, which is wanted here
    try:
        model, wrong = read_weights(folder, classifier=True, dtype=torch.float32, **named)
    finally:
        logging.set_verbosity(before)
    inside = {f"{model.base_model_prefix}.{name}" for name in model.base_model.state_dict() if "pooler" not in name}
    new = [name for name in wrong.get("missing_keys", ()) if name not in inside]
    unexpected = [name for name in wrong.get("unexpected_keys", ()) if not BESIDE_ENCODER.fullmatch(name)]
    missing = [name for name in wrong.get("missing_keys", ()) if name in inside]
    faults = wrong | {"missing_keys": missing, "unexpected_keys": unexpected}
    refuse_faults({what: found for what, found in faults.items() if found}, folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in new:
            weight = model.get_parameter(name)
            spread = model.config.initializer_range if weight.ndim > 1 else 0.0
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return Loaded(ready(model, folder, device), tokenizer, address, None, identity.model_identity(address))
