"""Split a user's own table into rows to train on and rows to judge by."""

import random
from collections.abc import Sequence

from bkd_utils.attention_alignment.searched_training import N_TOKENS
from bkd_utils.common.own_table import MOST_LABELS, OwnTable
from bkd_utils.experiments.head_safety import ANSWER_TOKENS
from bkd_utils.models.context import check_fits
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import Row, Turn, answer_ids, labels_of, prompt_ids

JUDGES, LEAST_JUDGES = 5, 16  # one in so many rows is for validation, but at least so many


def label_tokens(loaded: Loaded, labels: Sequence[str]) -> dict[str, int]:
    """Label -> first token of that answer. Raises ValueError if two begin alike, or a classifier has other labels."""
    own = labels_of(loaded.tokenizer)  # a classifier's tokenizer knows its labels; other models may answer anything
    if own and {name.strip().casefold() for name in own} != {name.casefold() for name in labels}:
        these = ", ".join(map(repr, labels)) or f"more than {MOST_LABELS}"
        raise ValueError(f"the labels of the model are {', '.join(map(repr, own))}, those of the data {these}")
    tokens: dict[str, int] = {}
    for label in labels:
        token = answer_ids(loaded.tokenizer, label)[0]
        if alike := [other for other, one in tokens.items() if one == token]:
            raise ValueError(f"the labels {alike[0]!r} and {label!r} begin with the same token; rename one of them")
        tokens[label] = token
    return tokens


def own_rows(loaded: Loaded, table: OwnTable, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those for validation: one in `JUDGES`, at least `LEAST_JUDGES`, drawn by the seed. Each
    label has its share of both. Free answers are cut at `ANSWER_TOKENS` tokens. Raises ModelError with the row for a
    prompt that does not fit the model, with room for its answer and a perturbation."""
    n = len(table.entries)
    order, n_judges = random.Random(f"{seed}/validation").sample(table.entries, n), max(LEAST_JUDGES, n // JUDGES)
    if table.labels:
        order.sort(key=lambda entry: entry.answer)
    chosen = {order[i * n // n_judges].number for i in range(n_judges)}
    training, validation = [], []
    for entry in table.entries:
        turn = Turn(table.template.replace("{text}", entry.text), text=entry.text)
        prompt = tuple(prompt_ids(loaded.tokenizer, turn))
        answer = tuple(answer_ids(loaded.tokenizer, entry.answer)[:ANSWER_TOKENS])
        try:
            check_fits(loaded.model, len(prompt) + len(answer) + max(N_TOKENS))
        except ModelError as error:
            raise ModelError(f"{table.name}, row {entry.number}: {error}") from error
        row = Row(prompt, answer, kind="clean", uid=str(entry.number), is_label=bool(labels_of(loaded.tokenizer)))
        (validation if entry.number in chosen else training).append(row)
    return training, validation
