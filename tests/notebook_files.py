"""Notebook files written by hand for tests."""

import nbformat


def write(path, *cells, parameters="a = 1", tags=("parameters",), kernel="python3"):
    """A small notebook: a parameters cell for every tag, then code cells."""
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    book.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": [tag]}) for tag in tags]
    book.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    for i, cell in enumerate(book.cells):
        cell["id"] = f"cell-{i}"
    nbformat.write(book, path)
    return path
