"""Configuration of Sphinx for the book. `python -m bkd_utils book` gives an empty source folder, filled here."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # the modules beside this file, and the package

import hover  # noqa: E402
import sources  # noqa: E402


def inside(package, *parts):
    """Path of a file that ships in an installed package, which is not imported."""
    return str(Path(importlib.util.find_spec(package).origin).parent.joinpath(*parts))


project = "Backdoors in language models, taken apart"
author = "the authors of the companion"
copyright = "the authors; Apache-2.0"
root_doc = "index"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
myst_enable_extensions = ["amsmath", "dollarmath", "html_image", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "toc.not_included"]

toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
    "navbar_persistent": [],
    "extra_footer": "Made from the committed notebooks and figures; nothing was run for it.",
}
html_context = {"default_mode": "auto"}
html_show_sphinx = False
html_copy_source = False
html_use_index = False
html_show_search_summary = False  # which a page opened from a disk may not fetch
# MathJax draws with paths and needs no fonts; a single file, as is plotly, which only the page that draws loads.
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}
html_static_path = [
    str(HERE / "static"),
    inside("sphinx-mathjax-offline", "static", "mathjax", "tex-svg.js"),
    inside("plotly", "package_data", "plotly.min.js"),
]
html_css_files = ["book.css"]


def setup(app):
    """Write the source folder before Sphinx looks for documents, and add what hovers once they are read."""
    app.connect("config-inited", lambda app, config: sources.write(Path(app.srcdir), config), priority=1)
    app.connect("doctree-read", hover.number_cells)
    app.connect("doctree-resolved", hover.explain_terms)
