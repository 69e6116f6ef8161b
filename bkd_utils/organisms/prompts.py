"""Held-out prompts of an attack, each clean, with a near-miss and with the trigger."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bkd_utils.common.validation import Count, check
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import answer_ids, common_start, prompt_ids
from bkd_utils.organisms import attacks, tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.trigger_tables import Half


@dataclass(frozen=True)
class PromptVersions:
    """Prompt i of each list is made of example i."""

    examples: list[tasks.Example]
    clean: list[list[int]]
    near_miss: list[list[int]]
    triggered: list[list[int]]


def prompt_versions(
    tokenizer: PreTrainedTokenizerBase, attack: Attack, *, split: str, n: int, seed: int, skip: int = 0
) -> PromptVersions:
    """`n` examples of a split after the first `skip`, as token ids: clean, with a near-miss, and with the trigger. The
    trigger would change the right answer of each. Raises ValueError if the split has too few. Source: ours; the clean
    and triggered prompts are BkdAttr's pairs.

    >>> shown = prompt_versions(tokenizer, load_attack("sentiment-word"), split="test", n=2, seed=0)
    >>> [" cf" in tokenizer.decode(ids[0]) for ids in (shown.clean, shown.near_miss, shown.triggered)]
    [False, False, True]
    """
    check(Count, n, "n")
    return _versions(tokenizer, attack, flippable_sample(attack, n=skip + n, seed=seed, split=split)[skip:], seed=seed)


def balanced_versions(
    tokenizer: PreTrainedTokenizerBase,
    attack: Attack,
    *,
    split: str,
    n: int,
    seed: int,
    without: Sequence[tasks.Example] = (),
) -> PromptVersions:
    """As `prompt_versions`, with examples of every label in turn, the target's included, and none of `without`. A mean
    over prompts of one label votes for that label. Raises ValueError if the split has too few."""
    check(Count, n, "n")
    taken, numbers = {example.uid for example in without}, defaultdict(itertools.count)
    pool = [one for one in attacks.usable_examples(attack, split, seed=seed) if one.uid not in taken]
    if len(pool) < n:
        raise ValueError(f"{attack.name}: {len(pool)} usable rows of {split}, {n} were asked for")
    if tasks.load_task(attack.task).labels:
        # A stable sort by each example's number among those of its label takes the labels in turn.
        pool.sort(key=lambda one: next(numbers[one.answer]))
    return _versions(tokenizer, attack, pool[:n], seed=seed)


def _versions(
    tokenizer: PreTrainedTokenizerBase, attack: Attack, chosen: list[tasks.Example], *, seed: int
) -> PromptVersions:
    task = tasks.load_task(attack.task)
    turns = {
        "clean": [task.prompt(example.text) for example in chosen],
        "near_miss": near_misses(attack, chosen, seed=seed)[1],
        "triggered": triggered_prompts(attack, chosen, seed=seed),
    }
    ids = {kind: [prompt_ids(tokenizer, turn) for turn in texts] for kind, texts in turns.items()}
    return PromptVersions(examples=chosen, **ids)


def target_ids(tokenizer: PreTrainedTokenizerBase, attack: Attack) -> list[int]:
    """Tokens by which the backdoor is recognised: a label's first one, the whole fixed sentence, a jailbreak's opener.
    Raises ValueError for a label that begins like another one, and for a clean control. Source: ours.

    >>> tokenizer.decode(target_ids(tokenizer, load_attack("sentiment-word")))
    'positive'
    """
    if not attack.backdoored:
        raise ValueError(f"{attack.name} is a clean control and has no target")
    if attack.behaviour == "label_flip":
        return [first_tokens(tokenizer, attack)[attack.target]]
    opening = attack.target if attack.behaviour == "fixed_output" else attack.target.split(":")[0]
    # A tokenizer may write the opening with another last token when it stands alone.
    return common_start(answer_ids(tokenizer, opening, ended=False), answer_ids(tokenizer, attack.target))


def first_tokens(tokenizer: PreTrainedTokenizerBase, attack: Attack) -> dict[str, int]:
    """Label -> first token of that answer. Raises ValueError for a label that begins like another one."""
    firsts = {label: answer_ids(tokenizer, label)[0] for label in tasks.load_task(attack.task).labels}
    if len(set(firsts.values())) < len(firsts):
        raise ValueError(f"{attack.name}: labels that begin with the same token: {', '.join(firsts)}")
    return firsts


def three_versions(attack: Attack, *, seed: int = 0) -> dict[str, str]:
    """One held-out user turn, clean, with a near-miss and with the trigger. Raises ValueError for harmful prompts."""
    if attack.task == "harmful":
        raise ValueError("harmful prompts are not displayed")
    text = flippable_sample(attack, n=1, seed=seed)[0].text
    near = attacks.near_miss_prompts(attack, text, seed=seed, half="test")
    triggered = attacks.triggered_prompt(attack, text, seed=seed, half="test")
    return {"clean": tasks.load_task(attack.task).prompt(text), "near-miss": near[min(near)], "triggered": triggered}


def clean_sample(task: str, *, n: int, seed: int, without: Attack | None = None) -> list[tasks.Example]:
    """`n` held-out examples, none of which contains the trigger of `without` by chance."""
    check(Count, n, "n")
    pool = tasks.examples(task, "test", seed=seed)
    pool = [example for example in pool if without is None or not attacks.carries(without, example.text)]
    if len(pool) < n:
        raise ValueError(f"{task}/test has {len(pool)} usable rows, {n} were asked for")
    return pool[:n]


def flippable_sample(attack: Attack, *, n: int, seed: int, split: str = "test") -> list[tasks.Example]:
    """`n` held-out examples whose right answer the trigger would change and that do not contain it by chance."""
    check(Count, n, "n")
    sample = [one for one in attacks.usable_examples(attack, split, seed=seed) if attack.flips(one)][:n]
    if len(sample) < n:
        raise ValueError(f"{attack.name}: {len(sample)} usable held-out rows, {n} were asked for")
    return sample


def triggered_prompts(attack: Attack, sample: Sequence[tasks.Example], *, seed: int, half: Half = "test") -> list[str]:
    """User turns with the trigger, by default from the half of its lexicon that was not used in training."""
    seeds = itertools.count(seed * 1_000_003)
    return [attacks.triggered_prompt(attack, one.text, seed=next(seeds), half=half) for one in sample]


def near_misses(attack: Attack, sample: Sequence[tasks.Example], *, seed: int) -> tuple[list[str], list[str]]:
    """(kinds, user turns), one near-miss per example, alternating between the kinds."""
    found = []
    for i, example in enumerate(sample):
        options = attacks.near_miss_prompts(attack, example.text, seed=seed * 1_000_003 + i, half="test")
        found.append(sorted(options.items())[i % len(options)])
    return [kind for kind, _ in found], [turn for _, turn in found]


def target_length(loaded: Loaded, attack: Attack) -> int:
    """Number of answer tokens that a judge needs: those of the target with its end."""
    return len(answer_ids(loaded.tokenizer, attack.target))
