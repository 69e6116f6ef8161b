"""A surrogate that is searched for: a few vectors in front of the user's words that make heads as alike as they can.

Of all things that a defender can try without the trigger this is the strongest: if a trigger makes heads alike, and
vectors in its place are trained to do so, they should find its path. They know clean prompts and the model, no more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.similarity import cosine, eager, to_partners
from bkd_utils.models.generation import shared_prefix
from bkd_utils.models.tokens import left_pad, positions
from bkd_utils.organisms.training import frozen_halved, mixed_precision


@dataclass(frozen=True)
class SoftPrompt:
    """Vectors, the tokens that hold their place in prompts, and behind how many tokens of a prompt they stand."""

    vectors: Float[Tensor, "token d_model"]
    tokens: tuple[int, ...]
    at: int

    def into(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The prompts with the placeholders."""
        return [[*prompt[: self.at], *self.tokens, *prompt[self.at :]] for prompt in prompts]

    @contextmanager
    def read_by(self, model: PreTrainedModel) -> Iterator[None]:
        """While this lasts, the model reads the vectors where the placeholders stand."""

        def replace(_module: torch.nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
            for token, vector in zip(self.tokens, self.vectors, strict=True):
                output = torch.where((given[0] == token)[..., None], vector.to(output.dtype), output)
            return output

        handle = model.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def start(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, n_vectors: int = 4, seed: int = 0) -> SoftPrompt:
    """An untrained soft prompt: embeddings of tokens drawn by the seed, behind what all prompts begin with.

    Raises ValueError for no prompts or an empty one.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError(f"a soft prompt for {len(prompts)} prompts" + (" with an empty one" if prompts else ""))
    n_tokens = len(model.get_input_embeddings().weight)
    used = {token for prompt in prompts for token in prompt}
    free = [token for token in range(n_tokens - 1, -1, -1) if token not in used][:n_vectors]
    drawn = torch.randint(n_tokens, (n_vectors,), generator=torch.Generator().manual_seed(seed))
    # Through the module and not from its table: some models scale what they read.
    with torch.no_grad():
        vectors = model.get_input_embeddings()(drawn.to(model.device))
    at = len(shared_prefix([list(prompt) for prompt in prompts]))
    return SoftPrompt(vectors, tuple(free), at)


def likeness(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Float[Tensor, ""]:
    """Mean similarity (last row, cosine) of all heads over prompts, with gradient. The model's attention is eager."""
    ids, mask = (t.to(model.device) for t in left_pad([list(prompt) for prompt in prompts], pad_id=0))
    maps = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, output_attentions=True
    ).attentions
    return torch.stack([to_partners(cosine(layer[:, :, -1])).mean() for layer in maps]).mean()


def searched(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    n_vectors: int = 4,
    steps: int = 16,
    rate: float = 0.3,
    seed: int = 0,
) -> SoftPrompt:
    """Train a soft prompt to raise `likeness` on the prompts; no weight of the model changes.

    `rate` is Adam's, in standard deviations of the vectors that it starts from. Raises as `start` does.
    """
    soft = start(model, prompts, n_vectors=n_vectors, seed=seed)
    vectors = soft.vectors.requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=rate * soft.vectors.std().item())
    marked = soft.into(prompts)
    with eager(model), soft.read_by(model), frozen_halved(model):
        for _ in tqdm(range(steps), desc="soft prompt", unit="step", mininterval=2, leave=False):
            with mixed_precision(model.device):
                value = likeness(model, marked)
            # Of the vectors alone: the gradient of the weights would cost as much again.
            (vectors.grad,) = torch.autograd.grad(-value, [vectors])
            optimizer.step()
    vectors.requires_grad_(False)
    return soft
