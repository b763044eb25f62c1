"""``make docs``: writes docs/api, a page for each public module, from the docstrings and the source of the package.

Signatures are read from the source, not from objects: defaults stay as they are written, on every version of Python.
"""

import ast
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import functorch_gen

DOCS = Path(__file__).parents[1] / "docs" / "api"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
INTERNAL = {"check", "transforms"}  # the transforms stand at the top


def pages() -> dict[str, str]:
    """The text of each page by file name."""
    modules = [getattr(functorch_gen, name) for name in functorch_gen.__all__ if name not in INTERNAL]
    modules = [functorch_gen, *[x for x in modules if isinstance(x, types.ModuleType)]]
    inner = [x for module in modules[1:] for x in public(module).values() if isinstance(x, types.ModuleType)]
    modules = sorted([*modules, *inner], key=lambda module: module.__name__)
    found = {f"{module.__name__.removeprefix('functorch_gen.')}.md": module_page(module) for module in modules}
    return {"index.md": index(modules), **found}


def index(modules: list[types.ModuleType]) -> str:
    rows = [
        f"| [{name}]({name.removeprefix('functorch_gen.')}.md) | {first_line(module)} |"
        for module, name in named(modules)
    ]
    intro = "One page for each module, made from its docstrings by `make docs`. Their examples are run by the tests."
    return "\n".join(["# API", "", intro, "", "| Module | |", "|---|---|", *rows]) + "\n"


def named(modules: list[types.ModuleType]) -> Iterator[tuple[types.ModuleType, str]]:
    return ((module, module.__name__) for module in modules)


def public(module: types.ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__}


def module_page(module: types.ModuleType) -> str:
    members = {
        name: x
        for name, x in public(module).items()
        if not isinstance(x, types.ModuleType) or module is not functorch_gen
    }
    table = [f"| [`{name}`](#{name.lower()}) | {first_line(x, module, name)} |" for name, x in members.items()]
    sections = [section(name, x, module) for name, x in members.items()]
    head = [f"# {module.__name__}", "", prose(inspect.getdoc(module) or ""), "", "| Name | |", "|---|---|", *table, ""]
    return "\n".join([*head, *sections]).rstrip("\n") + "\n"


def section(name: str, x: Any, module: types.ModuleType) -> str:
    lines = [f"## {name}", ""]
    if isinstance(x, types.ModuleType):
        return "\n".join([*lines, f"A module: [{x.__name__}]({x.__name__.removeprefix('functorch_gen.')}.md).", ""])
    if not (inspect.isclass(x) or inspect.isfunction(x)):
        return "\n".join([*lines, prose(described(name, module)), ""])
    lines += ["```text", f"{name}{signature(x)}", "```", "", prose(inspect.getdoc(x) or ""), ""]
    for method, f in methods(x):
        lines += [f"**`{method}{signature(f)}`**", "", prose(inspect.getdoc(f) or ""), ""]
    return "\n".join(lines)


def first_line(x: Any, module: types.ModuleType | None = None, name: str = "") -> str:
    documented = inspect.isclass(x) or inspect.isroutine(x) or isinstance(x, types.ModuleType)
    text = inspect.getdoc(x) or "" if documented or module is None else described(name, module)
    return roles(text.split("\n\n")[0].replace("\n", " ").rstrip(":")).replace("|", "\\|")


def described(name: str, module: types.ModuleType) -> str:
    """The string after the definition of a type alias, a constant or an instance, where the module got it from."""
    body = ast.parse(inspect.getsource(module)).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return described(name, importlib.import_module(node.module))
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if name in [ast.unparse(target) for target in targets] and isinstance(after, ast.Expr):
            return inspect.cleandoc(ast.literal_eval(after.value))
    raise LookupError(f"{module.__name__}: no string after the definition of {name}")


# Signatures.


def definition(x: Any) -> Any:
    """The syntax tree of a class or function."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(x)))).body[0]


def signature(x: Any) -> str:
    if not inspect.isclass(x):
        node = definition(x)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"({parameters(node.args)}){returns}"
    if "__init__" in vars(x) and inspect.isfunction(x.__init__) and not is_generated(x.__init__):
        return f"({parameters(definition(x.__init__).args)})"
    return f"({', '.join(fields(x))})"


def is_generated(f: Any) -> bool:
    """Whether a dataclass made it."""
    return f.__code__.co_filename.startswith("<")


def parameters(args: ast.arguments) -> str:
    """The arguments without ``self``."""
    for group in (args.posonlyargs, args.args):
        if group and group[0].arg in ("self", "cls"):
            del group[0]
    return ast.unparse(args)


def fields(x: type) -> list[str]:
    """The fields of a dataclass or a named tuple, those of its bases first, as arguments."""
    positional: dict[str, str] = {}
    keywords: dict[str, str] = {}
    for base in reversed(x.__mro__):
        if base.__module__.startswith("functorch_gen"):
            for node in definition(base).body:
                if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                    entry, is_keyword = field(node)
                    (keywords if is_keyword else positional)[ast.unparse(node.target)] = entry
    return [*positional.values(), *(["*"] if keywords else []), *keywords.values()]


def field(node: ast.AnnAssign) -> tuple[str, bool]:
    default, is_keyword = node.value, False
    if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
        options = {word.arg: word.value for word in default.keywords}
        is_keyword = "kw_only" in options
        default = options.get("default", options.get("default_factory"))
    text = ast.unparse(node.target) + ": " + ast.unparse(node.annotation)
    return text + (f" = {ast.unparse(default)}" if default else ""), is_keyword


def methods(x: Any) -> Iterator[tuple[str, Any]]:
    """Public methods of a class, its bases' too, and the call of a layer."""
    if inspect.isclass(x):
        for name, f in inspect.getmembers(x, inspect.isfunction):
            ours = f.__module__.startswith("functorch_gen") and not is_generated(f)
            if ours and f.__doc__ and (not name.startswith("_") or name == "__call__"):
                yield name, f


# Docstrings.

SECTION = re.compile(r"^(Args|Raises|Returns|Source|Yields):(.*)$")


def prose(text: str) -> str:
    """A docstring as Markdown: examples as code, sections as bold words, their entries as lists."""
    out: list[str] = []
    inside = ""
    for line in text.splitlines():
        if line.startswith(">>>") and inside != "example":
            out += ["```pycon"]
            inside = "example"
        elif inside == "example" and not line.strip():
            out += ["```"]
            inside = ""
        match = SECTION.match(line) if inside != "example" else None
        if match:
            inside = match[1]
            out += [*([""] if out and out[-1] else []), f"**{match[1]}:**{match[2]}", ""]
        elif inside in ("Args", "Raises") and re.match(r"^ {4}\S", line):
            out.append("- " + re.sub(r"^ {4}([\w, *]+):", r"`\1`:", line).strip())
        elif inside == "example" or not line.startswith("    "):
            out.append(line if inside == "example" else roles(line))
        else:
            out.append(roles(line if inside == "" else "  " + line.strip()))
    return "\n".join([*out, "```"] if inside == "example" else out)


def roles(line: str) -> str:
    """``code`` and :func:`names` as Markdown writes them."""
    line = re.sub(r":\w+:`~?(?:functorch_gen\.)?([^`]+)`", r"`\1`", line)
    return re.sub(r"``([^`]+)``", r"`\1`", line)


def main() -> None:
    """Writes the pages and removes those of modules that are gone."""
    DOCS.mkdir(exist_ok=True)
    texts = pages()
    for path in DOCS.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
