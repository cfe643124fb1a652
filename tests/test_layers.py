"""Who may import whom, sizes, docstrings: a rule without a test is a wish.

Ranks are given by folder, so that a new file in one needs no edit here.
"""

import ast
import collections
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_diffusion"

# The mathematics, lowest first: each imports only what stands before it.
MATHEMATICS = (
    *("checks", "spacing", "schedules", "diffusion", "timesteps", "losses", "samplers"),
    *("guidance", "likelihood", "editing"),
)
# The rest, lowest first. What stands in one row does not know of the others in it.
ROWS = (
    {"runtime.untrusted"},
    {"registry", "runtime.files"},
    {"models", "data", "metrics", "runtime", "plotting", "export"},
    {"training"},
    {"config"},
    {"pipeline.tasks"},
    {"pipeline"},
    {"interop"},
    {"evaluation"},
    {"training.setup", "training.reporting"},
    {"training.fine_tuning", "training.resume"},
    {"cli"},
    {"train", "sample", "evaluate", "convert", "__main__"},
)
PLACES = MATHEMATICS + tuple(name for row in ROWS for name in row)
PARTS = ROWS[2]
# What the parts may import of ours, besides their own folder.
BELOW_PARTS = {"checks", "registry", "runtime.files", "runtime.untrusted"}
PROGRAMS = {"train", "sample", "evaluate", "convert", "__main__"}

STANDARD = set(sys.stdlib_module_names)
CORE_LIBRARIES = STANDARD | {"jax", "numpy", "jaxtyping"}
TOP_LEVEL = {
    *("jax_diffusion", "configs", "tests", "colab", "pyproject.toml", "README.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"),
}
MAX_ENTRIES = 30  # directly in the package
MAX_FILE = 400  # lines
MAX_STEPS_FILE = 700  # of samplers/steps.py, where every sampler stands
MAX_FUNCTION = 60  # lines of code
MAX_CALLED_ONCE = 30  # private functions, see the test


def name_of(path):
    """data, models.unet; the package itself is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

every_file = pytest.mark.parametrize("name", FILES)


def place_of(name):
    """The longest of PLACES that a module is or lies in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in PLACES), None)


def rank_of(place):
    """Place of a row; the mathematics lie below all of them."""
    if place in MATHEMATICS:
        return -1
    return next(i for i, row in enumerate(ROWS) if place in row)


def imports(name):
    """Libraries, and modules of this package, imported anywhere in a file."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:  # a module of a package, or a thing of a module
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("jax_diffusion.") in FILES
                found.add(inner if is_module else node.module)
    ours = {f for f in found if f.split(".")[0] == "jax_diffusion"}
    libraries = {f.split(".")[0] for f in found - ours}
    ours -= {"jax_diffusion"}
    return libraries, {f.removeprefix("jax_diffusion.") for f in ours}


def in_mathematics(name):
    return place_of(name) in MATHEMATICS


mathematics = pytest.mark.parametrize("name", [n for n in FILES if in_mathematics(n)])


def test_every_module_has_its_place():
    assert [name for name in FILES if name and place_of(name) is None] == []


@mathematics
def test_the_mathematics_import_jax_numpy_and_what_is_below(name):
    libraries, ours = imports(name)
    assert libraries <= CORE_LIBRARIES
    place = place_of(name)
    below = {*MATHEMATICS[: MATHEMATICS.index(place) + 1]}
    assert {place_of(other) for other in ours} <= below


@pytest.mark.parametrize("name", [n for n in FILES if n and not in_mathematics(n)])
def test_nothing_imports_what_stands_above_or_beside_it(name):
    place = place_of(name)
    others = {place_of(other) for other in imports(name)[1]} - {place}
    if place in PARTS:
        assert others <= BELOW_PARTS
    if place == "registry":
        assert not others
    assert [o for o in others if rank_of(o) >= rank_of(place)] == []


def test_no_module_imports_itself_in_a_circle():
    graph = {name: imports(name)[1] - {name} for name in FILES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph.get(name, ())):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def module_level(tree):
    """Import statements that run when the module does."""
    kinds = ast.Import | ast.ImportFrom
    return [node for node in tree.body if isinstance(node, kinds)]


def test_the_package_itself_loads_the_mathematics_only():
    libraries, names = set(), set()
    for node in module_level(TREES[""]):
        if isinstance(node, ast.Import):
            libraries |= {alias.name.split(".")[0] for alias in node.names}
        elif node.module == "jax_diffusion":
            names |= {alias.name for alias in node.names}
        else:
            libraries.add(node.module.split(".")[0])
    assert libraries <= STANDARD and names == {*MATHEMATICS}


def test_importing_the_package_loads_no_library_of_training():
    code = "import sys, jax_diffusion; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "jax_diffusion.samplers" in loaded
    heavy = {
        *("flax", "optax", "orbax", "ml_collections", "absl", "sklearn"),
        *("matplotlib", "jax_diffusion.pipeline", "jax_diffusion.config"),
    }
    assert not heavy & set(loaded)


@every_file
def test_argparse_is_for_programs_and_config_dicts_for_config(name):
    libraries, _ = imports(name)
    if name not in PROGRAMS | {"cli"}:
        assert "argparse" not in libraries
    if place_of(name) != "config":
        assert not libraries & {"ml_collections", "absl"}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in FILES
        if in_mathematics(name)
        or place_of(name) in ("models", "pipeline.tasks")
        or name in ("training.step", "training.optimizer")
    ],
)
def test_what_can_be_jitted_is_not_jitted_already(name):
    names = {n.attr for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)}
    assert not names & {"jit", "pjit", "pmap"}


# Sizes, docstrings, the top level


def test_the_package_fits_a_screen():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


@every_file
def test_no_file_is_longer_than_its_reader_can_hold(name):
    most = MAX_STEPS_FILE if name == "samplers.steps" else MAX_FILE
    assert len(FILES[name].read_text().splitlines()) <= most


def functions(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def length(function, lines):
    """Lines of code: not blank, no comment, not of the docstring."""
    code = set(range(function.lineno - 1, function.end_lineno))
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        code -= set(range(docstring.lineno - 1, docstring.end_lineno))
    return sum(lines[i].strip()[:1] not in ("", "#") for i in code)


@every_file
def test_no_function_is_longer_than_a_screen(name):
    lines = FILES[name].read_text().splitlines()
    lengths = [(f"{name}.{f.name}", length(f, lines)) for f in functions(TREES[name])]
    assert [found for found in lengths if found[1] > MAX_FUNCTION] == []


def test_the_length_of_a_function_is_its_code_without_docstring_and_comments():
    source = 'def f(x):\n    """One\n\n    two."""\n\n    # why\n    return x\n'
    assert length(ast.parse(source).body[0], source.splitlines()) == 2


def called_once(tree):
    """Private functions of a module that it calls in one place and names in no other.

    Functions at the top of a module and methods count; those inside functions do not,
    nor do functions that are passed on by name, as to a registry or a scan.
    """
    kinds, private = ast.FunctionDef | ast.AsyncFunctionDef, []
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        private += [n.name for n in inside if isinstance(n, kinds)]
    calls, named = collections.Counter(), collections.Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            named[getattr(node, "id", None) or getattr(node, "attr", None)] += 1
        if isinstance(node, ast.Call):
            function = node.func
            calls[getattr(function, "id", None) or getattr(function, "attr", None)] += 1
    return [
        name
        for name in private
        if name.startswith("_") and not name.startswith("__")
        if calls[name] == named[name] == 1
    ]


def test_few_private_functions_are_called_once():
    found = [f"{n}.{f}" for n, tree in TREES.items() for f in called_once(tree)]
    assert len(found) < MAX_CALLED_ONCE, "\n".join(found)


def test_private_functions_called_once_are_found():
    source = (
        "def _a(): pass\ndef _b(): pass\ndef _c(): pass\nclass D:\n"
        "    def _e(self): pass\n    def f(self): self._e(); _b(); _b()\n"
        "ROWS = {'c': _c}\n_a()\n"
    )
    assert called_once(ast.parse(source)) == ["_a", "_e"]


@every_file
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


@mathematics
def test_everything_public_in_the_mathematics_says_what_it_is(name):
    kinds = ast.FunctionDef | ast.ClassDef
    tops = [node for node in TREES[name].body if isinstance(node, kinds)]
    inner = [n for c in tops if isinstance(c, ast.ClassDef) for n in c.body]
    public = [
        n
        for n in tops + inner
        if isinstance(n, kinds) and not n.name.startswith("_")
        # a signature of a function that is explained where its body is
        if not any(ast.unparse(d) == "overload" for d in n.decorator_list)
    ]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


def test_nothing_else_stands_at_the_top_level():
    git = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not git.stdout:
        pytest.skip("not a git repository, or nothing is tracked yet")
    top = {line.split("/")[0] for line in git.stdout.splitlines()}
    assert {entry for entry in top if not entry.startswith(".")} <= TOP_LEVEL
