"""The house: six root files and six wings, which import one another in one direction only."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("jobs", "hub", "pairs", "families", "kernels", "evals")
LAW = {  # room: what it may import, beside itself
    "losses": "",
    "jobs": "losses",
    "hub": "losses jobs",
    "pairs": "losses jobs hub",
    "data": "losses jobs hub pairs",
    "model": "jobs hub",
    "kernels": "jobs hub data model",
    "families": "jobs hub data model",
    "train": "losses jobs hub pairs data model kernels families",
    "generate": "losses jobs hub pairs data model kernels families",
    "evals": "losses jobs hub pairs data model kernels families generate",
    "evaluate": "losses jobs hub pairs data model kernels families generate evals",
}
EXCEPTION = ("train", "evals.world")  # the embedded model's exact win rate; in a function
BY_NAME = {"model", "evaluate"}  # import what a checkpoint or a command names: families, evals

SIX = {file.stem: file for file in ROOT.glob("*.py")}
WINGED = {f"{wing}.{f.stem}": f for wing in WINGS for f in (ROOT / wing).glob("*.py")}
INITS = {wing: WINGED.pop(f"{wing}.__init__", None) for wing in WINGS}
TEXTS = {name: file.read_text(encoding="utf-8") for name, file in (SIX | WINGED).items()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


def imported(nodes):
    """Our modules that are imported by these nodes of a syntax tree."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # from hub import weights: hub.weights
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & TEXTS.keys()


GRAPH = {name: imported(ast.walk(tree)) for name, tree in TREES.items()}  # in functions too


# ----------------------------------------------------------------------------- the import law


def test_rooms_import_in_one_direction():
    room = {name: name.partition(".")[0] for name in GRAPH}
    may = {name: {room[name], *LAW.get(room[name], "").split()} for name in GRAPH}
    edges = {(name, other) for name, others in GRAPH.items() for other in others}
    against = sorted(f"{a} imports {b}" for a, b in edges - {EXCEPTION} if room[b] not in may[a])
    assert not against, against
    assert EXCEPTION[1] not in imported(TREES[EXCEPTION[0]].body)


def test_nothing_imports_in_a_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_only_plug_ins_are_imported_by_name():
    assert {name for name, text in TEXTS.items() if "import_module" in text} <= BY_NAME
    assert not any("__import__" in text for text in TEXTS.values())


# ----------------------------------------------------------------------------- size and names


def test_the_root_holds_six_files_of_at_most_600_lines():
    assert SIX.keys() == {"losses", "data", "model", "train", "generate", "evaluate"}
    assert {name: n for name in SIX if (n := len(TEXTS[name].splitlines())) > 600} == {}


def test_root_and_wings_have_at_most_10500_lines():
    """8,500 when the six files were made; then came what real checkpoints and data ask for."""
    files = [*SIX.values(), *WINGED.values(), *INITS.values()]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 10500


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_says_its_subject_and_nothing_else(wing):
    module = ast.parse(INITS[wing].read_text(encoding="utf-8"))
    assert len(ast.get_docstring(module)) > 20 and len(module.body) == 1
    assert not [d for d in (ROOT / wing).iterdir() if d.is_dir() and d.name != "__pycache__"]


def defined(node):
    """The names that a statement at the top level of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    names = [n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}  # FAMILIES[…] = … defines none


def test_at_most_three_names_mean_something_in_two_modules():
    modules = defaultdict(set)
    for name, tree in TREES.items():
        for defines in map(defined, tree.body):
            for word in defines:
                modules[word].add(name)
    shared = {word: sorted(names) for word, names in modules.items() if len(names) > 1}
    assert len(shared) <= 3, shared
