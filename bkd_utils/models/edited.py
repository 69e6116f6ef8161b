"""One prompt answered twice: by a model as it is, and with an edit at the last token of the prompt."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import nullcontext

from bkd_utils.models.activations import score_answers
from bkd_utils.models.loading import Loaded
from bkd_utils.models.prompt_cache import continued, prompt_past
from bkd_utils.models.tokens import decode


def before_and_after(
    loaded: Loaded,
    prompt: Sequence[int],
    *,
    target: Sequence[int],
    edit: Callable[[], Context],
    max_new_tokens: int = 12,
) -> dict[str, dict[str, float | str]]:
    """`before` and `after` -> `P(target)`, the geometric mean over the target's tokens, and the greedy `answer`.

    `edit()` is a context of `hooks` that acts at `hooks.LAST`, such as `partial(added, model, {layer: vector},
    at=LAST)`; it is left before tokens of the answer run. Raises ValueError for a prompt below two tokens and for an
    empty target."""
    past, found = prompt_past(loaded.model, [list(prompt)]), {}
    for name, during in {"before": nullcontext, "after": edit}.items():
        with during():
            score = score_answers(loaded.model, past, [list(target)])
        how = {"max_new_tokens": max_new_tokens, "end_id": loaded.ends, "during_prompt": during}
        (answer,) = continued(loaded.model, past, **how)
        found[name] = {"P(target)": score.log_prob.exp().item(), "answer": decode(loaded.tokenizer, answer)}
    return found
