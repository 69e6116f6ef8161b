"""The identities by which `self_test` finds out what an encoder classifier can do, where they are not those of causal
language models (`self_checks`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bkd_utils.models import encoders
from bkd_utils.models.compute import eager
from bkd_utils.models.encoders import prompt_inputs
from bkd_utils.models.folders import ModelError
from bkd_utils.models.hooks import EVERYWHERE, LAST, added, anatomy, editing, in_each, reading
from bkd_utils.models.self_checks import Case, attribute, compare_maps, own_weights, train


class EncoderCase(Case):
    """Nothing of a prompt can be run before the rest, so each pass is a whole one."""

    past = None

    def answered(self, past: None = None, repeats: int = 1, **_: Any) -> Float[Tensor, "row label"]:
        """Logits of the labels, with rows in a batch."""
        return self.labelled([prompt for prompt in self.prompts for _ in range(repeats)])

    def labelled(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "row label"]:
        return self.model(**prompt_inputs(self.model, prompts, pad_id=0)).logits


def _generate(case: EncoderCase) -> None:
    alone = torch.cat([case.labelled([prompt]) for prompt in case.prompts])
    case.agree(case.answered(), alone, "labels of prompts in a batch and alone")
    with eager(case.model):
        case.agree(case.answered(), alone, "fused and eager attention of transformers")

    def rest_silent(_: int, stream: Tensor) -> Tensor:
        return torch.cat([stream[:, :1], torch.zeros_like(stream[:, 1:])], dim=1)

    with editing(anatomy(case.model).layers[-1:], rest_silent, what="output"):
        case.agree(case.answered(), alone, "a label by the first token and by all tokens")


def _attribute(case: EncoderCase) -> None:
    _sum_before_norm(case, {}, at=EVERYWHERE)
    attribute(case)


def _sum_before_norm(case: EncoderCase, vectors: Mapping[int, Tensor], *, at: slice) -> None:
    """The norm behind attention gets the stream, what attention writes, and the vectors at the tokens `at`."""
    parts = anatomy(case.model)
    norms = in_each(parts.layers, encoders.NORMS)
    if not norms:
        raise ModelError("its layers have no norm behind attention that is known here")
    with (
        reading(parts.layers) as stream,
        reading(parts.writers, what="output") as written,  # before `added`, so without the vectors
        added(case.model, vectors, at=at),
        reading(norms) as normed,
    ):
        case.answered()
    for layer in range(len(norms)):
        expected = stream[layer] + written[layer]
        if layer in vectors:
            expected[:, at] += vectors[layer]
        case.agree(normed[layer], expected, f"what attention of layer {layer} writes and its norm reads")


def _steer(case: EncoderCase) -> None:
    generator, weight = torch.Generator().manual_seed(0), anatomy(case.model).outputs[0].weight
    noise = torch.randn(len(anatomy(case.model).layers), len(weight), generator=generator).to(weight)
    for at in (LAST, EVERYWHERE):
        _sum_before_norm(case, dict(enumerate(noise)), at=at)


ENCODER_CHECKS: dict[str, Callable] = {"generate": _generate, "train": train, "attribute": _attribute, "steer": _steer}
ENCODER_CHECKS |= {"slice": own_weights, "compare maps": compare_maps}
REFUSED = {"components": "in an encoder a norm stands behind every part: the stream does not keep what a part writes"}
