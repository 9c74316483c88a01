"""House rules that a machine can check: sizes, layers, and who may import what."""

import ast
import functools
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted((ROOT / "launcher").rglob("*.py"))
PLUGINS = sorted((ROOT / "hydra_plugins").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_BODY_LINES = 50
MAX_NESTING = 3

# A module imports from its own room and from rooms further left.
LAYERS = (
    ("launcher", "errors", "slurm_config"),
    (
        *("config", "early_stop", "machine_limits", "regular_file", "secrets", "small_file"),
        "standard_streams",
    ),
    ("logs", "run_lock", "run_state"),
    ("limits",),
    ("checks",),
    ("slurm",),
    ("models",),
    ("data",),
    ("autopar",),
    ("runtime",),
    ("resume",),
    ("inputs", "outputs"),
    ("host_process",),
    ("on_hosts",),
    ("main",),
    ("status",),
    ("cli",),
    ("bench",),
    ("doctor",),
    ("__main__",),
)

# The same inside the two large rooms: a module imports from its own small room and those further left.
ROOMS = {
    "autopar": (
        *(
            "text",
            "graphs",
            "clusters",
            "sharding",
            "solver",
            "whole_graph",
            "intra_op",
            "programs",
        ),
        *("plans", "realized", "predictions", "inter_op", "make_plan", "answers", "pages"),
    ),
    "runtime": (
        *(
            "allocator",
            "devices",
            "compiled",
            "records",
            "checkpoints",
            "traces",
            "steps",
            "profiling",
        ),
        *("training", "hosts", "memory_audit", "plan_audit"),
    ),
}

# Packages that only some modules may know.
CONFIG_PACKAGES = ("hydra", "omegaconf")
CONFIG_ROOMS = ("config", "main", "cli")
IN_ONE_MODULE = ("wandb", "ray", "torch", "orbax", "submitit")

# Imported where they are used: heavy, or not needed by every run.
LAZY = ("wandb", "ray", "torch", "orbax", "submitit", "sklearn", "PIL", "tokenizers", "pydoc_data")

RELATIVE = "<relative>"

NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def room(path: pathlib.Path) -> str:
    """The first name below the package: `launcher/autopar/plans/plan.py` is of autopar."""
    parts = path.relative_to(ROOT / "launcher").with_suffix("").parts
    return "launcher" if parts[0] == "__init__" else parts[0]


def imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module="launcher", names=names):
            return [f"launcher.{name.name}" for name in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        case ast.ImportFrom():
            return [RELATIVE]
    return []


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def body_lines(function: ast.FunctionDef) -> int:
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # the docstring
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def nesting(node: ast.AST) -> int:
    """How deep blocks stand in one another; an `elif` is beside its `if`, not in it."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        step = int(isinstance(child, NESTING) and not is_elif)
        deepest = max(deepest, step + nesting(child))
    return deepest


def rank(name: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if name in rooms)


def where(path: pathlib.Path, what: object) -> str:
    return f"{path.relative_to(ROOT)}: {what}"


def imports() -> Iterator[tuple[pathlib.Path, str]]:
    for path in MODULES:
        for node in ast.walk(parse(path)):
            yield from ((path, name) for name in imported(node))


def test_files_open_with_a_docstring():
    assert not [
        str(path) for path in MODULES + PLUGINS + TESTS if not ast.get_docstring(parse(path))
    ]


def test_files_stay_small():
    lines = {path: path.read_text().count("\n") for path in MODULES + PLUGINS + TESTS}
    assert not [where(path, count) for path, count in lines.items() if count > MAX_FILE_LINES]


def test_functions_stay_short_and_flat():
    assert not [
        where(path, f"{function.name}: {body_lines(function)} lines, {nesting(function)} deep")
        for path in MODULES
        for function in functions(parse(path))
        if body_lines(function) > MAX_BODY_LINES or nesting(function) > MAX_NESTING
    ]


def test_no_reflection_no_global_state_and_no_print():
    assert not [
        where(path, node.lineno)
        for path in MODULES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Global)
        or (isinstance(node, ast.Name) and node.id in ("hasattr", "getattr", "print"))
    ]


def test_imports_go_one_way():
    def is_allowed(ours: str, name: str) -> bool:
        if name == RELATIVE:
            return False
        theirs = name.split(".")[1]
        lower = rank("launcher" if theirs == "__version__" else theirs) < rank(ours)
        return theirs == ours or lower or (ours, theirs) == ("cli", "main")

    assert not [
        where(path, name)
        for path, name in imports()
        if name.startswith(("launcher.", RELATIVE)) and not is_allowed(room(path), name)
    ]


@pytest.mark.parametrize("large", ROOMS)
def test_imports_between_small_rooms_go_one_way(large):
    def small(name: str) -> int:
        return ROOMS[large].index(name.split(".")[2])

    folder = ROOT / "launcher" / large
    assert not [
        where(path, name)
        for path, name in imports()
        if name.startswith(f"launcher.{large}.")
        and path.is_relative_to(folder)
        and (ours := path.relative_to(folder).with_suffix("").parts[0]) in ROOMS[large]
        and small(name) > ROOMS[large].index(ours)
    ]


def test_every_small_room_has_its_place():
    inside = {path.relative_to(ROOT / "launcher").with_suffix("").parts for path in MODULES}
    entries = {"__init__", "solve"}  # the room's face, and a command
    for large, rooms in ROOMS.items():
        assert {parts[1] for parts in inside if parts[0] == large} - entries == set(rooms)


def test_only_the_edge_knows_hydra():
    assert not [
        where(path, name)
        for path, name in imports()
        if name.partition(".")[0] in CONFIG_PACKAGES and room(path) not in CONFIG_ROOMS
    ]


def test_imports_inside_functions_are_of_heavy_packages():
    inside = [
        (path, name)
        for path in MODULES
        for function in functions(parse(path))
        for node in ast.walk(function)
        for name in imported(node)
    ]
    # Those of our own: they bring JAX, which help and config errors do not wait for.
    cli = ROOT / "launcher" / "cli"
    ours = {(cli / "running.py", "launcher.main"), (cli / "entry.py", "launcher.status.report")}
    assert not [
        where(path, name)
        for path, name in inside
        if name.partition(".")[0] not in LAZY and (path, name) not in ours
    ]


@pytest.mark.parametrize("package", IN_ONE_MODULE)
def test_services_are_imported_in_one_module(package):
    # The doctor tries a service by itself, in a process that may hang or crash.
    knows = {path for path, name in imports() if name.partition(".")[0] == package}
    assert len({path for path in knows if room(path) != "doctor"}) <= 1


def test_no_grab_bags():
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_every_room_is_in_a_layer():
    assert {room(path) for path in MODULES} <= {name for rooms in LAYERS for name in rooms}


def test_nesting_counts_blocks_and_not_elif():
    tree = ast.parse("if a:\n  for b in c:\n    d\nelif e:\n  f\nelif g:\n  with h:\n    i\n")
    assert nesting(tree) == 2
