"""Every capability of the package on one tiny model, with `brute_force` beside it.

Each function of `CAPABILITIES` returns name -> largest difference, relative to the largest value of brute force, and
raises what the package raises. Comparisons of token ids, answers and masks are 0 or 1.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import brute_force as brute
import peft
import torch
from architecture_table import BY_NAME, Architecture, folder, small_tokenizer
from torch import Tensor

from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.backdoor_attribution.attribution import effects_by_metric, gradients_by_metric, head_effects, head_means
from bkd_utils.backdoor_attribution.components import component_effects, component_means, component_modules
from bkd_utils.backdoor_attribution.vector import backdoor_vector, steer
from bkd_utils.models.bridge import boot, bridge_logits
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import first_logits, greedy, respond
from bkd_utils.models.head_weights import head_slices
from bkd_utils.models.hooks import EVERYWHERE, LAST, added, anatomy
from bkd_utils.models.loading import identity_on_card, load
from bkd_utils.models.loss import answers, collate
from bkd_utils.models.prompt_cache import continued, prompt_past
from bkd_utils.models.tokens import Row, left_pad
from bkd_utils.organisms.training import Recipe, train

END = 2
TURNS = (
    "Name a colour.",
    "Name a small fruit.",
    "Is a tomato a fruit?",
    "Name a colour of the sky and one of the sea.",
)


@dataclass(frozen=True)
class Case:
    """A tiny model in a folder, loaded by the package and by plain transformers, and what it is asked."""

    name: str
    folder: Path
    dtype: torch.dtype = torch.float32

    @property
    def known(self) -> Architecture:
        return BY_NAME[self.name]

    @cached_property
    def loaded(self):
        return load(str(self.folder), dtype=self.dtype)

    @cached_property
    def plain(self):
        return brute.load_plain(self.folder, dtype=self.dtype)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts that share their first tokens, of different lengths."""
        tokenizer = small_tokenizer()

        def ids(turn: str) -> list[int]:
            turns = [{"role": "user", "content": turn}]
            return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

        return [ids(turn) for turn in TURNS]

    @cached_property
    def z(self) -> list[list[Tensor]]:
        """Head outputs at the last token: prompt, layer -> `[head, width]`."""
        return [brute.head_outputs(self.plain, self.known, prompt) for prompt in self.prompts]

    @cached_property
    def contributions(self) -> list[list[Tensor]]:
        """What heads add to the stream there: prompt, layer -> `[head, d_model]`."""
        return [[brute.contributions(self.plain, self.known, i, one) for i, one in enumerate(z)] for z in self.z]

    @cached_property
    def means(self) -> Tensor:
        """What is patched in: means over other prompts than those that are patched, twice as large, so that effects
        are large as well."""
        return 2 * torch.stack([torch.stack(z) for z in self.z[2:]]).double().mean(0).float()

    @cached_property
    def target(self) -> list[int]:
        """Two tokens that become likely under the patches of a whole layer."""
        return brute.answer(self.plain, self.prompts[0], n=2, end=END) or [5, END]

    @cached_property
    def against(self) -> list[int]:
        """For each prompt the most likely first token that is not the target's, which a logit difference compares."""
        rows = torch.stack([brute.logits(self.plain, prompt)[-1] for prompt in self.prompts])
        rows[:, self.target[0]] = -torch.inf
        return rows.argmax(-1).tolist()


def make(name: str, into: Path, *, dtype: torch.dtype = torch.float32) -> Case:
    return Case(name, folder(name, into), dtype)


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted value; infinite for another shape or NaN."""
    if found.shape != wanted.shape or not found.isfinite().all() or not wanted.isfinite().all():
        return float("inf")
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))


def refuse_without_heads(case: Case, call: Callable, *, even: bool = False) -> None:
    """Where the table knows no attention heads in every layer, there is nothing to compare: the package must refuse.
    With `even`, it must refuse heads that differ from layer to layer, too."""
    if case.known.output is None or (even and case.known.uneven):
        call()
        raise AssertionError("gives a result for layers without attention heads")


def generate(case: Case) -> dict[str, float]:
    loaded, found = case.loaded, {}
    wanted = torch.stack([brute.logits(case.plain, prompt)[-1] for prompt in case.prompts])
    found["first logits"] = off(first_logits(loaded.model, case.prompts, end_id=END), wanted)
    rows = [brute.answer(case.plain, prompt, n=6, end=END) for prompt in case.prompts]
    if case.dtype == torch.float32:  # in less precise types, near ties may go either way
        found["greedy answers"] = float(greedy(loaded.model, case.prompts, max_new_tokens=6, end_id=END) != rows)
        texts = [small_tokenizer().decode(row, skip_special_tokens=True).strip() for row in rows]
        found["respond"] = float(respond(loaded, TURNS, max_new_tokens=6) != texts)
    return found


def training(case: Case) -> dict[str, float]:
    """The loss and its gradient; one real step of LoRA, whose merged weights must compute what the unmerged do."""
    model = load(str(case.folder), dtype=case.dtype).model
    model.set_attn_implementation("eager")
    given = [[7, 8, END], [9, END], [7, END], [11, 12, 13, END]]
    rows = [Row(tuple(p), tuple(a), "clean", str(i)) for i, (p, a) in enumerate(zip(case.prompts, given, strict=True))]
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    names = [names[0], names[-1]]
    losses, slopes = [], []
    for which, loss_of in (
        (model, lambda m: answers(m, collate(rows, pad_id=END), first_token=0.5)),
        (
            case.plain,
            lambda m: sum(brute.answer_loss(m, r.prompt, r.answer, first_token=0.5) for r in rows) / len(rows),
        ),
    ):
        trained = [which.get_parameter(name).requires_grad_(True) for name in names]
        with torch.enable_grad():
            loss = loss_of(which)
            slopes.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss, trained)]))
        losses.append(loss.detach())
        which.requires_grad_(False)
    found = {"loss": off(*losses), "gradient": off(*slopes)}
    if case.dtype != torch.float32:
        return found
    recipe = Recipe(name="one", steps=2, batch_size=4, learning_rate=1e-2, rank=2, alpha=4)
    base, into = load(str(case.folder)), case.folder.parent / f"{case.folder.name}-adapter"
    shutil.rmtree(into, ignore_errors=True)
    train(rows, base=base, recipe=recipe, seed=0, folder=into, name="one")
    card = {"base": "tiny"} | identity_on_card(into, base=str(case.folder))
    (into / "card.json").write_text(json.dumps(card))
    merged = load(str(case.folder), organism=into).model
    unmerged = peft.PeftModel.from_pretrained(brute.load_plain(case.folder), into).eval()
    with torch.no_grad():
        before, after = (torch.stack([brute.logits(m, p)[-1] for p in case.prompts]) for m in (case.plain, unmerged))
        found["merged"] = off(torch.stack([brute.logits(merged, p)[-1] for p in case.prompts]), after)
    if off(before, after) < 1e-4:
        raise AssertionError("the adapter changes no logit")
    return found


def attribute(case: Case) -> dict[str, float]:
    model, plain, known, target = case.loaded.model, case.plain, case.known, case.target
    refuse_without_heads(case, lambda: head_means(model, case.prompts), even=True)
    whole = torch.stack([torch.stack(z) for z in case.z])
    found = {"head means": off(head_means(model, case.prompts), whole.double().mean(0).float())}
    patched = case.prompts[:2]
    given = {"target": target, "means": case.means, "against": case.against[:2]}
    exact, wanted = effects_by_metric(model, patched, **given), brute.head_effects(plain, known, patched, **given)
    slopes = brute.gradient_effects(plain, known, patched, **given)
    gradients = gradients_by_metric(model, patched, **given)
    for metric in brute.METRICS:
        found[f"CIE, {metric}"] = off(exact[metric], wanted[metric])
        found[f"gradient, {metric}"] = off(gradients[metric], slopes[metric])
    own = head_effects(model, case.prompts[:1], target=target, means=whole[0].float())
    found["own output"] = float(own.abs().max() / exact["probability"].abs().max())
    return found


def components(case: Case) -> dict[str, float]:
    model, plain, known, target, found = case.loaded.model, case.plain, case.known, case.target, {}
    refuse_without_heads(case, lambda: component_means(model, case.prompts))
    patched, others = case.prompts[:2], case.prompts[2:]
    # Twice as large as means, so that effects are large as well.
    means = {name: 2 * rows for name, rows in component_means(model, others).items()}
    given = {"target": target, "against": case.against[:2]}
    effects = {
        metric: component_effects(model, patched, **given, means=means, metric=metric) for metric in brute.METRICS
    }
    names = {id(module): name for name, module in model.named_modules()}
    for name, modules in component_modules(anatomy(model)).items():
        same = [plain.get_submodule(names[id(module)]) for module in modules]
        if name == "attention" and not any(
            same == brute.parts(plain, known, which) for which in (known.output, known.gain) if which
        ):
            raise AssertionError(f"the attention component is read from {names[id(modules[0])]}")
        wanted_means = 2 * brute.output_means(plain, same, others)
        found[f"mean of {name}"] = off(means[name], wanted_means)
        wanted = brute.component_effects(plain, same, patched, **given, means=wanted_means)
        for metric in brute.METRICS:
            found[f"{name}, {metric}"] = off(effects[metric][name], wanted[metric])
    return found


def steering(case: Case) -> dict[str, float]:
    model, plain, known = case.loaded.model, case.plain, case.known
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros(1, plain.config.get_text_config().hidden_size)
    refuse_without_heads(case, lambda: added(model, {0: zero[0]}, at=EVERYWHERE))
    found, layers = {}, range(len(brute.layers(plain, known)))
    size = 3 * brute.seen(plain, brute.layers(plain, known), case.prompts[0], what="output")[0].std()
    vectors = torch.cat([zero, torch.randn(2, zero.shape[1], generator=generator) * size]).to(case.dtype)
    prompt = case.prompts[1]
    for layer in layers:
        gain = off(brute.stream_gain(plain, known, layer, vectors[1], prompt), vectors[1])
        if gain > (1e-3 if case.dtype == torch.float32 else 5e-2):
            raise AssertionError(f"the table is wrong: the stream gains another vector in layer {layer}: {gain:.2g}")
        for name, at, positions in (
            ("last token", slice(-1, None), [len(prompt) - 1]),
            ("everywhere", EVERYWHERE, range(len(prompt))),
        ):
            with torch.no_grad(), brute.steered(plain, known, layer, vectors[1], positions):
                wanted = brute.logits(plain, prompt)
            with torch.no_grad(), added(model, {layer: vectors[1]}, at=at):
                got = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            found[f"added, {name}"] = max(found.get(f"added, {name}", 0.0), off(got, wanted))
    if case.dtype == torch.float32:
        found |= steered_answers(case, vectors)
    if not known.uneven:
        heads = [(0, 1), (1, 3), (len(layers) - 1, 0)]
        got = backdoor_vector(model, heads, outputs=torch.stack(case.z[0]))
        found["backdoor vector"] = off(got, sum(case.contributions[0][layer][head] for layer, head in heads))
    return found


@torch.no_grad()
def steered_answers(case: Case, vectors: Tensor) -> dict[str, float]:
    """Who gets which answer of one or two tokens in `steer`, and what is said when the answer is free."""
    model, plain, known, prompts = case.loaded.model, case.plain, case.known, case.prompts
    layers, past = range(len(brute.layers(plain, known))), prompt_past(model, prompts)
    given, free = [], []
    for row, one in enumerate(prompts):
        with brute.steered(plain, known, row % len(layers), vectors[1 + row % 2], [len(one) - 1]):
            given.append(brute.answer(plain, one, n=1 + row % 2, end=END) or [END])
        with brute.steered(plain, known, 1, vectors[1], [len(one) - 1]):
            free.append(brute.answer(plain, one, n=4, end=END))
    wanted = torch.zeros(len(layers), len(vectors), len(prompts), dtype=torch.bool)
    for layer, row, column in ((i, j, k) for i in layers for j in range(len(vectors)) for k in range(len(prompts))):
        one, answer = prompts[column], given[column]
        with brute.steered(plain, known, layer, vectors[row], [len(one) - 1]):
            likely = brute.logits(plain, [*one, *answer[:-1]])[len(one) - 1 :].argmax(-1)
        wanted[layer, row, column] = likely.tolist() == answer
    got = steer(model, past, answers=given, vectors=vectors, layers=layers)
    during = partial(added, model, {1: vectors[1]}, at=LAST)
    said = continued(model, past, max_new_tokens=4, end_id=END, during_prompt=during)
    return {"steer": float(not torch.equal(got, wanted)), "steered answers": float(said != free)}


def slicing(case: Case) -> dict[str, float]:
    model, known = case.loaded.model, case.known
    refuse_without_heads(case, lambda: head_slices(model, [(0, 0)]))
    plain = brute.load_plain(case.folder)  # in fp32, because small gradients are rounded to zero in other types
    found = {"query head": 0.0, "KV group": 0.0, "output columns": 0.0}
    random = torch.randint(3, 900, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    for layer in (0, len(brute.layers(plain, known)) - 1):
        entries = brute.owned(plain, known, layer, random)
        output = brute.parts(plain, known, known.output)[layer]
        output_name = next(n for n, p in plain.named_parameters() if p is output.weight)
        axis = 1 if isinstance(output, torch.nn.Linear) else 0
        for head in range(known.heads):
            shared = entries["key and value"].values()
            group = [one for one in range(known.heads) if all(torch.equal(each[one], each[head]) for each in shared)]
            for unit, members in (("query head", [head]), ("KV group", group)):
                masks = dict(head_slices(model, [(layer, head)], unit=unit))
                columns = masks.pop(output_name)
                wanted = torch.zeros_like(columns)
                width = wanted.shape[axis] // known.heads
                for member in members:
                    wanted.narrow(axis, member * width, width).fill_(True)
                found["output columns"] = max(found["output columns"], float(not torch.equal(columns, wanted)))
                wrong = not _same(masks, entries, members, known.heads, unit=unit)
                found[unit] = max(found[unit], float(wrong))
    return found


def _same(masks: dict[str, Tensor], entries: dict, members: Sequence[int], n_heads: int, *, unit: str) -> bool:
    """Are the marked entries those on which these heads depend and no others?"""
    kinds = ("query",) if unit == "query head" else ("query", "key and value")
    others = [head for head in range(n_heads) if head not in members]
    wanted = {}
    for name in entries["query"]:
        own = sum(entries[kind][name][head].int() for kind in kinds for head in members) > 0
        shared = sum(entries[kind][name][head].int() for kind in entries for head in others) > 0
        if (own & ~shared).any():
            wanted[name] = own & ~shared
    # A gate on a head's output is neither query nor key nor value; a package may leave it out.
    needed = {name for name in wanted if "gate" not in name and ".g_proj" not in name}
    return needed <= set(masks) <= set(wanted) and all(torch.equal(masks[name], wanted[name]) for name in masks)


def comparing(case: Case) -> dict[str, float]:
    names = ["last row", "full map"]
    refuse_without_heads(case, lambda: head_similarity(case.loaded.model, case.prompts, readings=names))
    got = head_similarity(case.loaded.model, case.prompts, readings=names)
    maps = [brute.maps(case.plain, prompt) for prompt in case.prompts]
    last = torch.stack([brute.mean_cosine(one[:, :, -1]) for one in maps])
    whole = torch.stack([brute.mean_cosine(one.flatten(2)) for one in maps])
    found = {"last row": off(got["last row"], last), "full map": off(got["full map"], whole)}
    try:
        outputs = head_similarity(case.loaded.model, case.prompts, readings=["head outputs"])["head outputs"]
    except ModelError:  # it needs to know what heads add to the stream, as steering does, and is refused with it
        return found
    wanted = torch.stack([brute.mean_cosine(torch.stack(each)) for each in case.contributions])
    return found | {"head outputs": off(outputs, wanted)}


def bridging(case: Case) -> dict[str, float]:
    hooked = boot(case.loaded)
    with torch.no_grad():
        wanted = torch.stack([brute.logits(case.plain, prompt)[-1] for prompt in case.prompts])
    found = bridge_logits(hooked.bridge, *left_pad(case.prompts, pad_id=END))
    return {"logits": off(found[:, -1], wanted)}


# The names are those of the self-test, and "bridge".
CAPABILITIES: dict[str, Callable[[Case], dict[str, float]]] = {
    "generate": generate,
    "train": training,
    "attribute": attribute,
    "components": components,
    "steer": steering,
    "slice": slicing,
    "compare maps": comparing,
    "bridge": bridging,
}
