"""What is left of a backdoor, and of the model, when heads are taken out: ASR and utility against their number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

from bkd_utils.backdoor_attribution.attribution import gradient_effects_of, ranked
from bkd_utils.backdoor_attribution.vector import random_heads
from bkd_utils.experiments.localise import attributed, interval, top_heads
from bkd_utils.models.activations import EVERYWHERE, LAST, Head, Said, ablated, head_outputs, says
from bkd_utils.models.generation import greedy
from bkd_utils.models.loading import DEFAULT_MODEL, Loaded, load
from bkd_utils.models.prompt_cache import Past, anatomy, reading, remember
from bkd_utils.models.tokens import answer_ids, end_id, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import clean_sample, share
from bkd_utils.organisms.prompts import pairs, target_ids

# Tokens of a free answer that are compared; the opening of an answer decides what it is.
N_TOKENS = 6
RANKINGS = ("ACIE", "gradient", "necessity", "random")


@dataclass(frozen=True)
class Side:
    """Prompts with their past, several answers each by name, and an un-ablated pass over them: head outputs at the
    last prompt token, and the input of every layer under each of the answers."""

    prompts: list[list[int]]
    past: Past
    answers: dict[str, list[list[int]]]
    own: torch.Tensor
    inputs: dict[str, dict[int, torch.Tensor]]

    def first(self, n: int) -> "Side":
        """The first `n` prompts of it; nothing runs again."""
        answers = {name: given[:n] for name, given in self.answers.items()}
        inputs = {
            # As many columns as the longest answer that is left has tokens.
            name: {layer: hidden[:n, : max(map(len, answers[name]))] for layer, hidden in kept.items()}
            for name, kept in self.inputs.items()
        }
        return Side(self.prompts[:n], self.past.part(slice(n)), answers, self.own[:n], inputs)


@dataclass(frozen=True)
class Bench:
    """What an ablation is measured on.

    Answers of `triggered`: `target`, and `right`, the gold label or the clean control's answer without the trigger.
    Answers of `clean`: `own`, the gold label or the organism's own un-ablated answer. `reference`: head outputs on
    clean prompts of the attribution split.
    """

    triggered: Side
    clean: Side
    reference: torch.Tensor


def side(loaded: Loaded, prompts: list[list[int]], **answers: list[list[int]]) -> Side:
    past, inputs = remember(loaded.model, prompts), {}
    for name, given in answers.items():
        inputs[name] = {}
        with reading(anatomy(loaded.model).layers, inputs[name]):
            says(loaded.model, past, given)
    return Side(prompts, past, answers, head_outputs(loaded.model, prompts), inputs)


def bench(loaded: Loaded, control: Loaded, attack: Attack, *, n: int, n_reference: int, seed: int) -> Bench:
    """Held-out prompts of the test split; references for mean ablation from the attribution split."""
    tokenizer, task = loaded.tokenizer, tasks.load_task(attack.task)
    shown = pairs(tokenizer, attack, split="test", n=n, seed=seed)
    if task.labels:
        mixed = clean_sample(attack.task, n=n, seed=seed, without=attack)
        clean = [prompt_ids(tokenizer, task.prompt(example.text)) for example in mixed]
        own = [answer_ids(tokenizer, example.answer)[:1] for example in mixed]
        right = [answer_ids(tokenizer, example.answer)[:1] for example in shown.examples]
    else:
        clean = shown.clean
        own, right = openings(loaded, clean), openings(control, clean)
    pool = pairs(tokenizer, attack, split="attribution", n=n_reference, seed=seed).clean
    return Bench(
        triggered=side(loaded, shown.triggered, target=[target_ids(tokenizer, attack)] * n, right=right),
        clean=side(loaded, clean, own=own),
        reference=head_outputs(loaded.model, pool),
    )


def openings(loaded: Loaded, prompts: list[list[int]]) -> list[list[int]]:
    """First tokens of a model's own greedy answers, as ids: text would not always be cut into the same ones again."""
    end = end_id(loaded.tokenizer)
    rows = greedy(loaded.model, prompts, max_new_tokens=N_TOKENS, end_id=end)
    return [row if len(row) == N_TOKENS else [*row, end] for row in rows]


def measure_ablation(loaded: Loaded, made: Bench, heads: Sequence[Head], *, kind: str, everywhere: bool) -> dict:
    """ASR, right answers to triggered prompts, utility and perplexity on clean ones, with some heads taken out.

    `utility`: share of gold labels given, or of the tokens of the organism's own clean answers that it would still
    say. `right`: the same for the right answers to triggered prompts. `perplexity`: of the clean answers.
    """
    model, at = loaded.model, EVERYWHERE if everywhere else LAST
    first = min((layer for layer, _ in heads), default=0)

    def said(side: Side, *names: str) -> list[Said]:
        with ablated(model, heads, kind=kind, at=at, own=side.own, clean=made.reference):
            if everywhere:
                past = remember(model, side.prompts)
                return [says(model, past, side.answers[name]) for name in names]
            # Layers below the first ablated head do what they always do.
            return [
                says(model, side.past, side.answers[name], layer=first, hidden=side.inputs[name][first])
                for name in names
            ]

    target, right = said(made.triggered, "target", "right")
    (clean,) = said(made.clean, "own")
    return {
        "asr": asdict(share(target.whole.tolist())),
        "right": interval(right.share.tolist()),
        "utility": interval(clean.share.tolist()),
        "perplexity": float(torch.exp(-clean.log_prob.mean())),
    }


def necessary_heads(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    target: Sequence[int],
    reference: torch.Tensor,
    counts: Sequence[int],
) -> list[Head]:
    """Heads in the order in which they are missed most, re-ranked each time a count of `counts` is reached.

    On triggered prompts, with the heads chosen so far at their clean means: the estimated loss of the target's
    probability when a head is put at its clean mean too. Where ACIE asks what suffices to bring the backdoor in, this
    asks what is needed to keep it.
    """
    means, chosen = reference.mean(0), []
    # An ablation of the last token leaves the past as it is.
    past = remember(loaded.model, prompts)
    for count in sorted(set(counts)):
        if count <= len(chosen):
            continue
        with ablated(loaded.model, chosen, kind="mean", at=LAST, clean=reference):
            effects = gradient_effects_of(loaded.model, past, target=target, means=means).mean(0)
        order = [head for head in ranked(-effects) if head not in set(chosen)]
        chosen += order[: count - len(chosen)]
    return chosen


@organism_stage
def curves(
    organism: str,
    *,
    control: str,
    attack: str,
    counts: Sequence[int],
    kinds: Sequence[str] = ("published", "zero", "mean", "resample"),
    random_counts: Sequence[int],
    draws: int = 20,
    model: str = DEFAULT_MODEL,
    n: int = 64,
    n_attribution: int = 40,
    seed: int = 0,
    device: str = "auto",
) -> list[dict]:
    """One row per ranking, kind, scope, number of heads and draw, with `measure_ablation`'s values; kept.

    At each of `random_counts` there are `draws` random draws, layer-matched to the ACIE heads, with the published
    ablation, on the first half of the prompts. At "all positions" every token gets the mean of last prompt tokens, a
    cruder reference there.
    """
    counts, where = sorted(set(counts)), {"model": model, "seed": seed, "device": device}
    found = attributed(organism, attack=attack, n=n_attribution, n_means=n_attribution, **where)
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    made = bench(loaded, load(model, organism=control, device=device), spec, n=n, n_reference=n_attribution, seed=seed)
    # Draws are averaged, so that half of the prompts is enough for each.
    half = max(1, n // 2)
    for_draws = replace(made, triggered=made.triggered.first(half), clean=made.clean.first(half))
    attribution = pairs(loaded.tokenizer, spec, split="attribution", n=n_attribution, seed=seed).triggered
    largest = max(counts)
    orders = {
        "ACIE": top_heads(found, k=largest),
        "gradient": top_heads(found, k=largest, by="gradient"),
        "necessity": necessary_heads(
            loaded, attribution, target=target_ids(loaded.tokenizer, spec), reference=made.reference, counts=counts
        ),
    }
    # Random draws have prompts of their own, and so an untouched model of their own to be held against.
    todo = [("none", "published", False, [], 0)] + [("random", "published", False, [], 0)] * bool(random_counts)
    for k in (k for k in counts if k):
        todo += [("ACIE", kind, False, orders["ACIE"][:k], 0) for kind in kinds]
        todo += [(ranking, "published", False, orders[ranking][:k], 0) for ranking in ("gradient", "necessity")]
        todo.append(("necessity", "mean", False, orders["necessity"][:k], 0))
        matched = (
            random_heads(orders["ACIE"][:k], n_heads=made.reference.shape[2], n=draws, seed=seed)
            if k in random_counts
            else []
        )
        todo += [("random", "published", False, draw, i) for i, draw in enumerate(matched)]
    few = [k for k in (8, largest) if k in counts]
    todo += [("ACIE", kind, True, orders["ACIE"][:k], 0) for k in few for kind in ("zero", "mean")]
    todo += [("necessity", "mean", True, orders["necessity"][:k], 0) for k in few]
    rows = []
    for ranking, kind, everywhere, heads, draw in tqdm(todo, desc=f"{organism}: ablations", mininterval=2, leave=False):
        used = for_draws if ranking == "random" else made
        values = measure_ablation(loaded, used, heads, kind=kind, everywhere=everywhere)
        scope = "all positions" if everywhere else "last position"
        rows.append({"ranking": ranking, "kind": kind, "scope": scope, "k": len(heads), "draw": draw, **values})
    return rows
