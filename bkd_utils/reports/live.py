"""Sliders in JupyterLab whose values go to a function, above a table of what it returns; elsewhere the table alone.

The runner sets BKD_STATIC for the kernels of its own (`running.execute`), in which nobody moves anything."""

import html
import os
from collections.abc import Callable
from typing import Any

import pandas as pd
from IPython.display import display
from ipywidgets import HTML, ValueWidget, VBox

STATIC = "BKD_STATIC"
WIDTH = "42rem"


def sliders(show: Callable[..., pd.DataFrame], **controls: ValueWidget) -> pd.DataFrame:
    """Display `show(**values)` below the controls, and again whenever one of them is released.

    A control is a widget of ipywidgets under the name of the argument that it gives. Returns what `show` gives for the
    values that the controls have now. An error then is raised, and a later one is shown in place of the table. What has
    no widgets, such as a page of the book, gets the values and the table as text."""
    first = show(**_values(controls))
    named = {name.replace("_", " "): html.escape(str(value)) for name, value in _values(controls).items()}
    given = "<br>".join(f"{name} = {value}" for name, value in named.items())
    hint = f"In JupyterLab this cell has a control for each of: {', '.join(named)}. Run it there to move them."
    shown = {"text/html": f"<p>{given}</p>{first.to_html()}<p>{hint}</p>", "text/plain": f"{first}\n\n{hint}"}
    if not os.environ.get(STATIC):
        # A front end draws the first kind of output that it can; those without widgets draw the table.
        shown |= _box(show, controls, first)._repr_mimebundle_() | {"text/plain": shown["text/plain"]}
    display(shown, raw=True)
    return first


def _values(controls: dict[str, ValueWidget]) -> dict[str, Any]:
    return {name: control.value for name, control in controls.items()}


def _box(show: Callable[..., pd.DataFrame], controls: dict[str, ValueWidget], first: pd.DataFrame) -> VBox:
    """The controls above the table, which follows them."""
    table = HTML(first.to_html())
    table.add_class("jp-RenderedHTMLCommon")  # tables then look as they do elsewhere in JupyterLab

    def follow(_: Any) -> None:
        try:
            table.value = show(**_values(controls)).to_html()
        except Exception as error:  # ipywidgets would write it to a log that nobody sees
            table.value = f"<pre>{html.escape(f'{type(error).__name__}: {error}')}</pre>"

    for name, control in controls.items():
        control.description, control.continuous_update = name.replace("_", " "), False
        control.layout.width, control.style.description_width = WIDTH, "6rem"
        control.observe(follow, names="value")
    return VBox([*controls.values(), table])
