"""What tests of pictures share: intervals made by hand, legends and bands read back, and what every picture needs."""

import nbformat
from matplotlib.figure import Figure
from matplotlib.text import Text

from bkd_utils.common.files import NOTEBOOKS


def share(value, n=50):
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bands(axes):
    return [(path.vertices[:, 1].min(), path.vertices[:, 1].max()) for c in axes.collections for path in c.get_paths()]


def public(module):
    """The functions of a module that draw a figure."""
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return {name for name in own if getattr(vars(module)[name], "__annotations__", {}).get("return") is Figure}


def written(figure):
    """All texts of a figure, one a line."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def check_labelled(figure):
    """Every panel has data, and something says what the axes are."""
    assert figure.axes
    assert all(axes.has_data() for axes in figure.axes)
    titles = [getattr(figure, name, None) for name in ("_supxlabel", "_supylabel")]
    labels = [axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes]
    assert any(labels) or any(title and title.get_text() for title in titles)


def column_titles(figure):
    titles = [axes.get_title() or axes.get_title(loc="left") for axes in figure.axes]
    return [title for title in titles if title]


def check_all(module, plots):
    """`plots` has every function of the module that draws; every figure is labelled and says on how many it rests."""
    assert public(module) == set(plots)
    for name, draw in plots.items():
        figure = draw()
        check_labelled(figure)
        assert "n = " in written(figure), name


def saved_by_a_notebook(figure):
    """Does the notebook of a figure's number save it under that name, or under one for each kind of organisms?"""
    (notebook,) = NOTEBOOKS.glob(f"{figure[:2]}_*.ipynb")
    cells = nbformat.read(notebook, as_version=4).cells
    names = [f'"{name}"' for name in (figure, figure.replace("_plain", "_{kind}"))]
    saving = [cell.source for cell in cells if cell.cell_type == "code" and "style.save(" in cell.source]
    return any(name in source for source in saving for name in names)
