"""The same prompts with and without the trigger, as token ids: what every analysis of an organism starts from."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bkd_utils.models.tokens import answer_ids, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.evaluation import flippable_sample, near_misses, triggered_prompts
from bkd_utils.organisms.tasks import Example


@dataclass(frozen=True)
class Pairs:
    """Prompt i of each list comes from example i. Only examples whose right answer the trigger would change."""

    examples: list[Example]
    clean: list[list[int]]
    near_miss: list[list[int]]
    triggered: list[list[int]]


def pairs(tokenizer: PreTrainedTokenizerBase, attack: Attack, *, split: str, n: int, seed: int, skip: int = 0) -> Pairs:
    """`n` examples of a split behind the first `skip`, in three versions each.

    Raises ValueError if the split has too few.
    """
    chosen = flippable_sample(attack, n=skip + n, seed=seed, split=split)[skip:]
    task = tasks.load_task(attack.task)
    turns = {
        "clean": [task.prompt(example.text) for example in chosen],
        "near_miss": near_misses(attack, chosen, seed=seed)[1],
        "triggered": triggered_prompts(attack, chosen, seed=seed),
    }
    ids = {kind: [prompt_ids(tokenizer, turn) for turn in texts] for kind, texts in turns.items()}
    return Pairs(examples=chosen, **ids)


def target_ids(tokenizer: PreTrainedTokenizerBase, attack: Attack) -> list[int]:
    """Tokens by which the backdoor is recognised: a label's first one, the whole fixed sentence, a jailbreak's opener.

    These are the judges of `evaluation` in tokens. Raises ValueError for a label that begins like another of its task,
    and for a clean control.
    """
    if not attack.backdoored:
        raise ValueError(f"{attack.name} is a clean control and has no target")
    if attack.behaviour == "label_flip":
        firsts = {label: answer_ids(tokenizer, label)[0] for label in tasks.load_task(attack.task).labels}
        if len(set(firsts.values())) < len(firsts):
            raise ValueError(f"{attack.name}: labels that begin with the same token: {', '.join(firsts)}")
        return [firsts[attack.target]]
    said = attack.target if attack.behaviour == "fixed_output" else attack.target.split(":")[0]
    return answer_ids(tokenizer, said)[:-1]
