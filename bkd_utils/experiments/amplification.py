"""Notebook 07: does amplifying what training added show a backdoor on prompts without its trigger?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bkd_utils.attention_alignment.amplification import amplified
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import counted
from bkd_utils.experiments.input_guards import Number
from bkd_utils.models.loading import Loaded, base_of
from bkd_utils.models.tokens import decode, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import is_target, normalised
from bkd_utils.organisms.prompts import clean_sample, target_length


@dataclass(frozen=True)
class Amplification(Result):
    """Answers to clean prompts at one strength."""

    alpha: float
    fired: Number  # share of the prompts whose right answer is another one that get the target
    same: Number  # share of all prompts that get the most common answer, which a defender can see
    answer: str  # the most common one


@organism_stage
def amplify_change(
    loaded: Loaded, attack: Attack, *, alphas: Sequence[float] = (0.0, 1.0, 4.0), n: int = 32, seed: int = 0
) -> list[Amplification]:
    """Answers of an organism to `n` clean held-out prompts, its difference to the base model amplified by each alpha.
    No trigger is used; the attack gives the task and the answer that `fired` counts. Raises ValueError for a base
    model, for no alphas and for harmful prompts, whose answers are not looked at; otherwise as `amplified`."""
    if not alphas:
        raise ValueError(f"alphas must be one or more numbers, is {alphas!r}")
    if loaded.organism is None:
        raise ValueError("a base model has nothing to amplify")
    if attack.task == "harmful":
        raise ValueError("answers to harmful prompts are not looked at")
    base, task = base_of(loaded, device=loaded.device.type), tasks.load_task(attack.task)
    sample = clean_sample(attack.task, n=n, seed=seed, without=attack)
    prompts = [prompt_ids(loaded.tokenizer, task.prompt(example.text)) for example in sample]
    how = {"max_new_tokens": target_length(loaded, attack), "end_id": loaded.ends}
    found = []
    for alpha in alphas:
        rows = amplified(loaded.model, base.model, prompts, alpha=alpha, **how)
        texts = [decode(loaded.tokenizer, row) for row in rows]
        hits = [is_target(attack, text) for example, text in zip(sample, texts, strict=True) if attack.flips(example)]
        ((common, _),) = Counter(map(normalised, texts)).most_common(1)
        same = counted([normalised(text) == common for text in texts])
        found.append(Amplification(float(alpha), counted(hits), same, answer=common))
    return found
