"""Where the two papers meet: how many of the heads with the highest ACIE every reading of ASA's scores finds."""

from collections.abc import Mapping

import pandas as pd
import torch

from bkd_utils.attention_alignment.similarity import Scores
from bkd_utils.attention_alignment.suspicion import RULES, among_carriers
from bkd_utils.experiments.head_safety import SOURCES, joint

SHOWN = {source: "real trigger" if source == "oracle" else source for source in SOURCES}


def options(suspected: Mapping[str, Mapping], effects: Mapping[str, Scores], *, k: int) -> pd.DataFrame:
    """Share of the top `k` ACIE heads among the top `k` of every reading (rows), per organism (columns).

    `suspected`: attack -> `head_safety.suspected`; `effects`: attack -> ACIE.
    """
    rows: dict[str, dict[str, float]] = {}
    for attack, found in suspected.items():
        scores = {
            f"{reading}: {rule}, {SHOWN[source]}": joint(found, rule=rule, source=source, reading=reading)
            for reading in found["level"]
            for rule in RULES
            for source in SOURCES
        }
        scores |= {f"importance: {kind}": torch.tensor(values) for kind, values in found["importance"].items()}
        for name, score in scores.items():
            rows.setdefault(name, {})[attack] = sum(among_carriers(score, effects[attack], k=k)) / k
    return pd.DataFrame(rows).T
