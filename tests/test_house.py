"""The order of the house: imports go one way, a class of ours has one base of ours, a file is read in one sitting."""

import ast
from configparser import ConfigParser
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "echo_trainer"

ORDER = (
    ("_version", "files", "progress", "quiet", "resources", "plots"),
    ("manifest", "method"),
    ("compat",),
    ("passes",),
    ("options",),
    ("fields",),
    ("adapter",),
    ("report",),
    ("hub",),
    ("config", "templates"),
    ("rendering",),
    ("selection",),
    ("run",),
    ("evaluation",),
    ("labelling",),
    ("trainer",),
    ("recipe",),
    ("export",),
    ("ablation", "bench", "bgrpo"),
    ("quickstart",),
    ("cli",),
)
"""Each line may import those above it; parts of one line do not import each other."""

RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part(module: str) -> str:
    return module.split(".")[0]


def dotted(path: Path) -> str:
    """Name of a module without the package's."""
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path, tree: ast.AST) -> list[tuple[int, str]]:
    """Modules of ours that a module imports, also inside functions: line, name without the package's."""
    here = path.relative_to(PACKAGE).parts[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            base = tuple(name for name in base if name)
            names = [(*base, alias.name) for alias in node.names] if len(base) == 0 else [base]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            names = [tuple(node.module.split(".")[1:]) or (node.names[0].name,)]
        elif isinstance(node, ast.Import):
            names = [tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == PACKAGE.name]
        else:
            continue
        found += [(node.lineno, ".".join(name)) for name in names if name]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_nothing_above_it(path):
    if path == PACKAGE / "__init__.py":
        return  # the public names, made lazily
    mine = RANK[part(dotted(path))]
    for line, module in imports(path, ast.parse(path.read_text())):
        theirs = RANK[part(module)]
        same = part(module) == part(dotted(path))
        assert same or theirs < mine, f"{path.relative_to(PACKAGE)}:{line} imports {module}, which lies above it"


def classes() -> dict[str, list[str]]:
    """Every class of the package with the names of its bases."""
    return {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }


def test_a_class_has_one_base_of_ours_at_most():
    ours = classes()
    for name, bases in ours.items():
        assert sum(base in ours for base in bases) <= 1, f"{name}({', '.join(bases)})"


def test_a_file_is_read_in_one_sitting():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in long.items() if lines > 300} == {}


def test_imports_inside_functions_hide_no_circle():
    """A module of ours that is imported inside a function could as well be imported above; those named begin fast."""
    found = []
    for path in MODULES:
        if path.parent.name in ("cli", "quickstart") or path.name == "worker.py":
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                found += [f"{path.relative_to(PACKAGE)}:{line} {module}" for line, module in imports(path, function)]
    assert found == []


def test_the_wheel_holds_every_package():
    """Tests run in the checkout, where a package that is not installed is found all the same."""
    config = ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    elsewhere = {name.strip() for name, _ in (line.split("=") for line in _lines(config["options"]["package_dir"]))}
    installed = set(_lines(config["options"]["packages"]))
    in_the_tree = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert installed - elsewhere == in_the_tree


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
