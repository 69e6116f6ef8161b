"""Effects of whole components on the backdoor's answer: attention, MLP and residual stream of each layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.backdoor_attribution.attribution import Target, check_target, chosen_metric, patched_effects
from bkd_utils.common.validation import check_shape
from bkd_utils.models.activations import at_last_token
from bkd_utils.models.hooks import Anatomy, anatomy
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Ids

# Mean outputs by name of the component.
ComponentMeans = dict[str, Float[Tensor, "layer d_model"]]


def component_modules(parts: Anatomy) -> dict[str, tuple[torch.nn.Module, ...]]:
    """The modules whose outputs are the attention output, the MLP output and the residual stream after each layer."""
    return {"attention": parts.outputs, "MLP": parts.mlps, "residual": parts.layers}


@torch.no_grad()
def component_means(model: PreTrainedModel, prompts: Ids) -> ComponentMeans:
    """Mean output of every component at the last prompt token."""
    require(model, "components")
    components = component_modules(anatomy(model))
    modules = [module for members in components.values() for module in members]
    means = at_last_token(model, prompts, modules, what="output").double().sum(0).float() / len(prompts)
    return dict(zip(components, means.chunk(len(components)), strict=True))


@torch.no_grad()
def component_effects(
    model: PreTrainedModel,
    prompts: Ids,
    *,
    target: Target,
    means: ComponentMeans,
    metric: str = "probability",
    against: Sequence[int] | None = None,
) -> dict[str, Float[Tensor, "prompt layer"]]:
    """`head_effects` of whole components, which the paper does not patch. Raises ValueError as `head_effects` does, and
    for a component that is not known."""
    require(model, "components")
    answers, others = check_target(model, prompts, target, against)
    modules = component_modules(anatomy(model))
    if not means or (unknown := means.keys() - modules):
        told = f"unknown components {sorted(unknown)}" if means else "no components"
        raise ValueError(f"{told}; known: {', '.join(modules)}")
    width = model.config.get_text_config().hidden_size
    for name, rows in means.items():
        check_shape(f"means of {name}", rows, layer=len(modules[name]), d_model=width)
    patches = {name: (modules[name], rows[:, None]) for name, rows in means.items()}
    found = patched_effects(model, patches, prompts, answers, others, what="output")
    return {name: chosen_metric(effects, metric=metric)[..., 0] for name, effects in found.items()}
