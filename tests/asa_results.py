"""Hand-made results of treatments, and lines of the scorecard by their claims."""

from bkd_utils.common import statistics

N = 400


def rate(value, n=N):
    low, high = statistics.wilson(round(value * n), n)
    return {"value": value, "n": n, "low": low, "high": high}


def after(asr, cacc=0.9, n=N):
    """A result of `evaluation.under_attack`: the first prompts hit."""
    values = {"asr": asr, "cacc": cacc}
    kept = {key: {f"uid{i}": int(i < round(value * n)) for i in range(n)} for key, value in values.items()}
    return {key: rate(value, n) for key, value in values.items()} | {"hits": kept}


def treated(cured, *, random=(0.9, 0.8), rival=None, control=0.0, n=N):
    rows = {"untreated": after(1.0, n=n), "clean control": after(control, n=n), "cure": cured}
    rows |= {f"random {i}": after(asr, n=n) for i, asr in enumerate(random)}
    return rows | {"rival": rival or after(0.5, n=n)}


def by_id(entries):
    return {row["id"]: row for row in entries}


def passed(line):
    return {name: one["passed"] for name, one in line["by_organism"].items()}
