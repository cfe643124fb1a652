"""Names of registries, and functions from outside by "module:attribute"."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import pytest

from jax_diffusion import registry

ROWS = {"ddim": 1, "ddpm": 2}


def test_lookup_returns_the_row_of_a_name():
    assert registry.lookup("sampler", "ddpm", ROWS) == 2


def test_lookup_imports_module_colon_attribute():
    assert registry.lookup("sampler", "math:hypot", ROWS) is math.hypot


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("dimm", "sampler must be one of .*, got 'dimm'; did you mean 'ddim'"),
        ("zzzzz", r"sampler must be one of \['ddim', 'ddpm'\] or .*, got 'zzzzz'\."),
        (3, "sampler must be one of .*, got 3"),
        (None, "sampler must be one of .*, got None"),
        (
            "no_such_module_x:f",
            "sampler must be one of .* or an importable .*no_such_module_x",
        ),
        ("math:no_such", "sampler must be one of .* or an importable .*no_such"),
        ("math:pi", "sampler must be one of .*, which is 3.14"),
        (":f", "sampler must be one of .* or an importable"),
        ("math:", "sampler must be one of .* or an importable"),
    ],
)
def test_lookup_refuses_unknown_names_in_a_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        registry.lookup("sampler", name, ROWS)


@pytest.mark.parametrize(
    ("text", "error"),
    [("def f(:", "SyntaxError"), ("none", "NameError"), ("raise SystemExit", "System")],
)
def test_a_module_that_fails_is_told_in_a_sentence(text, error, tmp_path, monkeypatch):
    name = f"failing_{error.lower()}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"sampler must be one of .*{error}"):
        registry.lookup("sampler", f"{name}:f", ROWS)


def test_choose_takes_rows_only():
    assert registry.choose("to", "ddim", ROWS) == 1
    for name in ("math:hypot", "dimm", None, [1]):
        with pytest.raises(
            ValueError, match=r"to must be one of \['ddim', 'ddpm'\], got"
        ):
            registry.choose("to", name, ROWS)


# Types of arguments

NAN = float("nan")


RIGHT = [
    (3, int),
    (np.int64(3), int),
    (3, float),
    (2.5, float),
    (np.float32(2.5), float),
    (True, bool),
    ("a", str),
    (None, int | None),
    ((1, 2), Sequence[int]),
    ([1, 2], tuple[int, int]),
    ([1, 2], tuple[int, ...]),
    ((), Sequence[int]),
    ((1, 2.5), Sequence[int | float]),
    ("a", Literal["a", "b"]),
    ({"a": 1}, Mapping[str, int]),
    (len, Callable[..., Any]),
    ("float32", jax.typing.DTypeLike),
    (Ellipsis, Any),
    ("anything", inspect.Parameter.empty),
    (3, [int]),  # no type at all
    (3, "NotDefined"),
]
WRONG = [
    (True, int),
    (True, float),
    (2.0, int),
    ("3", int),
    (1, bool),
    ("False", bool),
    (None, int),
    (1, str),
    ("ab", Sequence[str]),
    (("a",), Sequence[int]),
    ((1,) * 50 + ("a",) + (1,) * 50, Sequence[int]),  # every item counts
    ((True,), Sequence[int]),
    ((1, 2, 3), tuple[int, int]),
    (3, Sequence[int]),
    ("c", Literal["a", "b"]),
    (True, Literal[1]),
    ({"a": "b"}, Mapping[str, int]),
    (3, Callable[..., Any]),
    (2.5, jax.typing.DTypeLike),
    (NAN, float),
    ((1.0, NAN), Sequence[float]),
    ({"a": [NAN]}, Any),
    (float("inf"), inspect.Parameter.empty),
]


@pytest.mark.parametrize(("value", "hint"), RIGHT, ids=str)
def test_values_that_fit_their_hint_pass(value, hint):
    registry.check_type("config.group.field", value, hint)


@pytest.mark.parametrize(("value", "hint"), WRONG, ids=str)
def test_values_that_do_not_fit_are_named_in_one_sentence(value, hint):
    with pytest.raises(ValueError, match=r"^config.group.field must [^\n]*\.$"):
        registry.check_type("config.group.field", value, hint)


def test_errors_of_a_function_name_the_group_of_the_argument():
    def function(lr: float, text="", **more):
        raise ValueError(text)

    def said(text):
        with pytest.raises(ValueError) as error:
            registry.call(function, dict(lr=1, text=text, b1=2), "config.optimizer")
        return str(error.value)

    assert said("lr must be > 0.") == "config.optimizer.lr must be > 0."
    assert said("b1 must be < 1.") == "config.optimizer.b1 must be < 1."
    assert said("the file is damaged.") == "the file is damaged."


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (dict(lr="x"), "g.lr must be a number, got 'x'."),
        (
            dict(lr=1, total=2),
            "g.total must be left out, as the program sets it, got 2.",
        ),
        (dict(lr=1, l=2), "g has no field 'l'; did you mean 'lr'?"),
        (dict(), "g lacks the fields ['lr']."),
        (3, "g must be a group of fields, got 3."),
    ],
    ids=str,
)
def test_a_group_is_checked_before_its_function_is_called(group, sentence):
    def function(lr: float, total: int = 0):
        pytest.fail("was called")

    with pytest.raises(ValueError) as error:
        registry.call(function, group, "g", total=1)
    assert str(error.value) == sentence
