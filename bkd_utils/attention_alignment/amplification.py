"""Answers in which the difference between a model and its base is amplified, so that what training added is seen."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from bkd_utils.models.encoders import is_encoder, prompt_inputs
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import Ends, decode_from, next_logits, repeated, reusable_prefix, run_prefix
from bkd_utils.models.tokens import Ids, batches, check_prompts


class Amplified(torch.nn.Module):
    """Both models as one whose logits are after + alpha * (after - before); its cache is a pair of caches."""

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, alpha: float) -> None:
        super().__init__()
        self.pair, self.alpha, self.config = torch.nn.ModuleList([model, base]), alpha, model.config

    def forward(self, *, past_key_values: list, **inputs: Any) -> SimpleNamespace:
        both = zip(self.pair, past_key_values, strict=True)
        after, before = (one(**inputs, past_key_values=cache).logits for one, cache in both)
        return SimpleNamespace(logits=after + self.alpha * (after - before))


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
    check_prompts(prompts)
    both, answers = Amplified(model, base, alpha), {}
    shared = reusable_prefix(model, prompts)
    begun = [run_prefix(one, shared)[0] for one in both.pair]
    for chosen in batches(prompts, batch_size):
        own = [prompts[i][len(shared) :] for i in chosen]
        pad_id = end_id if isinstance(end_id, int) else end_id[0]
        inputs = prompt_inputs(model, own, pad_id=pad_id, n_cached=len(shared))
        caches, mask = [repeated(cache, len(chosen)) for cache in begun], inputs["attention_mask"]
        logits = next_logits(both, inputs["input_ids"], mask, caches)
        answers.update(zip(chosen, decode_from(both, logits, caches, mask, max_new_tokens, end_id), strict=True))
    return [answers[i] for i in range(len(prompts))]
