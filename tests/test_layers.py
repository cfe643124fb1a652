"""The rules of who may import whom, and of size; a rule without a test is a wish."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_diffusion"

# A new module fails until it has its place here.
CORE = {  # imports only what is below it
    "spacing": 0,
    "schedules": 1,
    "diffusion": 2,
    "timesteps": 2,
    "losses": 3,
    "samplers": 3,
    "guidance": 3,
    "likelihood": 4,
    "editing": 4,
}
MODELS = {  # in models/
    *("layers", "unet", "annotated", "lucidrains", "encoder", "inception"),
    *("classifier", "weights", "torch_files", "diffusers_config", "released"),
}
APART = {
    *("checkpoint", "cpu", "data", "logs"),
    *("metrics", "parts", "pictures", "plotting", "roofline", "sharding", "sources"),
}
TRAINING = {"training", "export", "tasks"}  # level 4: on the core, whatever the model
PROGRAMS = {  # level 5
    *("train", "plan", "watching", "sample", "asked", "runs", "convert", "settings"),
    *("evaluate", "evaluation", "image_scores", "scoring", "extractors", "papers"),
}

STANDARD = set(sys.stdlib_module_names)
CORE_LIBRARIES = STANDARD | {"jax", "numpy", "jaxtyping"}
TOP_LEVEL = {
    *("jax_diffusion", "configs", "tests", "colab", "pyproject.toml"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
}
MAX_FILE, MAX_FUNCTION = 400, 40  # lines
LONG_FUNCTIONS = {"train.train"}


def name_of(path):
    """data, models.unet; the package itself is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

every_file = pytest.mark.parametrize("name", FILES)


def of(names):
    return pytest.mark.parametrize("name", sorted(set(names) & set(FILES)))


def imports(name):
    """Libraries, and modules of this package, imported anywhere in a file."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            # `from package import module` and `from package.module import thing`
            inside = node.module == "jax_diffusion" or node.module in PACKAGES
            base = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= base if inside else {node.module}
    ours = {f for f in found if f.split(".")[0] == "jax_diffusion"}
    libraries = {f.split(".")[0] for f in found - ours}
    return libraries, {f.removeprefix("jax_diffusion.") for f in ours}


PACKAGES = {
    f"jax_diffusion.{name_of(path)}" for path in PACKAGE.rglob("__init__.py")
} - {"jax_diffusion."}


def test_every_module_has_its_place():
    places = {"", "models", *CORE, *APART, *TRAINING, *PROGRAMS}
    places |= {f"models.{name}" for name in MODELS}
    assert set(FILES) <= places, "decide where the new module belongs, see CORE above"


@of(CORE)
def test_the_core_imports_jax_numpy_and_what_is_below(name):
    libraries, ours = imports(name)
    assert libraries <= CORE_LIBRARIES
    assert ours <= {other for other in CORE if CORE[other] < CORE[name]}


def test_the_package_itself_imports_the_core_only():
    libraries, ours = imports("")
    assert libraries <= CORE_LIBRARIES and ours <= set(CORE)


@of({"models", *(f"models.{name}" for name in MODELS)})
def test_models_import_nothing_of_ours_but_models(name):
    _, ours = imports(name)
    assert ours <= {f"models.{other}" for other in MODELS}


@of(APART)
def test_infrastructure_imports_nothing_of_ours(name):
    below = {"sources"} if name in ("data", "pictures") else set()
    assert imports(name)[1] <= below


@of(TRAINING)
def test_training_imports_the_core_and_optax_but_no_model(name):
    libraries, ours = imports(name)
    assert libraries <= CORE_LIBRARIES | {"flax", "optax"}
    assert ours <= set(CORE) | {"data"}  # a batch is uint8: `data.from_uint8`


@every_file
def test_only_programs_know_config_dicts_and_programs(name):
    if name not in PROGRAMS:
        libraries, ours = imports(name)
        assert not libraries & {"ml_collections", "absl"} and not ours & PROGRAMS


@of({*CORE, *TRAINING - {"export"}, *(f"models.{name}" for name in MODELS)})
def test_what_can_be_jitted_is_not_jitted_already(name):
    names = {n.attr for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)}
    assert not names & {"jit", "pjit", "pmap"}


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
        "flax",
        "optax",
        "orbax",
        "ml_collections",
        "absl",
        "sklearn",
        "matplotlib",
    }
    assert not heavy & set(loaded)


# --- sizes, docstrings, the top level


@every_file
def test_no_file_is_longer_than_its_reader_can_hold(name):
    assert len(FILES[name].read_text().splitlines()) <= MAX_FILE


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
    too_long = [
        f for f in lengths if f[1] > MAX_FUNCTION and f[0] not in LONG_FUNCTIONS
    ]
    assert too_long == []


def test_the_length_of_a_function_is_its_code_without_docstring_and_comments():
    source = 'def f(x):\n    """One\n\n    two."""\n\n    # why\n    return x\n'
    assert length(ast.parse(source).body[0], source.splitlines()) == 2


@every_file
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


@of(CORE)
def test_everything_public_in_the_core_says_what_it_is(name):
    kinds = ast.FunctionDef | ast.ClassDef
    tops = [node for node in TREES[name].body if isinstance(node, kinds)]
    inner = [n for c in tops if isinstance(c, ast.ClassDef) for n in c.body]
    public = [
        n for n in tops + inner if isinstance(n, kinds) and not n.name.startswith("_")
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
