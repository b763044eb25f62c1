"""What the package offers and how it is written: docstrings, one place for a name, no hidden randomness, length."""

import ast
import importlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "functorch_gen").rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]

Definition = ast.FunctionDef | ast.ClassDef

# Folders and files that users do not import from: their names are internal, or re-exported at the top.
INTERNAL = {
    "check", "flat", "gradient_transformation", "leaves", "paths", "precision", "schedules", "structure", "transforms"
}  # fmt: skip

# Public definitions without a doctest, and why. Protocols, exceptions and records (NamedTuples) need none: the
# functions that take or return them show them.
NO_DOCTEST = {
    "Jitted": "what jit returns; shown there",
    "Lowered": "what jit(f).lower returns; shown there",
    "ShapeDtypeStruct": "what eval_shape returns; shown there",
}

# Files over 420 lines, and why.
LONG_FILES = {"functorch_gen/tree.py": "fifty short functions of one kind, looked up by name"}

# Draws from, seeds or reads a global generator, whatever it is called on.
GLOBAL_RNG = {
    "bernoulli_", "cauchy_", "exponential_", "fork_rng", "geometric_", "get_rng_state", "initial_seed",
    "kaiming_normal_", "kaiming_uniform_", "log_normal_", "manual_seed", "normal_", "orthogonal_", "rand",
    "rand_like", "randint_like", "randn", "randn_like", "random_", "randperm", "set_rng_state", "trunc_normal_",
    "uniform_", "xavier_normal_", "xavier_uniform_", "Generator", "default_rng",
}  # fmt: skip
# Names that our own samplers and layers may bear: only torch's are refused.
TORCHS_RNG = {
    "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "multinomial", "normal",
    "poisson", "randint", "seed",
}  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def public(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def definitions() -> list[Any]:
    """Every function and class that a module's ``__all__`` names."""
    return [
        pytest.param(path, node, id=f"{name(path)}:{node.name}")
        for path in MODULES
        for node in parse(path).body
        if isinstance(node, Definition) and node.name in public(parse(path))
    ]


def is_offered(path: Path, word: str) -> bool:
    """Whether users import it: it stands in a file of the package's own folder, or its folder re-exports it."""
    folder = ROOT / "functorch_gen"
    top = path.relative_to(folder).parts[0]
    return path.parent == folder or word in public(parse(folder / top / "__init__.py"))


def is_record(node: Definition) -> bool:
    bases = {ast.unparse(base) for base in node.bases} if isinstance(node, ast.ClassDef) else set()
    return bool(bases & {"NamedTuple", "Protocol", "Exception", "ValueError", "TypeError", "RuntimeError"}) or any(
        base.endswith(("Protocol", "Layer", "Error")) for base in bases
    )


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_lists_its_public_names(path):
    tree = parse(path)
    assert ast.get_docstring(tree), "no docstring"
    defined = {node.name for node in tree.body if isinstance(node, Definition) and not node.name.startswith("_")}
    assert public(tree) == sorted(set(public(tree)), key=isort_key), "__all__ is not sorted"
    assert defined <= set(public(tree)), "public by name, but not in __all__"


def isort_key(word: str) -> tuple[int, str]:
    """Constants, classes, the rest: the order of ruff's RUF022."""
    return (0 if word.isupper() else 1 if word[0].isupper() else 2), word


@pytest.mark.parametrize(("path", "node"), definitions())
def test_public_definition_has_a_docstring_with_a_doctest(path, node):
    docstring = ast.get_docstring(node) or ""
    first = docstring.split("\n")[0]
    assert first.endswith((".", ":")), f"expected a first line that is a sentence, got {first!r}"
    if is_offered(path, node.name) and not is_record(node) and node.name not in NO_DOCTEST:
        assert ">>> " in docstring, "no doctest"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_public_value_is_described(path):
    """A type alias or a constant is followed by a string that says what it is."""
    tree = parse(path)
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        for target in targets:
            word = ast.unparse(target)
            if word in public(tree) and is_offered(path, word):
                described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert described, f"{word}: no string after it"


def namespaces() -> dict[str, types.ModuleType]:
    """The modules that users import names from; the transforms stand at the top."""
    folder = ROOT / "functorch_gen"
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    modules = {
        stem: importlib.import_module(f"functorch_gen.{stem}") for stem in sorted(found - INTERNAL - {"__init__"})
    }
    return {"": importlib.import_module("functorch_gen"), **modules}


def test_every_name_has_one_public_place():
    places: dict[int, list[str]] = {}
    for space, module in namespaces().items():
        for word in module.__all__:
            value = getattr(module, word)
            if getattr(value, "__module__", "").startswith("functorch_gen"):
                places.setdefault(id(value), []).append(f"fg.{space}.{word}".replace("..", "."))
    assert [found for found in places.values() if len(found) > 1] == []


def test_top_level_holds_the_transforms_and_the_modules():
    top, transforms = importlib.import_module("functorch_gen"), importlib.import_module("functorch_gen.transforms")
    modules = set(namespaces()) - {"", "typing"}  # annotations import from functorch_gen.typing by name
    assert set(transforms.__all__) <= set(top.__all__)
    assert modules - set(top.__all__) == set(), "modules that `import functorch_gen as fg` does not offer"
    assert all(hasattr(top, word) for word in top.__all__)


# How the files are written.


def test_no_global_randomness():
    assert [f"{name(path)}:{use}" for path in FILES for use in global_randomness(parse(path))] == []


def global_randomness(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for module in modules:
            if module in ("random", "numpy.random", "torch.random", "torch.nn.init"):
                yield f"{node.lineno}: imports {module}"
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            torchs = owner in ("torch", "F") or owner.startswith("torch.")
            if (
                node.attr in GLOBAL_RNG
                or (torchs and node.attr in TORCHS_RNG)
                or owner in ("np.random", "numpy.random")
            ):
                yield f"{node.lineno}: {owner}.{node.attr}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.manual_seed(0)", ["1: torch.manual_seed"]),
        ("x + torch.randn_like(x)", ["1: torch.randn_like"]),
        ("x.clone().normal_()", ["1: x.clone().normal_"]),
        ("torch.normal(0, 1)", ["1: torch.normal"]),
        ("F.dropout(x)", ["1: F.dropout"]),
        ("import random", ["1: imports random"]),
        ("from numpy.random import default_rng", ["1: imports numpy.random"]),
        ("np.random.permutation(3)", ["1: np.random.permutation"]),
        ("from functorch_gen import random\nrandom.normal(key, (3,))\nself.dropout", []),
    ],
)
def test_global_randomness_is_recognised(code, found):
    assert list(global_randomness(ast.parse(code))) == found


def test_no_print():
    for path in FILES:
        for node in ast.walk(parse(path)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("print", "sys.stdout.write"), f"{name(path)}:{getattr(node, 'lineno', 0)} prints"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 420 or name(path) in LONG_FILES, f"{lines} lines"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            said = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - said
            assert length <= 60, f"{node.name}: {length} lines without its docstring"
