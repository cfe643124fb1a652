"""`help()` explains every field and argument of the core; its old names still exist.

Whether the words are good is for readers to say; that none is left out is tested: of a
function that has a place on the API site also shapes, errors and source.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
import typing
from collections.abc import Callable

import jax
import numpy as np
import pytest

import jax_diffusion

CORE = (
    *("schedules", "spacing", "diffusion", "timesteps", "losses"),
    *("samplers", "guidance", "editing", "likelihood"),
)

# Papers by their year, and systems that a function follows, or takes its name from.
SOURCE = re.compile(
    r"\b(19|20)\d\d\b|\b(DDPM|DDIM) (eq|alg|sec|app|code|repository)|\bjax\.random\b|"
    r"improved-diffusion|guided-diffusion|k-diffusion|diffusers|lucidrains|EDM's `"
)
# What no paper has: how this package holds tables, states and functions.
OWN = {
    *("schedules.pad", "schedules.num_visited", "schedules.steps_to_keep"),
    *("timesteps.table_of", "timesteps.rows_of", "spacing.angle_steps"),
    *("diffusion.schedule_of", "diffusion.with_schedule"),
    *("samplers.start", "samplers.as_sampler", "samplers.on_step"),
}


def modules():
    """The core's modules, and those inside of its packages."""
    for name in CORE:
        module = getattr(jax_diffusion, name)
        yield module
        for inner in pkgutil.iter_modules(getattr(module, "__path__", [])):
            yield importlib.import_module(f"{module.__name__}.{inner.name}")


def public(kind):
    found = {
        f"{thing.__module__.removeprefix('jax_diffusion.')}.{thing.__name__}": thing
        for module in modules()
        for _, thing in inspect.getmembers(module, kind)
        if thing.__module__ == module.__name__ and not thing.__name__.startswith("_")
    }
    return [pytest.param(thing, id=name) for name, thing in found.items()]


def fields(cls):
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return getattr(cls, "_fields", ())


def names(text):
    return set(re.findall(r"\w+", text))


def own_doc(thing):
    """The docstring that was written for it, and not one that a class has made."""
    return inspect.cleandoc(thing.__doc__ or "")


@pytest.mark.parametrize("cls", public(inspect.isclass))
def test_the_attributes_of_every_public_class_are_documented(cls):
    _, _, attributes = own_doc(cls).partition("\nAttributes:\n")
    listed = re.findall(r"^    ([\w, ]+):", attributes, flags=re.MULTILINE)
    assert set(fields(cls)) <= {name for line in listed for name in names(line)}


@pytest.mark.parametrize("function", public(inspect.isfunction))
def test_the_docstring_of_every_public_function_names_its_arguments(function):
    parameters = inspect.signature(function).parameters
    assert set(parameters) <= names(own_doc(function))


@pytest.mark.parametrize("function", public(inspect.isfunction))
def test_a_public_function_that_raises_says_so(function):
    raises = re.search(r"\braise ValueError|\bcheck_\w+\(", inspect.getsource(function))
    assert not raises or "ValueError" in own_doc(function)


def on_the_site():
    """Functions with a place on the API site: what `__all__` names, else all public."""
    found = {}
    for module in modules():
        around = importlib.import_module(module.__name__.rpartition(".")[0])
        if around is not jax_diffusion and hasattr(around, "__all__"):
            continue  # the page of the package shows what is public of the module
        for name, thing in inspect.getmembers(module, inspect.isfunction):
            public = name in getattr(module, "__all__", {thing.__name__})
            own = thing.__module__.startswith(module.__name__)
            if public and own and not name.startswith("_"):
                name = f"{module.__name__}.{thing.__name__}"
                found[name.removeprefix("jax_diffusion.")] = thing
    return found


every_function_on_the_site = pytest.mark.parametrize(
    ("name", "function"),
    [pytest.param(name, f, id=name) for name, f in on_the_site().items()],
)


def raises(function, above=()):
    """Whether a function raises an error, or calls one of this package that does."""
    function = inspect.unwrap(function)
    if function in above or not function.__module__.startswith("jax_diffusion"):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # of a NamedTuple's methods
        return False
    nodes = list(ast.walk(tree))
    if any(isinstance(node, ast.Raise) and node.exc for node in nodes):
        return True
    hidden = dict.fromkeys(function.__code__.co_varnames)  # by variables of its own
    scope = function.__globals__ | hidden
    calls = [found_in(scope, node.func) for node in nodes if isinstance(node, ast.Call)]
    above = (*above, function)
    return any(raises(called, above) for called in calls if inspect.isfunction(called))


def found_in(scope, expression):
    """What a name or a path of names stands for; None for any other expression."""
    if isinstance(expression, ast.Name):
        return scope.get(expression.id)
    if isinstance(expression, ast.Attribute):
        return getattr(found_in(scope, expression.value), expression.attr, None)
    return None


def has_axes(annotation):
    """Whether an argument with this annotation is, or may be, an array with axes."""
    if typing.get_origin(annotation) is Callable:
        return False
    inner = typing.get_args(annotation)
    if inner:
        return any(map(has_axes, inner))
    axes = getattr(annotation, "dim_str", None)  # of jaxtyping
    return bool(axes) if axes is not None else annotation in (jax.Array, np.ndarray)


def words_on(name, doc):
    """What a docstring says of an argument: in Args, else in sentences that name it."""
    args = re.search(r"^Args:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    for entry in re.split(r"\n(?=    \S)", "\n" + args[1]) if args else ():
        named, colon, words = entry.partition(":")
        if colon and name in names(named):
            return words
    sentences = re.split(r"[.:]\s|\n\n", doc)
    return " ".join(s for s in sentences if name in names(s))


@every_function_on_the_site
def test_a_documented_function_gives_the_shapes_of_its_arrays(name, function):
    doc = own_doc(function)
    arrays = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if has_axes(parameter.annotation)
    ]
    assert [a for a in arrays if not re.search(r"\[.*?\]", words_on(a, doc))] == []


@every_function_on_the_site
def test_a_documented_function_that_raises_has_a_section_on_it(name, function):
    doc = own_doc(function)
    checks = doc.startswith("Raises ValueError ")  # which is all that it does
    section = re.search(r"^Raises:\n    ValueError: \w", doc, re.MULTILINE)
    assert bool(section) or checks or not raises(function)


@every_function_on_the_site
def test_a_documented_function_names_its_paper_or_system(name, function):
    own = name in OWN or function.__name__.startswith("check_")
    assert bool(SOURCE.search(own_doc(function))) != own


def test_functions_that_raise_through_others_are_found():
    assert raises(jax_diffusion.samplers.ddim_step)  # by functions of other modules
    assert not raises(jax_diffusion.timesteps.rows_of)
    assert {"schedules.pad", "editing.edit", "losses.mean_flat"} <= set(on_the_site())
    assert set(on_the_site()) >= OWN


@pytest.mark.parametrize("function", public(inspect.isfunction))
def test_no_key_has_a_default(function):  # B3, B8
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("key", "keys"):
            assert parameter.default is inspect.Parameter.empty


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("samplers.watch", "samplers.on_step"),
        ("timesteps.SAMPLERS", "timesteps.TIMESTEP_SAMPLERS"),
        ("editing.grey", "editing.gray"),
        ("likelihood.dequantise", "likelihood.dequantize"),
    ],
)
def test_a_name_that_has_changed_is_found_by_its_old_name(old, new):
    def find(path):
        module, name = path.split(".")
        return getattr(getattr(jax_diffusion, module), name)

    assert find(old) is find(new)
