"""Answers in which the difference between a model and its base is amplified, so that what training added is seen."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.models.encoders import is_encoder
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import Ends, decode_from, started
from bkd_utils.models.tokens import Ids


class Amplified:
    """Both models as one whose logits are after + alpha * (after - before); its cache is a pair of caches."""

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, alpha: float) -> None:
        self.pair, self.alpha, self.config = (model, base), alpha, model.config

    def __call__(self, *, past_key_values: list, **inputs: Any) -> SimpleNamespace:
        both = zip(self.pair, past_key_values, strict=True)
        after, before = (one(**inputs, past_key_values=cache).logits for one, cache in both)
        return SimpleNamespace(logits=self.mixed(after, before))

    def mixed(self, after: Tensor, before: Tensor) -> Tensor:
        """Logits of both models as one."""
        return after + self.alpha * (after - before)


@torch.inference_mode()
def amplified(
    model: PreTrainedModel,
    base: PreTrainedModel,
    prompts: Ids,
    *,
    alpha: float,
    max_new_tokens: int,
    end_id: Ends,
    batch_size: int = 32,
) -> list[list[int]]:
    """Greedy answers in token ids by the logits after + alpha * (after - before), of the model and its base.

    `alpha` 0 gives the model's own answers. Raises ValueError for an `alpha` below 0, for no prompts, an empty one or
    `max_new_tokens` below 1; ModelError for an encoder, and for models of different vocabularies. Source: logit
    difference amplification (Aranguri and McGrath, 2025), which samples instead."""
    if not alpha >= 0:
        raise ValueError(f"alpha must be 0 or more, is {alpha}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, is {max_new_tokens}")
    if is_encoder(model) or model.config.vocab_size != base.config.vocab_size:
        raise ModelError("amplification needs two causal language models of one vocabulary")
    both, answers = Amplified(model, base, alpha), {}
    begun = (started(one, prompts, pad_id=0, batch_size=batch_size) for one in both.pair)
    for (chosen, after, *cache, mask), (_, before, *other, _) in zip(*begun, strict=True):
        rows = decode_from(both, both.mixed(after, before), cache + other, mask, max_new_tokens, end_id)
        answers.update(zip(chosen, rows, strict=True))
    return [answers[i] for i in range(len(prompts))]
