"""The gradient of a batch, as a whole or in microbatches, and the update by it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from jax_diffusion.checks import placement, signatures


def average_gradient(
    loss_fn: Callable[..., Any],
    microbatches: int,
    params: PyTree,
    key: Key[Array, ""],
    examples: tuple[Any, ...],
) -> tuple[Array, Any, PyTree]:
    """Computes the gradient of a batch, in parts one after the other.

    Args:
        loss_fn: loss_fn(params, key, *examples) -> (mean loss, terms by example).
        microbatches: number of parts. Part i has the examples i, i + microbatches, ...,
            so that every device has its share of each, and the key fold_in(key, i).
        params: what to differentiate by.
        key: of dropout.
        examples: arrays [b, ...], or dicts of them; the first is an array.

    Returns:
        The mean loss, its terms [b], and the gradient.

    Raises:
        ValueError: unless microbatches divides b.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    b = len(examples[0])
    if microbatches < 1 or b % microbatches:
        raise ValueError(
            f"microbatches must divide the batch of {b} images, got {microbatches}."
        )
    if microbatches == 1:
        (loss, terms), grads = grad_fn(params, key, *examples)
        return loss, terms, grads

    def in_parts(a):  # [b, ...] -> [microbatches, b / microbatches, ...]
        shape = (b // microbatches, microbatches, *a.shape[1:])
        return placement.reshape(a, shape).swapaxes(0, 1)

    def add_part(sums, part):
        i, examples = part
        (loss, terms), grads = grad_fn(params, jax.random.fold_in(key, i), *examples)
        return jax.tree.map(jnp.add, sums, (loss, grads)), terms

    parts = jnp.arange(microbatches), jax.tree.map(in_parts, examples)
    loss, _ = jax.eval_shape(loss_fn, params, key, *examples)
    zeros = jnp.zeros((), loss.dtype), jax.tree.map(jnp.zeros_like, params)
    sums, terms = jax.lax.scan(add_part, zeros, parts)
    loss, grads = jax.tree.map(lambda a: a / microbatches, sums)
    terms = jax.tree.map(lambda a: a.T.reshape(b), terms)
    return loss, terms, grads


def update(
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
    except (AttributeError, TypeError) as error:  # of what is not there
        rule = "tx must need no more than gradients, parameters and value="
        raise ValueError(f"{rule}, got {type(error).__name__}: {error}.") from error
