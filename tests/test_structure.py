"""The house: what each folder may import, and how long a chain of imports may get."""

import ast
import functools
from pathlib import Path

import pytest

import parallel_keras as pk

PACKAGE = Path(pk.__file__).parent
# From the roof to the ground. A module imports modules of its own floor or of lower ones.
FLOORS = (
    ("__main__", "commands", "measuring"),
    ("", "_public", "verifying", "explaining", "multi_gpu", "files"),
    ("model",),
    ("keras_api",),
    ("steps",),
    ("towers",),
    ("homes",),
    ("graphs",),
    ("workers",),
    ("shard", "merge", "parts", "slices", "nests", "devices", "hardware", "_compat", "_version"),
)
LONGEST_CHAIN = 9


def modules() -> dict[str, Path]:
    """Every module by its name inside of the package; the package itself is the empty name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(path: Path, *, types: bool) -> set[str]:
    """The modules of the package that a file imports, also inside of functions.

    Args:
        path: The file.
        types: Whether those count that are only there for annotations.
    """
    tree = ast.parse(path.read_text())
    if not types:
        tree.body = [node for node in tree.body if not is_for_types_only(node)]
    known, found = modules(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "parallel_keras":
                inner = name.partition(".")[2]
                found.add(inner if inner in known else inner.rpartition(".")[0])
    return found


def floor_of(module: str) -> int:
    room = module.split(".", maxsplit=1)[0]
    (floor,) = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    return floor


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downwards(module: str) -> None:
    for other in imported(modules()[module], types=True):
        assert floor_of(other) >= floor_of(module), f"{module} imports {other}, a floor above it"


def test_no_circles_and_no_long_chains() -> None:
    graph = {name: imported(path, types=False) for name, path in modules().items()}

    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        # The package itself only hands on the public names: whoever uses them starts anew there.
        below = [chain(other) for other in graph[module] if other not in (module, "", "_public")]
        return (module, *max(below, key=len, default=()))

    # A circle would never come back from here.
    longest = max((chain(module) for module in graph if module not in ("", "_public")), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_every_folder_says_what_is_in_it() -> None:
    for folder in {path.parent for path in modules().values()}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
