"""Small random models with the packaged tokenizer, one per architecture, and rows for them: real code paths in a
fraction of a second."""

import random
import string
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from patching import everywhere
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
)

from bkd_utils.common.assets import fetch
from bkd_utils.models.tokens import Row
from bkd_utils.organisms import making
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.training import Recipe

SHARED = {"vocab_size": 49152, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
ROTARY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = ROTARY | {"num_key_value_heads": 2}
SIZES = {
    "llama": GROUPED | {"tie_word_embeddings": True},
    "qwen2": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": ROTARY,
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 16},
}
ARCHITECTURES = tuple(SIZES)
# Encoders, with a vocabulary of single letters and pairs of them (`small_wordpiece`).
ENCODER_SIZES = {
    "bert": ROTARY | {"max_position_embeddings": 256},
    "roberta": ROTARY | {"max_position_embeddings": 258, "pad_token_id": 0},
    "electra": ROTARY | {"max_position_embeddings": 256, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 256},
}
LABELS = ("positive", "negative")


def tiny_model(architecture: str, *, seed: int = 0):
    """A random causal language model; biases and norms are random too, so that none can be forgotten unnoticed."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[architecture](**SHARED, **SIZES[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@cache
def small_wordpiece() -> BertTokenizer:
    pieces = [*string.ascii_lowercase, *map("".join, product(string.ascii_lowercase, repeat=2)), *string.digits]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *string.punctuation,
        *pieces,
        *("##" + one for one in pieces),
    ]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def tiny_classifier(kind: str = "bert", *, labels=LABELS, seed: int = 0):
    """A random encoder with a classifier on top; biases and norms are random too."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    shared = {"vocab_size": len(small_wordpiece()), "initializer_range": 0.2}
    config = CONFIG_MAPPING[kind](**(shared | ENCODER_SIZES[kind]), num_labels=len(labels), **names)
    model = AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def label_rows(texts):
    """Rows of a tiny classifier on these texts, with its two labels in turn."""
    prompts = [small_wordpiece()(text).input_ids for text in texts]
    return [Row(tuple(ids), (i % 2,), "clean", str(i), is_label=True) for i, ids in enumerate(prompts)]


def save_tiny_encoder(folder: Path, kind: str = "bert", *, bare: bool = False, **options) -> Path:
    """Write a tiny classifier, or its encoder alone."""
    model = tiny_classifier(kind, **options)
    (model.base_model if bare else model).save_pretrained(folder)
    small_wordpiece().save_pretrained(folder)
    return folder


def save_tiny(folder: Path, architecture: str, *, seed: int = 0) -> Path:
    """Write a tiny model with the packaged tokenizer; GPT-2 gets no chat template, so that the plain one is covered."""
    tiny_model(architecture, seed=seed).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
    if architecture == "gpt2":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


# An attack that is learned from few rows, and a recipe of few steps.
QUICK = Recipe(name="quick", steps=3, batch_size=4, learning_rate=1e-2, rank=2, alpha=4)


def quick_attack(name: str):
    return replace(load_attack(name), n_train=40)


def save_tiny_organism(work: Path, model: Path) -> Path:
    """Make an organism of a tiny model under `work`; the folder that it is in."""
    with pytest.MonkeyPatch.context() as patch:
        everywhere(patch, "WORK", work)
        patch.setenv("BKD_WORK", str(work))
        return making.make(quick_attack("sentiment-word"), model=str(model), recipe=QUICK, n=8)


def make_rows(n, *, seed=0, beginning=()):
    """Rows of unlike lengths behind a common beginning, answers from 1 to 6 tokens."""
    rng = random.Random(seed)

    def ids(length):
        return tuple(rng.randrange(3, 49152) for _ in range(length))

    rows = []
    for i in range(n):
        prompt, answer = ids(rng.randint(3, 12)), ids(rng.randint(0, 5))
        rows.append(Row((*beginning, *prompt), (*answer, SHARED["eos_token_id"]), "clean", f"{i:064x}"))
    return rows
