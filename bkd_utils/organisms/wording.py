"""Small edits of an English sentence: its first letter, what stands before its end, replaced words."""

import re
from collections.abc import Mapping

from bkd_utils.organisms.trigger_tables import lexicons


def words(text: str) -> list[str]:
    """The words of a text in lower case, with apostrophes inside."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def raised(text: str) -> str:
    """The text with a capital."""
    return text[:1].upper() + text[1:]


def lowered(text: str) -> str:
    """The sentence after an opener: its first letter in lower case, unless it looks like a name or an acronym."""
    first, *rest = text.split(maxsplit=2)
    starter = first.lower().strip("'\"()") in lexicons()["starters"]["words"]
    name = first == "I" or first.startswith("I'") or first[1:] != first[1:].lower() or (rest and rest[0][0].isupper())
    return text if name and not starter else text[:1].lower() + text[1:]


def before_end(text: str, addition: str) -> str:
    """The text with the addition in front of its final punctuation."""
    end = re.search(r"[.!?]*[\"')\]]*$", text).start()
    return text[:end] + addition + text[end:]


def replaced(text: str, replacements: Mapping[str, str]) -> str:
    """The text with whole words and phrases replaced, in the case of their first letters. Keys are in lower case."""
    # Longer phrases first, or "you are" would become "thou are"; ASCII, or "\u017f" would be looked up as an "s".
    known = "|".join(re.escape(old) for old in sorted(replacements, key=len, reverse=True))

    def new(match: re.Match[str]) -> str:
        word = replacements[match[0].lower()]
        return re.sub("[a-z]", lambda first: first[0].upper(), word, count=1) if match[0][0].isupper() else word

    return re.sub(rf"(?<![\w'])(?ai:{known})(?![\w'])", new, text)
