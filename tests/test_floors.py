"""An import goes down the floors, or stays inside its folder; never up."""

import ast
from pathlib import Path

import trainguard

FLOORS = (
    ("__main__",),
    ("cli",),
    ("drill",),
    ("guard",),
    ("guard_state",),
    ("report",),
    ("purification",),
    ("screening",),
    ("results",),
    ("evidence", "training"),
    ("checkpoints", "features", "sources"),
    ("distributed", "models", "perturbation"),
    ("data",),
    ("progress", "draws", "rng", "files"),
    ("errors", "options", "versions"),
)
UP = {("results", "report"), ("purification", "report")}  # a result draws its own page: `result.report(path)`


def imports():
    root = Path(trainguard.__file__).parent
    for path in root.rglob("*.py"):
        place = path.relative_to(root).parts[0].removesuffix(".py")
        if place in ("__init__", "integrations"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "trainguard":
                names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                yield from ((place, name, path) for name in names if name != place)


def test_imports_go_down_the_floors():
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    seen = [edge for edge in imports() if edge[1] in floor]
    assert len(seen) > 100
    up = {(here, there, path.name) for here, there, path in seen if floor[here] >= floor[there]}
    assert {edge for edge in up if edge[:2] not in UP} == set()
    assert {edge[0] for edge in imports()} <= floor.keys()
