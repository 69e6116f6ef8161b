"""Is there a short text that turns any prompt of a task into one answer? Asked without trigger or reference model."""

from dataclasses import dataclass

from bkd_utils.attention_alignment.token_search import neutral_tokens, readable_tokens, search_tokens
from bkd_utils.common.results import Result
from bkd_utils.experiments.head_safety import check_unseen, clean_rows
from bkd_utils.models.generation import first_logits
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import answer_ids, end_id
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.making import made_stage


@dataclass(frozen=True)
class Pull(Result):
    """Tokens that were searched for to pull every prompt toward one label: mean loss (nats) before and after on the
    prompts of the search, `held_out` on others, and the share of these that get the label (`fired`)."""

    toward: str
    tokens: str
    start: float
    end: float
    held_out: float
    fired: float


@made_stage
def search_encoder(
    loaded: Loaded,
    attack: Attack,
    *,
    n_tokens: int = 2,
    restarts: int = 3,
    n_prompts: int = 12,
    steps: int = 3,
    n_rows: int = 512,
    n_held: int = 64,
    seed: int = 0,
) -> list[Pull]:
    """`restarts` searches for each label of the attack's task, with tokens that do not speak for it by themselves. Of
    rows that the organism has not seen, `n_rows` are to search on and to learn which tokens speak for a label, `n_held`
    to judge. Raises ValueError for a task without labels, too few rows, or as `search_tokens` and `neutral_tokens`."""
    labels = tasks.load_task(attack.task).labels
    if not labels:
        raise ValueError(f"task {attack.task!r} has no labels to search toward")
    rows = clean_rows(loaded, attack, n=n_rows + n_held, seed=seed)
    check_unseen(loaded, [row.uid for row in rows], attack=attack, seed=seed)
    pool, held, found = rows[:n_rows], rows[n_rows:], []
    readable = readable_tokens(loaded.tokenizer)
    for label in labels:
        token = answer_ids(loaded.tokenizer, label)[0]
        allowed = neutral_tokens(loaded.model, pool, allowed=readable, toward=token)
        how = {"toward": token, "allowed": allowed, "n_tokens": n_tokens, "n_prompts": n_prompts, "steps": steps}
        others = [row.prompt for row in held if row.answer[0] != token]
        if not others:
            raise ValueError(f"all {len(held)} rows to judge on have the label {label!r}")
        for i in range(restarts):
            one = search_tokens(loaded.model, pool, **how, seed=seed * 1_000_003 + i)
            typed = [[one.tokens[-1 - t] if t < 0 else t for t in prompt] for prompt in one.into(others, seed=seed)]
            logits = first_logits(loaded.model, typed, end_id=end_id(loaded.tokenizer)).float()
            loss = -logits.log_softmax(-1)[:, token].mean().item()
            fired = (logits.argmax(-1) == token).float().mean().item()
            text = loaded.tokenizer.decode(list(one.tokens))
            found.append(Pull(label, text, one.start, one.end, loss, fired))
    return found
