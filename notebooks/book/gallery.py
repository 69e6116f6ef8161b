"""The page of all figures, from the JSON beside each and the notebook that saves it."""

from itertools import groupby

from cards import Card

CARD = """:::{{container}} card-of-figure
```{{raw}} html
<a id="{id}" href="figures/{id}.png"><img src="figures/{id}.small.png" alt="{title}" loading="lazy"></a>
```

**{title}**

{finding}

<p class="of-figure">{sizes}{claims}<a href="notebooks/{notebook}.html#cell-{cell}">where it is made</a> ·
<a href="figures/{id}.json">numbers</a>{play}</p>
:::
"""
# Figures whose numbers are also on the page to play with -> the place there.
PLAYED = {"03_head_maps": "heads", "04_maps": "vector", "05_readings": "guard", "06_guards": "guard"}
PLAYED |= {"06_frontier": "frontier", "06_encoder_frontier": "frontier", "06_home_ground": "frontier"}
PLAYED |= {"06_searched": "frontier"}


def page(figures: list[Card]) -> str:
    """All figures as cards, a section for each notebook."""
    text = (
        f"# Figures\n\nAll {len(figures)} figures, in the order of the notebooks. A picture opens in full size, "
        "*numbers* is the JSON that it is drawn from, and *n* is how many prompts, rows or models stand behind one "
        "number. The sentence is the first of what the notebook says about it.\n"
    )
    for notebook, some in groupby(figures, key=lambda card: card.notebook):
        number, _, name = notebook.partition("_")
        text += f"\n## {number} {name.replace('_', ' ').capitalize()}\n\n::::{{container}} figures\n"
        text += "\n".join(_card(card) for card in some) + "::::\n"
    return text


def _card(card: Card) -> str:
    sizes = f"n = {' to '.join(map(str, card.sizes))} · " if card.sizes else ""
    links = ", ".join(f'<a href="scorecard.html#{claim}">{claim}</a>' for claim in card.claims)
    if len(card.claims) > 6:
        links = f'<a href="scorecard.html">{len(card.claims)}</a>'
    claims = f"claims: {links} · " if card.claims else ""
    play = f' · <a href="play.html#{PLAYED[card.id]}">play with it</a>' if card.id in PLAYED else ""
    given = vars(card) | {"sizes": sizes, "claims": claims, "play": play}
    return CARD.format(**given)
