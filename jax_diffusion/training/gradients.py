"""The gradient of a batch, as a whole or in microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jax_diffusion.checks import placement


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
