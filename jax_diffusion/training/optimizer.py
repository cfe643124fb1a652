"""Optimizers: `OPTIMIZERS` by name, any of optax, warm-up, decay and gradient clipping.

`config.optimizer` holds the arguments of `make_optimizer`:

    config.optimizer = dict(lr=2e-4, warmup_steps=5000, grad_clip=1.0)  # AdamW
    config.optimizer = dict(name="optax.contrib:muon", learning_rate=0.02, beta=0.95)

A row of `OPTIMIZERS` is a function f(learning_rate, **arguments) that returns an
`optax.GradientTransformation`, whose learning rate is a function of the step.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jax_diffusion import checks
from jax_diffusion.checks import signatures
from jax_diffusion.registry import (
    check_type,
    hint,
    is_outside,
    lookup,
    outside,
    parameters,
    short,
)

RATES = {"b1", "b2", "momentum"}  # in [0, 1); optax itself takes any number
DECAYS = ("constant", "linear", "cosine")


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Builds AdamW (Loshchilov and Hutter 2019); by default Adam, as the papers use it.

    Args:
        learning_rate: a number, or a function of the number of updates made.
        b1, b2: decay rates of the first and the second moment of the gradient, in
            [0, 1).
        epsilon: added to the root of the second moment, > 0.
        weight_decay: decoupled decay per update, times the learning rate, >= 0.

    Raises:
        ValueError: for a number out of range.
    """
    for name, rate in (("b1", b1), ("b2", b2)):
        checks.number(name, rate, at_least=0, below=1)
    checks.number("epsilon", epsilon, above=0)
    checks.number("weight_decay", weight_decay, at_least=0)
    return optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw}


def make_optimizer(
    *,
    total_steps: int,
    name: str = "adamw",
    lr: float | None = None,
    learning_rate: float | None = None,
    warmup_steps: int = 0,
    decay: str = "constant",
    grad_clip: float | None = None,
    **arguments: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds an optimizer that follows a learning-rate schedule.

    Args:
        total_steps: number of updates after which a decay has come to zero.
        name: a row of `OPTIMIZERS`, or any function of optax or your own, as
            "optax.contrib:muon".
        lr: peak learning rate, > 0.
        learning_rate: the same as `lr`; one of them must be given.
        warmup_steps: number of updates in which the learning rate grows linearly from
            0 to its peak (Ho et al. 2020: 5000).
        decay: what it does afterwards: "constant", "linear" (the annealing of
            improved-diffusion) or "cosine".
        grad_clip: largest global norm of the gradient that the optimizer sees, > 0;
            None leaves gradients alone.
        arguments: those of the function that `name` names, such as weight_decay.

    Returns:
        The optimizer, and its learning rate as a function of the number of updates
        made.

    Raises:
        ValueError: for an unknown name, decay or argument, or a number out of range.

    >>> tx, lr_fn = make_optimizer(lr=0.1, total_steps=100, warmup_steps=10)
    >>> [round(float(lr_fn(step)), 3) for step in (0, 5, 50)]
    [0.0, 0.05, 0.1]
    """
    peak = learning_rate if lr is None else lr
    if peak is None or None not in (lr, learning_rate):
        raise ValueError(
            f"lr or learning_rate must be given, and not both, got {lr} and "
            f"{learning_rate}."
        )
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {DECAYS}, got {decay!r}.")
    checks.number("learning_rate" if lr is None else "lr", peak, above=0)
    checks.integer("warmup_steps", warmup_steps, at_least=0, at_most=2**31 - 1)
    if grad_clip is not None:
        checks.number("grad_clip", grad_clip, above=0)
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[decay]
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    lr_fn = optax.join_schedules([warmup, after], [warmup_steps])
    function = lookup("optimizer", name, OPTIMIZERS)
    check_arguments(function, name, arguments)
    rule = "an optimizer of optax"
    rule += f" that takes {short(arguments)}" if arguments else ""
    # What a wrong argument of a row raises.
    of_rows = (TypeError, AttributeError, OverflowError)
    with outside("name", name, rule, of_rows):
        tx = function(learning_rate=lr_fn, **arguments)
        if not isinstance(tx, optax.GradientTransformation):
            raise ValueError(f"it returns {short(tx)}.")
    if is_outside(name):
        check_outside(tx, name)
    if grad_clip is None:
        return tx, lr_fn
    return optax.chain(optax.clip_by_global_norm(grad_clip), tx), lr_fn


def check_outside(tx: optax.GradientTransformation, name: str) -> None:
    """Checks that an optimizer needs gradients and parameters only; computes nothing.

    Args:
        tx: the optimizer.
        name: its name, for errors.

    Raises:
        ValueError: for one that needs the loss, or that cannot follow a schedule.
    """
    shapes = {"bias": (2,), "dense": (2, 2), "conv": (3, 3, 2, 2)}
    params = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}
    rule = (
        "an optimizer of optax that needs gradients, parameters and a learning rate "
        "that changes, and nothing else"
    )
    with outside("name", name, rule):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def check_arguments(function: Any, name: str, arguments: dict[str, Any]) -> None:
    """Checks that a function takes `learning_rate` and arguments, and needs no more.

    Args:
        function: builds an optimizer.
        name: its name, for errors.
        arguments: its arguments but the learning rate.

    Raises:
        ValueError: that names the argument that is unknown, missing or of a wrong type.
    """
    known = parameters(function, "name")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for argument in ("learning_rate", *arguments):
        if argument not in known and not takes_any:
            raise ValueError(
                f"name must be an optimizer with these arguments, and {name!r} has no "
                f"argument {argument!r}{hint(argument, known)}"
            )
        if argument in arguments and argument in known:
            check_type(argument, arguments[argument], known[argument].annotation)
    for argument in RATES & {*arguments} if name.startswith("optax") else ():
        if arguments[argument] is not None:
            checks.number(argument, arguments[argument], at_least=0, below=1)
    try:
        inspect.Signature([*known.values()]).bind(learning_rate=None, **arguments)
    except TypeError as error:
        raise ValueError(
            f"name {name!r} must be given its arguments, got {error}."
        ) from error


def update_by_loss(
    tx: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    loss: Array,
) -> tuple[PyTree, PyTree]:
    """Calls an optimizer, with `loss` as `value` if it takes that.

    Args:
        tx: the optimizer.
        grads, opt_state, params: arguments of its `update`.
        loss: the batch's.

    Returns:
        The updates, and the new `opt_state`.

    Raises:
        ValueError: if the optimizer needs more than that.
    """
    told = grads, opt_state, params
    takes_value = signatures.fit(tx.update, *told, value=loss)
    try:
        return tx.update(*told, **({"value": loss} if takes_value else {}))
    except TypeError as error:  # one of a chain says it when it is called
        if "required keyword-only argument" not in str(error):
            raise
        rule = "tx must need no more than gradients, parameters and value="
        raise ValueError(f"{rule}, got {type(error).__name__}: {error}.") from error
