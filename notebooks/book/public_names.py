"""The page of the public names, read from their source: signature, docstring and examples; nothing is imported."""

import ast
import re

from bkd_utils.common.files import PACKAGE

FOLDERS = ("models", "organisms", "backdoor_attribution", "attention_alignment")


def page() -> str:
    """A section for each method folder with its docstring and its names."""
    text = "# Public names\n\nWhat the four method folders list, for notebooks to import. Tests run all examples.\n"
    for folder in FOLDERS:
        tree = _tree(folder, "__init__")
        text += f"\n## `bkd_utils.{folder}`\n\n{_markdown(ast.get_docstring(tree))}\n"
        for name, module in sorted(public(folder).items()):
            text += f"\n{_entry(folder, name, module)}"
    return text


def public(folder: str) -> dict[str, str]:
    """Name -> the module that defines it, of all names that a method folder lists."""
    tree = _tree(folder, "__init__")
    imported = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    of = {alias.name: node.module.split(".")[-1] for node in imported for alias in node.names}
    lists = (node.value for node in tree.body if isinstance(node, ast.Assign | ast.AugAssign))
    names = [name for value in lists if isinstance(value, ast.List) for name in ast.literal_eval(value)]
    return {name: of[name] for name in names}


def _tree(folder: str, module: str) -> ast.Module:
    return ast.parse((PACKAGE / folder / f"{module}.py").read_text(encoding="utf-8"))


def _entry(folder: str, name: str, module: str) -> str:
    """A directive of Sphinx for one name, with its docstring; that of the module for a table of constants."""
    tree = _tree(folder, module)
    node = next((one for one in tree.body if getattr(one, "name", None) == name), None)
    full = f"bkd_utils.{folder}.{name}"
    if node is None:
        return _directive("data", full, ast.get_docstring(tree))
    if isinstance(node, ast.FunctionDef):
        return _directive("function", f"{full}{_signature(node)}", ast.get_docstring(node))
    fields = [_field(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")]
    told = "".join(f"\n\n- `{one.name}{_signature(one)}`: {_first(one)}" for one in methods if ast.get_docstring(one))
    return _directive("class", f"{full}({', '.join(fields)})", f"{ast.get_docstring(node) or ''}{told}")


def _signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def _field(node: ast.AnnAssign) -> str:
    value = f" = {ast.unparse(node.value)}" if node.value is not None else ""
    return f"{node.target.id}: {ast.unparse(node.annotation)}{value}"


def _first(node: ast.FunctionDef) -> str:
    return re.split(r"(?<=\.)\s|\n\n", ast.get_docstring(node))[0].replace("\n", " ")


def _directive(kind: str, signature: str, text: str) -> str:
    return f"`````{{py:{kind}}} {' '.join(signature.split())}\n\n{_markdown(text)}\n`````\n"


def _markdown(text: str) -> str:
    """A docstring as Markdown: its examples in blocks of code, and no dollar that would begin a formula."""
    parts = []
    for part in text.split("\n\n"):
        is_example = part.lstrip().startswith(">>>")
        parts.append(f"```pycon\n{part}\n```" if is_example else part.replace("$", r"\$"))
    return "\n\n".join(parts)
