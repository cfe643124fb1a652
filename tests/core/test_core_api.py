"""`help()` explains every field and argument of the core; its old names still exist.

Whether the words are good is for readers to say; that none is left out is tested.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re

import pytest

import jax_diffusion

CORE = (
    *("schedules", "spacing", "diffusion", "timesteps", "losses"),
    *("samplers", "guidance", "editing", "likelihood"),
)


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
