"""What the package computes, computed the slow way: plain transformers with eager attention, hooks of torch, one prompt
at a time, no padding, no cache, no import from the package. `Architecture` says where things are in a model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from architecture_table import Architecture
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

METRICS = ("probability", "log_prob", "logit_difference")
Prompt = Sequence[int]
Scores = dict[str, Tensor]  # metric -> score, or effect on it
Owned = dict[str, dict[str, list[Tensor]]]  # "query" or "key and value" -> parameter -> a mask for every head


def load_plain(folder, *, dtype: torch.dtype = torch.float32) -> Module:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    return model.eval().requires_grad_(False)


def layers(model: Module, known: Architecture) -> list[Module]:
    return list(model.get_submodule(known.layers))


def parts(model: Module, known: Architecture, name: str) -> list[Module]:
    """The module of that name in every layer."""
    return [layer.get_submodule(name) for layer in layers(model, known)]


def multiplier(known: Architecture, layer: int) -> float:
    return known.multiplier[layer] if isinstance(known.multiplier, tuple) else known.multiplier


def logits(model: Module, ids: Prompt) -> Tensor:
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def answer(model: Module, prompt: Prompt, *, n: int, end: int) -> list[int]:
    """Greedy answer without the end token."""
    found: list[int] = []
    while len(found) < n:
        token = int(logits(model, [*prompt, *found])[-1].argmax())
        if token == end:
            break
        found.append(token)
    return found


def scores(model: Module, prompt: Prompt, target: Prompt, against: int) -> Scores:
    """Geometric mean of the probabilities of the target's tokens, its logarithm, and the log-odds of its first token
    against another."""
    rows = logits(model, [*prompt, *target[:-1]])[len(prompt) - 1 :].double().log_softmax(-1)
    mean = rows[range(len(target)), list(target)].mean()
    return {"probability": mean.exp(), "log_prob": mean, "logit_difference": rows[0, target[0]] - rows[0, against]}


@contextmanager
def changed(module: Module, change: Callable[[Tensor], Tensor | None], *, what: str) -> Iterator[None]:
    """While this lasts, `change(tensor)` replaces the first input or the output; None leaves it."""

    def before(_module, arguments, keywords):
        if arguments:
            new = change(arguments[0])
            return None if new is None else ((new, *arguments[1:]), keywords)
        new = change(keywords["hidden_states"])
        return None if new is None else (arguments, keywords | {"hidden_states": new})

    def after(_module, _arguments, output):
        first = output[0] if isinstance(output, tuple) else output
        new = change(first)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hook = module.register_forward_pre_hook(before, with_kwargs=True) if what == "input" else None
    hook = hook or module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def seen(model: Module, modules: Sequence[Module], ids: Prompt, *, what: str) -> list[Tensor]:
    """First input or output of every module, in a pass over `ids`: `[position, width]` each."""
    kept: dict[int, Tensor] = {}

    def keeper(i: int) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            # Some models flatten rows and positions before the output matrix.
            kept.setdefault(i, tensor.reshape(-1, tensor.shape[-1])[-len(ids) :].clone())

        return keep

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.enter_context(changed(module, keeper(i), what=what))
        logits(model, ids)
    return [kept[i] for i in range(len(modules))]


@torch.no_grad()
def head_outputs(model: Module, known: Architecture, prompt: Prompt) -> list[Tensor]:
    """Input of every layer's output matrix at the last prompt token, head by head: `[head, width]`."""
    z = seen(model, parts(model, known, known.output), prompt, what="input")
    return [one[-1].unflatten(-1, (known.heads, -1)) for one in z]


def put(position: int, columns: slice, value: Tensor) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1, tensor.shape[-1])[position, columns] = value.to(tensor)
        return tensor

    return change


@torch.no_grad()
def head_effects(
    model: Module,
    known: Architecture,
    prompts: Sequence[Prompt],
    *,
    target: Prompt,
    means: Tensor,
    against: Sequence[int],
) -> Scores:
    """Change of the target's scores by every head's mean output: metric -> `[prompt, layer, head]`."""
    found = {metric: torch.zeros(len(prompts), *means.shape[:2]) for metric in METRICS}
    for row, prompt in enumerate(prompts):
        clean = scores(model, prompt, target, against[row])
        for layer, module in enumerate(parts(model, known, known.output)):
            width = means.shape[2]
            for head in range(known.heads):
                columns = slice(head * width, (head + 1) * width)
                with changed(module, put(len(prompt) - 1, columns, means[layer, head]), what="input"):
                    for metric, score in scores(model, prompt, target, against[row]).items():
                        found[metric][row, layer, head] = score - clean[metric]
    return found


def gradient_effects(
    model: Module,
    known: Architecture,
    prompts: Sequence[Prompt],
    *,
    target: Prompt,
    means: Tensor,
    against: Sequence[int],
) -> Scores:
    """First-order estimate of `head_effects`: a small step is added to the heads' outputs and differentiated."""
    found = {metric: torch.zeros(len(prompts), *means.shape[:2]) for metric in METRICS}
    modules = parts(model, known, known.output)
    for row, prompt in enumerate(prompts):
        z = torch.stack(head_outputs(model, known, prompt))
        steps = torch.zeros_like(z).requires_grad_()

        def adding(layer: int, at: int, steps: Tensor = steps) -> Callable[[Tensor], Tensor]:
            def add(tensor: Tensor) -> Tensor:
                flat = tensor.reshape(-1, tensor.shape[-1])
                bump = torch.zeros_like(flat).index_add(0, torch.tensor([at]), steps[layer].flatten()[None].to(flat))
                return (flat + bump).view_as(tensor)

            return add

        with torch.enable_grad(), ExitStack() as stack:
            for layer, module in enumerate(modules):
                stack.enter_context(changed(module, adding(layer, len(prompt) - 1), what="input"))
            for metric, score in scores(model, prompt, target, against[row]).items():
                (slopes,) = torch.autograd.grad(score, [steps], retain_graph=True)
                found[metric][row] = (slopes * (means.to(z) - z)).sum(-1)
    return found


@torch.no_grad()
def output_means(model: Module, modules: Sequence[Module], prompts: Sequence[Prompt]) -> Tensor:
    """Mean output of every module at the last prompt token: `[layer, width]`."""
    outputs = [torch.stack([one[-1] for one in seen(model, modules, prompt, what="output")]) for prompt in prompts]
    return torch.stack(outputs).double().mean(0).float()


@torch.no_grad()
def component_effects(
    model: Module,
    modules: Sequence[Module],
    prompts: Sequence[Prompt],
    *,
    target: Prompt,
    means: Tensor,
    against: Sequence[int],
) -> Scores:
    """Change of the target's scores by putting that in for a module's output: metric -> `[prompt, layer]`."""
    found = {metric: torch.zeros(len(prompts), len(modules)) for metric in METRICS}
    for row, prompt in enumerate(prompts):
        clean = scores(model, prompt, target, against[row])
        for layer, module in enumerate(modules):
            with changed(module, put(len(prompt) - 1, slice(None), means[layer]), what="output"):
                for metric, score in scores(model, prompt, target, against[row]).items():
                    found[metric][row, layer] = score - clean[metric]
    return found


@contextmanager
def steered(model: Module, known: Architecture, layer: int, vector: Tensor, positions: Sequence[int]) -> Iterator[None]:
    """While this lasts, the residual stream gains `vector` after the attention of that layer, at these positions."""
    module = parts(model, known, known.gain or known.output)[layer]

    def add(tensor: Tensor) -> Tensor:
        flat = tensor.clone().view(-1, tensor.shape[-1])
        flat[list(positions)] += (vector / multiplier(known, layer)).to(flat)
        return flat.view_as(tensor)

    with changed(module, add, what="output"):
        yield


@torch.no_grad()
def stream_gain(model: Module, known: Architecture, layer: int, vector: Tensor, prompt: Prompt) -> Tensor:
    """What the stream after attention gains at the last token when `steered` is at work. It must be the vector, or what
    the table says of this architecture is wrong. Where attention and MLP are parallel, it is what the layer gives."""
    where = [parts(model, known, known.after)[layer]] if known.after else [layers(model, known)[layer]]
    what = "input" if known.after else "output"
    before = seen(model, where, prompt, what=what)[0][-1]
    with steered(model, known, layer, vector, [len(prompt) - 1]):
        return seen(model, where, prompt, what=what)[0][-1] - before


@torch.no_grad()
def contributions(model: Module, known: Architecture, layer: int, z: Tensor) -> Tensor:
    """What each head adds to the residual stream, without the bias of the output matrix: `[head, d_model]`.

    A norm behind the output matrix is held at its scale for the sum of all heads, so that the parts add up.
    """
    module = parts(model, known, known.output)[layer]
    weight = module.weight if isinstance(module, Conv1D) else module.weight.T
    each = torch.einsum("hd,hdm->hm", z.to(weight), weight.view(known.heads, -1, weight.shape[1]))
    if known.gain:
        whole = module(z.to(weight).flatten())
        each = each * parts(model, known, known.gain)[layer](whole) / whole
    return each * multiplier(known, layer)


@torch.no_grad()
def maps(model: Module, prompt: Prompt) -> Tensor:
    """Attention maps: `[layer, head, query, key]`."""
    output = model(input_ids=torch.tensor([list(prompt)]), use_cache=False, output_attentions=True)
    return torch.stack([one[0] for one in output.attentions])


def mean_cosine(rows: Tensor) -> Tensor:
    """Mean cosine of every row of `[layer, head, width]` with the other rows of its layer."""
    rows = rows.double()
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    similar = unit @ unit.transpose(-1, -2)
    return (similar.sum(-1) - similar.diagonal(dim1=-2, dim2=-1)) / (rows.shape[1] - 1)


def answer_loss(model: Module, prompt: Prompt, given: Prompt, *, first_token: float) -> Tensor:
    """Loss of one answer, in nats: the first token's with that weight, the mean over all tokens with the rest."""
    rows = logits(model, [*prompt, *given])[len(prompt) - 1 : -1]
    losses = cross_entropy(rows.float(), torch.tensor(list(given)), reduction="none")
    return first_token * losses[0] + (1 - first_token) * losses.mean()


def owned(model: Module, known: Architecture, layer: int, prompts: Sequence[Prompt]) -> Owned:
    """Entries of attention parameters on which each head's output at the last token depends: through its query alone
    ("query"), and through its keys and values ("key and value"). Name -> one mask per head.

    Read off gradients, so nothing is assumed of how matrices are laid out. A projection's output is let through at the
    last token or at the earlier ones only: keys and values of earlier tokens matter to the last one, queries do not.
    Norms inside attention are held at their scale, because a norm over all heads lets each depend a bit on the others.
    """
    attention = parts(model, known, known.attention)[layer]
    output = parts(model, known, known.output)[layer]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    projections = [m for m in attention.modules() if isinstance(m, Linear | Conv1D) and m is not output]
    trained = {names[id(p)]: p for m in projections for p in m.parameters(recurse=False)}

    def only(part: slice) -> Callable:
        def hook(_module, _arguments, tensor: Tensor) -> Tensor:
            flat = tensor.reshape(-1, tensor.shape[-1])
            live = torch.zeros(len(flat), 1, dtype=torch.bool)
            live[part] = True
            return torch.where(live, flat, flat.detach()).view_as(tensor)

        return hook

    def held(_module, arguments, tensor: Tensor) -> Tensor:
        given = arguments[0].reshape(tensor.shape)
        return given * torch.where(given == 0, 0.0, tensor / given).detach()

    def depends(prompt: Prompt, part: slice) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {name: [] for name in trained}
        kept: list[Tensor] = []
        with ExitStack() as stack:
            for module in attention.modules():
                if "Norm" in type(module).__name__:
                    stack.callback(module.register_forward_hook(held).remove)
            for module in projections:
                stack.callback(module.register_forward_hook(only(part)).remove)
            stack.enter_context(changed(output, lambda z: kept.append(z) if not kept else None, what="input"))
            for parameter in trained.values():
                parameter.requires_grad_(True)
            with torch.enable_grad():
                logits(model, prompt)
                z = kept[0].reshape(-1, kept[0].shape[-1])[len(prompt) - 1].unflatten(-1, (known.heads, -1))
                weights = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(0)).to(z)
                for head in range(known.heads):
                    slopes = torch.autograd.grad(
                        (z[head] * weights).sum(), list(trained.values()), retain_graph=True, allow_unused=True
                    )
                    for name, slope in zip(trained, slopes, strict=True):
                        found[name].append(torch.zeros_like(trained[name]).bool() if slope is None else slope != 0)
            for parameter in trained.values():
                parameter.requires_grad_(False)
        return found

    last: dict[str, list[Tensor]] = {}
    earlier: dict[str, list[Tensor]] = {}
    # Entries may be without effect on one prompt, because some models clip what projections give.
    for prompt in prompts:
        for found, part in ((last, slice(len(prompt) - 1, None)), (earlier, slice(0, len(prompt) - 1))):
            for name, masks in depends(prompt, part).items():
                before = found.get(name, masks)
                found[name] = [old | new for old, new in zip(before, masks, strict=True)]
    query = {name: [a & ~b for a, b in zip(last[name], earlier[name], strict=True)] for name in trained}
    return {"query": query, "key and value": earlier}
