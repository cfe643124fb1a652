"""Checks of arguments: one rule, one sentence, for every argument of every function.

Errors begin with the name of the argument, so that a config or a command line can say
its own name for it. NaN and infinity are never numbers that somebody meant.

What is static is always checked: types, shapes, dtypes. Values are checked where they
can be read on the host (`known`), so that within `jax.jit` a check costs nothing: it
adds no operation, and waits for no device.

    placement  where the batch lies on meshes with Explicit axes
    modes      whether a network that is evaluated has its dropout off
    signatures whether a function takes what it is called with
"""

import contextlib
import math
import numbers
import operator
import os
import reprlib
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

REAL: Any = numbers.Real  # a type checker knows no comparison of them
INTEGRAL: Any = numbers.Integral
ARRAYS = {  # kinds of arrays: in words, and the dtype that they have
    "float": ("a float array", jnp.floating),
    "int": ("an int array", jnp.signedinteger),
    "integer": ("an integer array", jnp.integer),
    "uint8": ("a uint8 array", np.uint8),
    "bool": ("a bool array", np.bool_),
    "key": ("an array of typed keys", jax.dtypes.prng_key),
    "any": ("an array", np.generic),
}


def number(
    name: str,
    value: Any,
    *,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
    infinite: bool = False,
) -> None:
    """Checks that an argument is one finite number in a range.

    Args:
        name: of the argument.
        value: a number of Python or NumPy, or an array without dimensions. Of a traced
            one, only shape and dtype can be checked.
        at_least, above: lower bound, included or not.
        at_most, below: upper bound, included or not.
        infinite: whether it may be infinite, as the end of an interval.

    Raises:
        ValueError: if it is not; bool is no number.

    >>> number("eta", 0.5, at_least=0, at_most=1)
    >>> number("eta", 2, at_least=0, at_most=1)
    Traceback (most recent call last):
    ValueError: eta must be a number in [0, 1], got 2.
    """
    rule = f"a number{_range(at_least, above, at_most, below)}"
    found: Any = value
    if isinstance(value, np.ndarray | jax.Array):
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.number):
            raise ValueError(f"{name} must be {rule}, got {shown(value)}.")
        if not known(value):
            return
        found = np.asarray(jax.device_get(value)).item()
    if (
        not isinstance(found, REAL)
        or isinstance(found, bool)
        or not (math.isfinite(found) or (infinite and not math.isnan(found)))
        or not _inside(found, at_least, above, at_most, below)
    ):
        raise ValueError(f"{name} must be {rule}, got {shown(found)}.")


def integer(
    name: str,
    value: Any,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
) -> None:
    """Checks that an argument is one integer in a range, known on the host.

    Args:
        name: of the argument.
        value: an integer of Python or NumPy.
        at_least, at_most: bounds, included.

    Raises:
        ValueError: if it is not; bool is no integer, nor is 2.0.

    >>> integer("steps", 2.5, at_least=1)
    Traceback (most recent call last):
    ValueError: steps must be an integer >= 1, got 2.5.
    """
    rule = f"an integer{_range(at_least, None, at_most, None)}"
    if (
        not isinstance(value, INTEGRAL)
        or isinstance(value, bool)
        or not _inside(value, at_least, None, at_most, None)
    ):
        raise ValueError(f"{name} must be {rule}, got {shown(value)}.")


def boolean(name: str, value: Any) -> None:
    """Raises ValueError unless `value`, the argument `name`, is True or False.

    >>> boolean("rescale", "no")
    Traceback (most recent call last):
    ValueError: rescale must be True or False, got 'no'.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {shown(value)}.")


def choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless `value`, the argument `name`, is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {shown(value)}.")


def function(name: str, value: Any, arguments: str) -> None:
    """Raises ValueError unless `value`, the argument `name`, can be called.

    The sentence says which `arguments` it shall take, such as "(x_t, t)".
    """
    if not callable(value):
        rule = f"{name} must be a function of {arguments}"
        raise ValueError(f"{rule}, got {shown(value)}.")


def path(name: str, value: Any, rule: str = "a path") -> None:
    """Raises ValueError unless `value`, the argument `name`, is a path of any file.

    That is a string or an os.PathLike of one, and not blank. `rule` says in words what
    else the path must be.

    >>> path("out", 3)
    Traceback (most recent call last):
    ValueError: out must be a path, got 3.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must be {rule}, got {shown(value)}.")


def array(
    name: str,
    value: Any,
    kind: str,
    shape: Sequence[int | str | EllipsisType] = (...,),
) -> None:
    """Checks the type, dtype and shape of an array, traced or not; reads no value.

    Args:
        name: of the argument.
        value: an array of jax or NumPy. What turns itself into one of jax passes.
        kind: a key of `ARRAYS`.
        shape: for each axis its size, or a word for any size; `...` at the end stands
            for any further axes.

    Raises:
        ValueError: if it is none, or has another dtype or shape.

    >>> array("t", np.zeros((3, 1), int), "int", (3,))
    Traceback (most recent call last):
    ValueError: t must be an int array [3], got int64 [3, 1].
    """
    words, dtype = ARRAYS[kind]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        wanted = [n for n in shape if n is not ...]
        pairs = zip(wanted, value.shape, strict=False)
        enough = len(value.shape) == len(wanted) or (
            ... in shape and len(value.shape) > len(wanted)
        )
        fits = enough and all(isinstance(n, str) or n == m for n, m in pairs)
        if fits and jnp.issubdtype(value.dtype, dtype):
            return
    elif hasattr(value, "__jax_array__"):
        return
    axes = ", ".join("..." if n is ... else str(n) for n in shape)
    raise ValueError(f"{name} must be {words} [{axes}], got {shown(value)}.")


def data(name: str, value: Any, shape: Sequence[int | str | EllipsisType]) -> None:
    """Checks that an argument is a float array; of integers it says how to make one.

    Raises:
        ValueError: as `array` does.

    >>> data("x_0", np.zeros((2, 3), np.uint8), ("b", ...))
    Traceback (most recent call last):
    ValueError: x_0 must be a float array, such as uint8 / 127.5 - 1, got uint8 [2, 3].
    """
    is_array = isinstance(value, jax.Array | np.ndarray)
    if is_array and jnp.issubdtype(value.dtype, jnp.integer):
        rule = f"{name} must be a float array, such as uint8 / 127.5 - 1"
        raise ValueError(f"{rule}, got {shown(value)}.")
    array(name, value, "float", shape)


def key(name: str, value: Any) -> None:
    """Raises ValueError unless `value`, the argument `name`, is one typed key.

    >>> key("key", np.zeros(2, np.uint32))
    Traceback (most recent call last):
    ValueError: key must be one typed key, as jax.random.key makes it, got uint32 [2].
    """
    is_key = isinstance(value, jax.Array) and value.shape == ()
    if not is_key or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        rule = f"{name} must be one typed key, as jax.random.key makes it"
        raise ValueError(f"{rule}, got {shown(value)}.")


def keys(name: str, value: Any, count: int | str = "b") -> None:
    """Raises ValueError unless `value`, the argument `name`, is `count` typed keys.

    Under `jax.vmap`, what rbg draws with a key depends on the keys beside it.

    >>> keys("keys", jax.random.key(0), 3)
    Traceback (most recent call last):
    ValueError: keys must be an array of typed keys [3], got key<fry> [].
    """
    array(name, value, "key", (count,))
    if "rbg" in str(getattr(value, "dtype", "")):
        rule = f"{name} must be keys whose noise is the same in every batch"
        raise ValueError(f"{rule}, as of threefry2x32, got {shown(value)}.")


def rows(name: str, value: Any, num_rows: int, *, negative: bool = False) -> None:
    """Raises ValueError unless integers are in [0, `num_rows`), where known.

    With `negative`, they may be below 0, too.

    >>> rows("t", np.array([3, 10]), 10)
    Traceback (most recent call last):
    ValueError: t must be in [0, 10), got 10.
    """
    if not known(value):
        return
    found = np.asarray(jax.device_get(value))
    wrong = found[(found >= num_rows) | ((found < 0) & (not negative))]
    if wrong.size:
        rule = f"below {num_rows}" if negative else f"in [0, {num_rows})"
        raise ValueError(f"{name} must be {rule}, got {wrong.flat[0]}.")


def broadcasts(name: str, value: Any, shape: Sequence[int]) -> None:
    """Raises ValueError unless an argument broadcasts to a shape, which it may have.

    >>> broadcasts("log_var", np.zeros((2, 3)), (2, 4))
    Traceback (most recent call last):
    ValueError: log_var must broadcast to [2, 4], got float64 [2, 3].
    """
    if common_shape(name, value, shape) != tuple(shape):
        rule = f"{name} must broadcast to [{', '.join(map(str, shape))}]"
        raise ValueError(f"{rule}, got {shown(value)}.")


def common_shape(name: str, value: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape that an argument and a `shape` broadcast to.

    Raises:
        ValueError: if there is none, or the argument `name` is not made of numbers.

    >>> common_shape("log_var", np.zeros((3, 1)), (2,))
    (3, 2)
    """
    found = None
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    plain = type(value) if isinstance(value, bool | int | float) else object
    kind = value.dtype if is_array else np.dtype(plain)
    if any(jnp.issubdtype(kind, real) for real in (jnp.floating, jnp.integer, bool)):
        with contextlib.suppress(ValueError):  # if they do not broadcast
            found = np.broadcast_shapes(np.shape(value), tuple(shape))
    if found is None:
        rule = f"{name} must broadcast to [{', '.join(map(str, shape))}]"
        raise ValueError(f"{rule}, got {shown(value)}.")
    return found


def vector(
    name: str,
    value: Any,
    *,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
) -> np.ndarray:
    """Checks that an argument is a sequence of finite numbers in a range.

    Args:
        name: of the argument.
        value: a sequence or an array, known on the host.
        at_least, above: lower bound of each, included or not.
        at_most, below: upper bound of each, included or not.

    Returns:
        float64 [n].

    Raises:
        ValueError: if it is none, or a number is out of range.

    >>> vector("betas", [0.5, 2], above=0, at_most=1)
    Traceback (most recent call last):
    ValueError: betas must be a vector of values in (0, 1], got 2.0.
    """
    rule = f"{name} must be a vector of values{_range(at_least, above, at_most, below)}"
    if not known(value):
        raise ValueError(f"{rule}, got {shown(value)}, whose values are not known.")
    try:
        found = np.asarray(value)
        wrong_type = found.dtype.kind not in "fiu"
        if not wrong_type or found.dtype == jnp.bfloat16:
            found, wrong_type = found.astype(np.float64), False
    except (TypeError, ValueError):  # ragged, or of objects
        wrong_type = True
    if wrong_type or found.ndim != 1:
        raise ValueError(f"{rule}, got {shown(value)}.")
    inside = np.isfinite(found) & _inside(found, at_least, above, at_most, below)
    if not inside.all():
        raise ValueError(f"{rule}, got {found[~inside][0]}.")
    return found


def known(value: Any) -> bool:
    """Tells whether values can be read on this host: not traced, not on others only."""
    if isinstance(value, Tracer):
        return False
    if not isinstance(value, jax.Array):
        return True
    return value.is_fully_addressable or value.is_fully_replicated


def shown(value: Any) -> str:
    """Returns a few words for what came: a number itself, an array's dtype and shape.

    >>> shown(2.5), shown(np.zeros((2, 3))), shown(max)
    ('2.5', 'float64 [2, 3]', 'a builtin_function_or_method')
    >>> shown((np.zeros(2), None))
    'a tuple of float64 [2], None'
    """
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype} [{', '.join(map(str, value.shape))}]"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, complex, str):
        return reprlib.repr(value)
    if type(value) in (list, tuple, dict):
        parts = value.values() if isinstance(value, dict) else value
        text = reprlib.repr(value)
        if any(hasattr(part, "dtype") for part in parts):
            text = f"a {type(value).__name__} of {', '.join(map(shown, parts))}"
        return text if len(text) <= 100 else f"{text[:100]}..."
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _inside(value: Any, at_least: Any, above: Any, at_most: Any, below: Any) -> Any:
    """Whether a number, or which number of an array, is in a range."""
    inside: Any = True
    for bound, holds in (
        (at_least, operator.ge),
        (above, operator.gt),
        (at_most, operator.le),
        (below, operator.lt),
    ):
        if bound is not None:
            inside = inside & holds(value, bound)
    return inside


def _range(at_least: Any, above: Any, at_most: Any, below: Any) -> str:
    """Words for a range: " >= 1", " in [0, 1)", or nothing."""
    low, high = (
        at_least if above is None else above,
        at_most if below is None else below,
    )
    if low is not None and high is not None:
        ends = "[" if above is None else "(", "]" if below is None else ")"
        return f" in {ends[0]}{low}, {high}{ends[1]}"
    if low is not None:
        return f" {'>=' if above is None else '>'} {low}"
    if high is not None:
        return f" {'<=' if below is None else '<'} {high}"
    return ""
