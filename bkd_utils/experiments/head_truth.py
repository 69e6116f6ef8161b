"""Which heads carry a backdoor, as far as single heads do: necessity and sufficiency, at two places of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from bkd_utils.backdoor_attribution.attribution import head_means
from bkd_utils.backdoor_attribution.log_odds import head_log_odds
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import averaged
from bkd_utils.experiments.head_safety import HeadValues
from bkd_utils.models.generation import first_logits
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import Ids, answer_ids, common_start, end_id, prompt_ids
from bkd_utils.organisms import attacks, tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import prompt_versions, target_ids


@dataclass(frozen=True)
class HeadTruth(Result):
    """Log-odds in nats of the target against the right answer, by their first tokens: by how much a head raises them.

    Effects are means over prompts, place -> `[layer][head]`.
    """

    clean: dict  # log-odds without any change, a mean with its interval
    triggered: dict
    sufficiency: dict[str, HeadValues]  # gained on clean prompts with the head's mean over triggered ones
    necessity: dict[str, HeadValues]  # lost on triggered prompts with the head's mean over clean ones


def trigger_tails(clean: Ids, triggered: Ids) -> list[int]:
    """For each pair, the number of last tokens that begin with the last token of the trigger."""
    return [len(common_start(one[::-1], other[::-1])) + 1 for one, other in zip(clean, triggered, strict=True)]


def cut(prompts: Ids, tails: Sequence[int]) -> list[list[int]]:
    """Prompts up to the first of their last `tails` tokens. What heads write there does not depend on the others."""
    return [list(prompt[: len(prompt) - tail + 1]) for prompt, tail in zip(prompts, tails, strict=True)]


@organism_stage
def judge_heads(loaded: Loaded, attack: Attack, *, n: int = 16, n_means: int = 40, seed: int = 0) -> HeadTruth:
    """`HeadTruth` on `n` prompts of the attribution split, with means of `n_means` others of it.

    At the place "trigger" it is the trigger's last token, and in the clean twin the token as far from the end. The mean
    over clean last tokens is that of prompts of all labels, for else heads that read out the label would seem to be
    necessary. They may well be sufficient. The right answer is the gold one, or the model's own to the clean twin.
    Raises ValueError for too few prompts, ModelError for an encoder.
    """
    model, tokenizer, how = loaded.model, loaded.tokenizer, {"split": "attribution", "seed": seed}
    shown = prompt_versions(tokenizer, attack, n=n, **how)
    others = prompt_versions(tokenizer, attack, n=n_means, skip=n, **how)
    own = first_logits(model, shown.clean, end_id=end_id(tokenizer)).argmax(-1).tolist()
    right = [
        answer_ids(tokenizer, example.answer)[0] if example.answer else token
        for example, token in zip(shown.examples, own, strict=True)
    ]
    scored, task = {example.uid for example in shown.examples}, tasks.load_task(attack.task)
    pool = [example for example in tasks.examples(attack.task, **how) if example.uid not in scored]
    plain = [task.prompt(example.text) for example in pool if not attacks.carries(attack, example.text)][:n_means]
    mixed = [prompt_ids(tokenizer, turn) for turn in plain]
    at = trigger_tails(others.clean, others.triggered)
    # Place -> tails of the scored prompts, and prompts that end there: triggered and clean ones.
    places = {
        "last token": ([1] * n, others.triggered, mixed),
        "trigger": (trigger_tails(shown.clean, shown.triggered), cut(others.triggered, at), cut(others.clean, at)),
    }
    sufficiency, necessity, given = {}, {}, {"target": target_ids(tokenizer, attack)[0], "right": right}
    for place, (tails, triggered, clean) in places.items():
        gained, quiet = head_log_odds(model, shown.clean, tails=tails, means=head_means(model, triggered), **given)
        lost, firing = head_log_odds(model, shown.triggered, tails=tails, means=head_means(model, clean), **given)
        sufficiency[place], necessity[place] = (one.mean(0).tolist() for one in (gained, -lost))
    return HeadTruth(averaged(quiet.tolist()), averaged(firing.tolist()), sufficiency, necessity)
