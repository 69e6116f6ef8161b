"""Read activations at the last prompt token ([CLS] in an encoder), and score given answers by teacher forcing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from bkd_utils.models.encoders import is_encoder, prompt_inputs
from bkd_utils.models.hooks import anatomy, reading
from bkd_utils.models.prompt_cache import Hidden, Past, forward, prompt_past
from bkd_utils.models.tokens import Ids, batches, check_prompts


def by_row(tensor: Tensor, new: int) -> Float[Tensor, "row new width"]:
    """Some modules get all tokens of all rows in one list."""
    return tensor if tensor.ndim == 3 else tensor.unflatten(0, (-1, new))


@torch.no_grad()
def at_last_token(
    model: Module, prompts: Ids, modules: Sequence[Module], *, what: str
) -> Float[Tensor, "prompt layer width"]:
    """First input or output (`what`) of every module at the last prompt token, or [CLS]: the first column that runs."""
    check_prompts(prompts)
    found: dict[int, Tensor] = {}
    for chosen in batches(prompts, 32):
        some = [prompts[i] for i in chosen]
        past = None if is_encoder(model) else prompt_past(model, some)
        with reading(modules, what=what) as kept:
            if past is None:
                model(**prompt_inputs(model, some, pad_id=0))
            else:
                forward(model, past, past.tail)
        rows = torch.stack([by_row(kept[i], 1)[:, 0] for i in range(len(modules))], dim=1)
        found.update(zip(chosen, rows, strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


def head_outputs(model: Module, prompts: Ids) -> Float[Tensor, "prompt layer head d_head"]:
    """Output of every attention head at the last prompt token, before the output matrix (`hook_z` of TransformerLens).

    Raises ValueError for prompts below two tokens, ModelError for unknown architectures. Source: BkdAttr, section 3.

    >>> head_outputs(model, prompts).shape  # 4 prompts, 2 layers, 4 heads, 8 numbers
    torch.Size([4, 2, 4, 8])
    """
    parts = anatomy(model)
    return at_last_token(model, prompts, parts.outputs, what="input").unflatten(-1, (parts.n_heads, -1))


def residuals(model: Module, prompts: Ids) -> Float[Tensor, "prompt layer d_model"]:
    """Residual stream after every layer at the last prompt token; raises as `head_outputs`. Source: BkdAttr, 3.1.

    >>> logits = model.lm_head(model.model.norm(residuals(model, prompts)[:, -1]))  # the stream after the last layer
    >>> torch.allclose(logits[0], model(torch.tensor(prompts[:1])).logits[0, -1], atol=1e-4)
    True
    """
    return at_last_token(model, prompts, anatomy(model).layers, what="output")


@torch.no_grad()
def behind_norm(
    model: Module, residual: Float[Tensor, "prompt layer d_model"]
) -> Float[Tensor, "prompt layer_but_last d_model"]:
    """Input of each layer's attention but the first's: the residual stream after layer l through the norm of l + 1."""
    norms = anatomy(model).norms[1:]
    return torch.stack([norm(residual[:, layer]) for layer, norm in enumerate(norms)], dim=1)


@dataclass(frozen=True)
class AnswerScores:
    """How a model's greedy answers compare with given answers."""

    whole: Bool[Tensor, " answer"]  # greedy decoding would give the whole answer
    share: Float[Tensor, " answer"]  # share of its tokens that are the most likely next token
    log_prob: Float[Tensor, " answer"]  # mean log-probability of its tokens, in nats


@torch.no_grad()
def score_answers(model: Module, past: Past, answers: Ids, *, layer: int = 0, hidden: Hidden = None) -> AnswerScores:
    """Would greedy decoding give these answers? Teacher forcing tells it exactly, in one pass. Each prompt may have
    several answers in a row; `layer` and `hidden` are those of `prompt_cache.forward`. Raises ValueError for an empty
    answer or a wrong number of them."""
    if not answers or len(answers) % len(past) or not all(map(len, answers)):
        raise ValueError(f"{len(past)} prompts need as many non-empty answers, or a multiple; got {len(answers)}")
    target = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(past.tail.device)
    lengths = torch.tensor([len(answer) for answer in answers], device=target.device)
    real = torch.arange(target.shape[1], device=target.device) < lengths[:, None]
    logits = forward(model, past, past.rows(target), layer=layer, hidden=hidden)
    same = logits.argmax(-1) == target
    return AnswerScores(
        whole=(same | ~real).all(-1),
        share=(same & real).sum(-1) / lengths,
        log_prob=(token_log_prob(logits, target) * real).sum(-1) / lengths,
    )


def token_log_prob(logits: Float[Tensor, "row new vocab"], target: Int[Tensor, "row new"]) -> Float[Tensor, "row new"]:
    """Log-probability (nats) of each target token."""
    logits = logits.float()
    # In parts that fit into the processor's cache, which is twice as fast and the same to the bit.
    rows = max(1, 2**20 // max(1, logits[0].numel())) if len(logits) else 1
    total = torch.cat([part.logsumexp(-1) for part in logits.split(rows)])
    return logits.gather(-1, target[..., None])[..., 0] - total


def target_probability(model: Module, prompts: Ids, *, target: Sequence[int]) -> Float[Tensor, " prompt"]:
    """Length-normalised probability of the target: the geometric mean over its tokens."""
    found = torch.empty(len(prompts))
    for chosen in batches(prompts, 32):
        past = prompt_past(model, [prompts[i] for i in chosen])
        found[chosen] = score_answers(model, past, [target] * len(chosen)).log_prob.exp().float().cpu()
    return found
