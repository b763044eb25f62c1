"""The floors of docs/design.md: a file imports only from lower floors, and files of one floor in no circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "functorch_gen"

# What each floor holds, by module or folder. Floor 0 is a ladder: each file may import those before it.
FLOORS: list[list[str]] = [
    ["typing"],
    ["check"],
    ["structure"],
    ["tree"],
    ["random"],
    ["leaves"],
    ["flat"],
    ["paths"],
    ["gradient_transformation"],
    ["precision"],
    ["transforms", "debug", "config", "numerics", "schedules"],
    ["nn", "optim", "ema", "losses", "ode", "distributions"],
    ["models", "bijectors", "noise", "step"],
    [
        "gan",
        "vae",
        "diffusion",
        "flow_matching",
        "flows",
        "score",
        "lm",
        "exact",
        "metrics",
        "per_example",
        "curvature",
    ],
    ["data", "train", "plot", "export", "interop"],
    [""],  # the package's own __init__, which re-exports
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def module_name(path: Path, root: Path) -> str:
    """``functorch_gen/nn/linear.py`` is ``functorch_gen.nn.linear``; an ``__init__`` is its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root: Path) -> dict[str, ast.Module]:
    files = sorted((root / PACKAGE).rglob("*.py"))
    return {module_name(path, root): ast.parse(path.read_text(), str(path)) for path in files}


def imports(
    tree: ast.Module, name: str, modules: dict[str, ast.Module], packages: set[str]
) -> Iterator[tuple[str, str]]:
    """Every (module, name) that is imported anywhere in a file, functions included; the name is empty for a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            above = parts[: len(parts) - node.level + (name in packages)] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield (inner, "") if inner in modules else (source, alias.name)


def floor_of(module: str) -> int | None:
    return FLOOR_OF.get(module.removeprefix(PACKAGE).removeprefix(".").split(".")[0])


def broken_rules(root: Path) -> list[str]:
    """One line for each import that breaks a rule."""
    modules = read_modules(root)
    packages = {name for name in modules if any(other.startswith(f"{name}.") for other in modules)}
    broken: list[str] = []
    graph: dict[str, list[str]] = {}
    for name, tree in modules.items():
        graph[name] = []
        if floor_of(name) is None:
            broken.append(f"{name}: stands on no floor of tests/test_floors.py")
            continue
        for source, member in imports(tree, name, modules, packages):
            if source.split(".")[0] == "optree" and name != f"{PACKAGE}.tree":
                broken.append(f"{name}: imports optree; only {PACKAGE}.tree may")
            if source.split(".")[0] != PACKAGE:
                continue
            target = floor_of(source)
            if member.startswith("_") or any(part.startswith("_") for part in source.split(".")):
                broken.append(f"{name}: imports the private name {source}.{member}".rstrip("."))
            if target is None or target > (floor_of(name) or 0):
                broken.append(f"{name}: climbs to {source}")
            elif source != name:
                graph[name].append(source)
        broken += private_accesses(tree, name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        broken.append(f"import in a circle: {' -> '.join(error.args[1])}")
    return broken


def private_accesses(tree: ast.Module, name: str) -> Iterator[str]:
    """``tree._paths`` where ``tree`` was imported from the package."""
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and getattr(node.value, "id", None) in ours:
            yield f"{name}: reads the private name {ast.unparse(node)}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_in_init(path: Path) -> list[str]:
    """What an ``__init__.py`` holds besides its docstring, imports and ``__all__``."""
    found = []
    for i, node in enumerate(ast.parse(path.read_text()).body):
        docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        listing = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        if not (docstring or listing or isinstance(node, ast.Import | ast.ImportFrom)):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return found


def test_imports_stay_on_their_floors():
    assert broken_rules(ROOT) == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / PACKAGE).rglob("__init__.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_init_files_define_nothing(path):
    assert defined_in_init(path) == []


# The checker itself.


def package(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / PACKAGE / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tree": "from functorch_gen import nn\n", "nn": ""}, "functorch_gen.tree: climbs to functorch_gen.nn"),
        (
            {"check": "def f():\n    import functorch_gen.random\n", "random": ""},
            "functorch_gen.check: climbs to functorch_gen.random",
        ),
        (
            {"noise": "if TYPE_CHECKING:\n    from functorch_gen.train.fit import fit\n", "train__fit": ""},
            "functorch_gen.noise: climbs to functorch_gen.train.fit",
        ),
        ({"nn__linear": "from ..models import UNet\n"}, "functorch_gen.nn.linear: climbs to functorch_gen.models"),
        ({"ema": "import functorch_gen as fg\n"}, "functorch_gen.ema: climbs to functorch_gen"),
        ({"ema": "from functorch_gen import grad\n"}, "functorch_gen.ema: climbs to functorch_gen"),
        ({"ema": "import optree.pytree\n"}, "functorch_gen.ema: imports optree; only functorch_gen.tree may"),
        ({"surprise": ""}, "functorch_gen.surprise: stands on no floor of tests/test_floors.py"),
        (
            {"ema": "from functorch_gen.tree import _paths\n", "tree": ""},
            "functorch_gen.ema: imports the private name functorch_gen.tree._paths",
        ),
        (
            {"ema": "from functorch_gen import tree\ntree._paths\n", "tree": ""},
            "functorch_gen.ema: reads the private name tree._paths",
        ),
        (
            {"nn__a": "from functorch_gen.nn import b\n", "nn__b": "from functorch_gen.nn.a import f\n"},
            "import in a circle: functorch_gen.nn.a -> functorch_gen.nn.b -> functorch_gen.nn.a",
        ),
    ],
)
def test_checker_names_the_broken_rule(tmp_path, files, message):
    found = broken_rules(package(tmp_path, **files))
    assert message in found


def test_checker_accepts_neighbours_and_lower_floors(tmp_path):
    files = {
        "nn__a": "from functorch_gen import tree\n",
        "nn__b": "from functorch_gen.nn.a import f\n",
        "tree": "import optree\n",
    }
    assert broken_rules(package(tmp_path, **files)) == []


def test_checker_sees_a_definition_in_an_init_file(tmp_path):
    path = tmp_path / "__init__.py"
    path.write_text('"""Doc."""\n\nfrom math import pi\n\n__all__ = ["pi"]\n\n\ndef tau():\n    return 2 * pi\n')
    assert defined_in_init(path) == ["__init__.py:8: def tau():"]
