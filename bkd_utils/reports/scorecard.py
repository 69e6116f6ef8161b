"""Published claims, our criteria (`data/published.toml`), our numbers, and a verdict each.

An organism passes if the whole 95 % interval of its effect lies on the right side of the bar, fails if all of it lies
on the wrong side, and is otherwise undecided. A claim holds if all organisms pass, fails if one fails, as the papers
state their claims without exception, and is otherwise undecided. The price: of claims that are true of each of ten
organisms up to two in ten are called failed by chance (ten intervals, each wrong on one side in 2.5 %)."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from bkd_utils.common.files import DATA, FIGURES, UserError, read_json, write_json
from bkd_utils.common.statistics import over_splits
from bkd_utils.common.validation import read_tables
from bkd_utils.models.identity import model_identity
from bkd_utils.reports import style

T = TypeVar("T")
KEYS = {"paper", "claim", "published", "source", "provenance", "measure", "unit", "criterion"}
PAPER_KEYS = {"title", "arxiv", "status", "known", "reading"}  # what is known here, and what introduces its claims
# `reading` introduces a claim that is tested in another way than the paper's others, in place of the paper's own;
# `earlier` is a criterion that was replaced; `apart` names a kind of organism on which the claim is judged once more.
OPTIONAL = {"reading", "earlier", "apart"}
# How we know of a claim, in words.
PROVENANCE = {
    "read": "read in the paper",
    "second hand": "second hand: quoted by others who read it",
    "abstract": "from the abstract only",
    "ours": "ours: no paper says it",
}
# What a row of the scorecard must say; `record` adds the model and its identity.
ROW = {"id", "paper", "reading", "by_organism", "verdict", "reason", "figure"}
ROW |= {"claim", "published", "provenance", "criterion"}
COLUMNS = ["claim", "published", "provenance", "criterion", "effects", "verdict", "organisms", "because", "figure"]
VERDICTS = ("holds", "fails", "undecided")
SEED = re.compile(r"-seed\d+$")
MARKS = {True: "✓", False: "✗", None: "?"}


def _published(*, papers: bool) -> dict[str, dict[str, str]]:
    """The tables of papers or of claims in `published.toml`. Raises UserError unless each has the keys of its kind."""
    claims = read_tables(DATA / "published.toml")
    of_papers = claims.pop("papers", {})
    found, keys, prefix = (of_papers, PAPER_KEYS, "papers.") if papers else (claims, KEYS, "")
    for name, entry in found.items():
        may = set() if papers else OPTIONAL
        given = set(entry) - may if isinstance(entry, dict) else set()
        if given != keys or not all(isinstance(one, str) for one in entry.values()):
            may_be = f" and may be {', '.join(may)}" if may else ""
            told = f"keys must be {', '.join(sorted(keys))}{may_be}, each a text"
            raise UserError(f"published.toml, {prefix}{name}: {told}")
    return found


def papers() -> dict[str, dict[str, str]]:
    """Short name -> `PAPER_KEYS`; UserError if one lacks."""
    return _published(papers=True)


def published() -> dict[str, dict[str, str]]:
    """Claim id -> `KEYS`, of a claim judged apart once per kind of organisms. UserError names what is wrong."""
    found = {}
    for name, entry in _published(papers=False).items():
        kind = entry.pop("apart", None)
        found[name] = entry | ({"reading": "specific organisms"} if kind else {})
        if kind:
            found[f"{name}-{kind}"] = entry | {"reading": f"{kind} organisms"}
    for name, entry in found.items():
        for key, known in (("provenance", PROVENANCE), ("paper", papers())):
            if entry[key] not in known:
                raise UserError(f"published.toml, {name}: {key} {entry[key]!r} is none of {', '.join(known)}")
    return found


def at_least(number: Mapping[str, float | None], bar: float) -> bool | None:
    """Is the effect at least `bar`? None if its interval contains the bar, has no width, or does not exist."""
    low, high = number["low"], number["high"]
    if None in (low, high) or low == high:
        return None
    return True if low >= bar - 1e-9 else False if high < bar - 1e-9 else None


def at_most(number: Mapping[str, float | None], bar: float) -> bool | None:
    """Is the effect at most `bar`? As `at_least`."""
    low, high = (None if number[end] is None else -number[end] for end in ("high", "low"))
    return at_least({"low": low, "high": high}, -bar)


def judged(numbers: Mapping[str, Mapping], rule: Callable, bar: float) -> dict[str, bool | None]:
    """What `at_least` or `at_most` says of each organism's number."""
    return {name: rule(number, bar) for name, number in numbers.items()}


def both(*outcomes: bool | None) -> bool | None:
    """Fails if any condition fails, passes if all pass, undecided otherwise."""
    return False if False in outcomes else None if None in outcomes else True


def either(*outcomes: bool | None) -> bool | None:
    """Passes if any condition passes, fails if all fail, undecided otherwise."""
    return True if True in outcomes else None if None in outcomes else False


def verdict(passed: Mapping[str, bool | None]) -> str:
    """`holds` if all organisms pass, `fails` if at least one fails, else `undecided`. ValueError for no organisms."""
    if not passed:
        raise ValueError("a verdict over no organisms")
    return {True: "holds", False: "fails", None: "undecided"}[both(*passed.values())]


def apart(claim: str, kind: str) -> str:
    """The id of a claim for one kind of organisms: "specific", as it is, or "plain"."""
    return claim if kind == "specific" else f"{claim}-{kind}"


def entries(claims: Mapping[str, tuple[Mapping, Mapping, str, str]], *, kind: str) -> list[dict]:
    """Lines of BkdAttr for one kind of organisms, from name -> arguments of `entry`; means over seeds are added."""
    lines = []
    for name, (numbers, passed, figure, reason) in claims.items():
        told = f"{reason} {over_seeds(numbers)}".strip()
        lines.append(entry(apart(f"bkdattr-{name}", kind), numbers, passed, figure, told))
    return lines


def entry(
    claim: str, numbers: Mapping[str, Mapping], passed: Mapping[str, bool | None], figure: str, reason: str
) -> dict:
    """One line of the scorecard, but for the model that `record` adds, of numbers and outcomes by organism; ValueError
    for an unknown claim, no organisms, or organisms in one of the two only."""
    known = published()
    if claim not in known:
        raise ValueError(f"unknown claim {claim!r}; known: {', '.join(known)}")
    if lone := sorted(numbers.keys() ^ passed.keys()):
        raise ValueError(f"{claim}: a number or an outcome is missing for {', '.join(lone)}")
    about = known[claim]
    outcomes = {name: None if passed[name] is None else bool(passed[name]) for name in numbers}
    reading = about.get("reading", papers()[about["paper"]]["reading"])
    row = {"id": claim, "paper": about["paper"], "reading": reading}
    row |= {"claim": about["claim"], "published": about["published"], "provenance": PROVENANCE[about["provenance"]]}
    measured = {name: {key: number[key] for key in ("value", "n", "low", "high")} for name, number in numbers.items()}
    row["by_organism"] = {name: one | {"passed": outcomes[name]} for name, one in measured.items()}
    row |= {"criterion": about["criterion"], "verdict": verdict(outcomes), "reason": reason, "figure": figure}
    return row


def checked(rows: Sequence[Mapping], *, where: str = "scorecard") -> list[dict]:
    """The rows; UserError that names the first one that lacks what it must say, and for rows on different models."""
    for row in rows:
        name = row.get("id", "without an id")
        if lacks := sorted(ROW - set(row)):
            told = f"has no {', no '.join(lacks)}; run its notebook again, or put the file aside"
            raise UserError(f"{where}: row {name!r} {told}")
        if row["provenance"] not in PROVENANCE.values():
            raise UserError(f"{where}: row {name!r}: provenance {row['provenance']!r} is unknown")
        if row["verdict"] not in VERDICTS:
            raise UserError(f"{where}: row {name!r}: verdict {row['verdict']!r} is none of {', '.join(VERDICTS)}")
    models = {f"{row.get('model')} ({row.get('identity', 'unknown')[:8]})" for row in rows}
    if len(models) > 1:
        raise UserError(f"{where}: lines of different models: {', '.join(sorted(models))}; put the file aside")
    return [dict(row) for row in rows]


def record(entries: Sequence[Mapping], *, model: str) -> Path:
    """Write entries, measured on `model`, into the scorecard beside the figures, in place of those of the same claims.
    The lines of another model are put aside under its identity. After a UserError for a row the file is as it was."""
    about = {"model": model, "identity": model_identity(model)}
    path = style.folder(about["identity"]) / "scorecard.json"
    lines = merged([{**row, **about} for row in entries], path)
    kept = read_json(path) if path.is_file() else []
    if kept and (other := kept[0].get("identity", "unknown")) != about["identity"]:
        path.replace(path.with_name(f"scorecard-{other[:8]}.json"))
    write_json(path, lines)
    return path


def merged(entries: Sequence[Mapping], path: Path) -> list[dict]:
    """Entries and the kept lines of other claims on the same model, in the order of `published`."""
    order, new = list(published()), checked(entries)
    others, own = set(order) - {row["id"] for row in new}, {row.get("identity") for row in new}
    old = read_json(path) if path.is_file() else []
    old = [row for row in old if row["id"] in others and row.get("identity") in own]
    kept = {row["id"]: row for row in checked(old, where=str(path)) + new}
    return sorted(kept.values(), key=lambda row: order.index(row["id"]))


def recorded(*, model: str) -> list[dict]:
    """The scorecard of this model: of this run, or else the committed one; UserError if neither is of this model."""
    identity = model_identity(model)
    for path in (style.folder(identity) / "scorecard.json", FIGURES / "scorecard.json"):
        rows = read_json(path) if path.is_file() else []
        if any(row.get("identity") == identity for row in rows):
            return checked(rows, where=str(path))
    raise UserError(f"nothing was measured for {model} ({identity[:8]}) yet: notebooks 02 to 07 write its scorecard")


def named(row: Mapping) -> str:
    """The claim, introduced by whose words it is: "our reading: ..." where the paper's own are not known."""
    return f"{row['reading']}: {row['claim']}" if row["reading"] else row["claim"]


def count(row: Mapping) -> str:
    """How many organisms pass, fail and are undecided, such as "3 of 4 pass, 1 undecided"."""
    found = Counter(one["passed"] for one in row["by_organism"].values())
    others = [f"{found[outcome]} {word}" for outcome, word in ((False, "fail"), (None, "undecided")) if found[outcome]]
    return ", ".join([f"{found[True]} of {sum(found.values())} pass", *others])


def effect(one: Mapping[str, float | None]) -> str:
    """An effect with its interval and a mark: ✓ passes, ✗ fails, ? is undecided."""
    low, high = one["low"], one["high"]
    interval = "no interval" if None in (low, high) else f"[{low:.3g}, {high:.3g}]"
    return f"{one['value']:.3g} {interval} {MARKS[one['passed']]}"


def _said(entries: Sequence[Mapping]) -> pd.DataFrame:
    """Everything that the tables say of each row."""
    said = {"claim": named, "effects": effects, "organisms": count, "because": itemgetter("reason")}
    rows = [row | {column: say(row) for column, say in said.items()} for row in checked(entries)]
    return pd.DataFrame(rows, columns=COLUMNS).set_index("claim")


def table(entries: Sequence[Mapping]) -> pd.DataFrame:
    """What a notebook shows at its end: claim, published, provenance, verdict, organisms that pass, reason."""
    return _said(entries)[["published", "provenance", "verdict", "organisms", "because"]]


def scorecard(entries: Sequence[Mapping], *, paper: str) -> pd.DataFrame:
    """What notebook 09 shows of one paper: all columns. Empty if none of the paper's claims was judged."""
    return _said([row for row in entries if row["paper"] == paper])


def numbers(entries: Sequence[Mapping]) -> pd.DataFrame:
    """The effect of every claim and organism with its interval and a mark: ✓ passes, ✗ fails, ? is undecided."""
    rows = {row["id"]: {name: effect(one) for name, one in row["by_organism"].items()} for row in entries}
    return pd.DataFrame(rows).T.fillna("").rename_axis("claim")


def effects(row: Mapping) -> str:
    """What is measured, and for each organism the effect with its interval, a mark and n."""
    about = published()[row["id"]]
    each = [f"{name} {effect(one)}, n = {one['n']}" for name, one in row["by_organism"].items()]
    return f"{about['measure']} (n: {about['unit']}): {'; '.join(each)}"


def missing(entries: Sequence[Mapping]) -> pd.DataFrame:
    """Published claims without a line."""
    return pd.DataFrame(published(), index=["paper", "claim"]).T.drop([row["id"] for row in entries], errors="ignore")


def counts(entries: Sequence[Mapping], *, paper: str) -> str:
    """One line for a paper, such as "BkdAttr: 11 claims; 1 holds, 7 fail, 3 are undecided"; no word for none."""
    found = Counter(row["verdict"] for row in entries if row["paper"] == paper)
    words = {"holds": ("holds", "hold"), "fails": ("fails", "fail"), "undecided": ("is undecided", "are undecided")}
    each = ", ".join(f"{found[one]} {words[one][found[one] != 1]}" for one in VERDICTS if found[one])
    return f"{paper}: {sum(found.values())} claims; {each}"


def span(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Lowest to highest value, for a reason."""
    values = [number["value"] for number in numbers.values()]
    return f"{min(values):.2f} to {max(values):.2f}"


def over_seeds(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Mean of each attack of several seeds with the 95 % interval over seeds (Student's t), for a reason."""
    said = []
    for attack, found in by_attack(numbers).items():
        if len(found) > 1:
            mean = over_splits(np.array([number["value"] for number in found]), ratio=0)
            interval = "" if mean["low"] is None else f" [{mean['low']:.2f}, {mean['high']:.2f}]"
            said.append(f"{attack} {mean['value']:.2f}{interval}")
    return f"Over seeds: {', '.join(said)}." if said else ""


def by_attack(found: Mapping[str, T]) -> dict[str, list[T]]:
    """Attack -> what was found of its organisms, one for each seed."""
    attacks: dict[str, list[T]] = {}
    for name, one in found.items():
        attacks.setdefault(SEED.sub("", name), []).append(one)
    return attacks


def who(passed: Mapping[str, bool | None]) -> str:
    """Which organisms meet one condition of a criterion, for a reason: "met by a, b; undecided for c"."""
    words = {True: "met by", False: "not met by", None: "undecided for"}
    groups = [(word, [name for name in passed if passed[name] is outcome]) for outcome, word in words.items()]
    return "; ".join(f"{word} {', '.join(names)}" for word, names in groups if names)
