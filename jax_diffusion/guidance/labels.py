"""Classifier-free guidance: by a label, or by any other conditioning."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jax_diffusion import checks, diffusion
from jax_diffusion.checks import placement, signatures
from jax_diffusion.diffusion import ConditionalDenoiseFn, Prediction
from jax_diffusion.guidance.scales import Scale, check_scale, column, rescaled


def classifier_free(
    denoise_fn: Callable[..., Prediction],
    label: Int[Array, "b"] | Mapping[str, PyTree],
    null_label: int | Int[Array, "b"] | Mapping[str, PyTree],
    scale: Scale,
    *,
    rescale: float | Float[Array, ""] = 0.0,
) -> ConditionalDenoiseFn:
    """Wraps a denoiser: x_0(null) + scale (x_0(label) - x_0(null)) as the new x_0.

    Classifier-free guidance, for a network that was trained with labels and with hidden
    labels. Combining x_0 is the same as combining eps or v; scale is 1 + w of Ho &
    Salimans 2022, eq. 6, so that 1 is the prediction with the label and 0 the one
    without. Both are made in one call, as neighboring rows of a batch of twice the
    size. The variance is that of the prediction with the label.

    Args:
        denoise_fn: takes the label by keyword, denoise_fn(x_t, t, label=...), or any
            other conditioning by its names.
        label: int [b], the wanted labels; or the wanted conditioning by name, such as
            {"text": ...}: pytrees of arrays [b, ...].
        null_label: the label that means hidden, one or [b], see `drop_labels`; or by
            the same names the conditioning that means none, whose arrays broadcast
            against the others.
        scale: one number, one for each image [b], or a function of t, see `within`.
        rescale: in [0, 1]: how far x_0 is rescaled to the standard deviation, image by
            image, of the prediction with the label (Lin et al. 2023, eq. 15 and 16).

    Returns:
        A denoiser that takes no label, nor what else is given here.

    Raises:
        ValueError: if an argument has another type or shape, or is out of range; in a
            call, if conditioning, scale and x_t do not fit each other.

    >>> def denoise_fn(x_t, t, *, label):
    ...     return diffusion.Prediction(0 * x_t + label[:, None], jnp.zeros(()))
    >>> label, null_label = jnp.array([1, 2]), 0
    >>> guided = classifier_free(denoise_fn, label, null_label, scale=3.0)
    >>> guided(jnp.zeros((2, 1)), jnp.array([5, 5])).x_0.tolist()
    [[3.0], [6.0]]
    """
    wanted, null = conditions_by_name(label, null_label)
    names = ", ".join(f"{name}=" for name in wanted)
    checks.function("denoise_fn", denoise_fn, f"(x_t, t, {names})")
    check_scale(scale, schedule=diffusion.schedule_of(denoise_fn))
    checks.number("rescale", rescale, at_least=0, at_most=1)

    def guided(x_t, t, **conditioning):
        checks.data("x_t", x_t, ("b", ...))
        checks.array("t", t, "int", x_t.shape[:1])
        check_conditions(wanted, conditioning, x_t)
        b = x_t.shape[0]

        def pairs(a, other):  # [b, ...] twice -> neighboring rows [2 b, ...]
            both = [placement.beside(row, x_t) for row in (a, other)]
            return placement.reshape(jnp.stack(both, 1), (2 * b, *a.shape[1:]))

        def repeated(a):
            layout = placement.of_batch(x_t, np.ndim(a))
            return jnp.repeat(placement.beside(a, x_t), 2, axis=0, out_sharding=layout)

        def twice(tree):  # numbers for the whole batch stay as they are
            return jax.tree.map(lambda a: repeated(a) if np.ndim(a) else a, tree)

        def split(a):  # the inverse of `pairs`
            a = placement.reshape(a, (b, 2, *a.shape[1:]))
            return a[:, 0], a[:, 1]

        x_t_twice = twice(x_t)
        both = jax.tree.map(pairs, wanted, null) | twice(conditioning)
        signatures.takes("denoise_fn", denoise_fn, "x_t", "t", **both)
        prediction = denoise_fn(x_t_twice, twice(t), **both)
        diffusion.check_prediction(prediction, x_t_twice)
        labeled, plain = split(prediction.x_0)
        x_0 = plain + column(scale, t, x_t.ndim) * (labeled - plain)
        x_0 = rescaled(x_0, labeled, rescale)
        log_var = prediction.log_var
        if np.ndim(log_var) == x_t.ndim:
            log_var = jnp.broadcast_to(log_var, (2 * b, *log_var.shape[1:]))
            log_var = split(log_var)[0]
        elif np.ndim(log_var):  # it has no axis of images
            axes = (1,) * (x_t.ndim - np.ndim(log_var))
            log_var = jnp.reshape(log_var, (*axes, *np.shape(log_var)))
        grad = None if prediction.grad is None else split(prediction.grad)[0]
        return prediction._replace(x_0=x_0, log_var=log_var, grad=grad)

    return diffusion.with_schedule(guided, denoise_fn)


def conditions_by_name(label, null_label):
    """Returns `label` and `null_label` by name, as arrays of the same shapes.

    Raises:
        ValueError: unless these are labels, or conditioning of the same names.
    """
    if not isinstance(label, Mapping):
        checks.array("label", label, "int", ("b",))
        if np.ndim(null_label):
            checks.array("null_label", null_label, "int", label.shape)
        elif checks.known(null_label):
            checks.integer("null_label", np.asarray(null_label).item())
        label, null_label = {"label": label}, {"label": null_label}
    label = dict(label)
    for name, tree in label.items():
        for leaf in jax.tree.leaves(tree):
            checks.array(f"label's {name}", leaf, "any", ("b", ...))
    null_label = dict(null_label) if isinstance(null_label, Mapping) else null_label
    if jax.tree.structure(label) != jax.tree.structure(null_label):
        rule = "null_label must have the names and pytrees of label"
        raise ValueError(f"{rule}, got {checks.shown(null_label)}.")

    def fitted(leaf, null):
        checks.broadcasts("null_label", null, leaf.shape)
        check_null(leaf.dtype, null)
        return jnp.broadcast_to(jnp.asarray(null, leaf.dtype), leaf.shape)

    return label, jax.tree.map(fitted, label, null_label)


def check_null(dtype: Any, null: Any) -> None:
    """Raises ValueError unless `null`, no condition, keeps its values in a `dtype`."""
    is_bool = jnp.issubdtype(dtype, jnp.bool_)
    if not (is_bool or jnp.issubdtype(dtype, jnp.integer)) or not checks.known(null):
        return
    given = np.asarray(null, np.float64)
    low, high = 0, 1
    if not is_bool:
        low, high = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
    wrong = given[~((given == np.round(given)) & (given >= low) & (given <= high))]
    if wrong.size:
        rule = f"null_label must be of the type of the label, {np.dtype(dtype)}"
        raise ValueError(f"{rule}, got {wrong.flat[0]:g}.")


def check_conditions(wanted, others, x_t):
    """Checks that conditions fit the batch x_t, and are not given twice.

    Raises:
        ValueError: unless all that is `wanted` has an axis [b], and no name is one of
            `others` too.
    """
    for name, tree in wanted.items():
        if name in others:
            rule = f"{name} must be given once, to classifier_free or to its result"
            raise ValueError(f"{rule}, got both.")
        for leaf in jax.tree.leaves(tree):
            kind = "int" if jnp.issubdtype(leaf.dtype, jnp.signedinteger) else "any"
            checks.array(name, leaf, kind, (*x_t.shape[:1], *leaf.shape[1:]))


def drop_labels(
    key: Key[Array, ""],
    label: Int[Array, "b"],
    null_label: int,
    share: float | Float[Array, ""],
) -> Int[Array, "b"]:
    """Replaces each label by `null_label`, independently with probability `share`.

    Ho & Salimans 2022, algorithm 1, whose p_uncond is the share.

    Args:
        key: says which ones.
        label: int [b].
        null_label: the label that means hidden.
        share: in [0, 1].

    Returns:
        Labels [b].

    Raises:
        ValueError: unless label is int [b], and share in [0, 1].

    >>> drop_labels(jax.random.key(0), jnp.array([3, 5, 2]), null_label=10, share=1.0)
    Array([10, 10, 10], dtype=int32)
    """
    checks.array("label", label, "int", ("b",))
    if isinstance(null_label, jax.Array):
        checks.array("null_label", null_label, "int", ())
    else:
        checks.integer("null_label", null_label)
    return drop(key, {"label": label}, {"label": null_label}, share)["label"]


def drop(
    key: Key[Array, ""],
    cond: Mapping[str, Array],
    null: Mapping[str, Any],
    share: float | Float[Array, ""],
) -> dict[str, Array]:
    """Replaces all conditioning of an image by `null`, with probability `share`.

    `drop_labels` (Ho & Salimans 2022, algorithm 1) for arrays of any name and shape.

    Args:
        key: says which images.
        cond: conditioning by name, arrays [b, ...]; what `null` does not name stays.
        null: by some of these names what means none; it broadcasts against [b, ...].
        share: in [0, 1].

    Returns:
        Arrays as in `cond`.

    Raises:
        ValueError: unless these are arrays with one b, and share is in [0, 1].

    >>> told = {"label": jnp.array([3, 5]), "cond": jnp.ones((2, 1))}
    >>> drop(jax.random.key(0), told, {"label": 10, "cond": 0.0}, share=1.0)["label"]
    Array([10, 10], dtype=int32)
    """
    checks.key("key", key)
    checks.number("share", share, at_least=0, at_most=1)
    b: Any = "b"
    for name in null:
        checks.array(f"cond's {name}", cond.get(name), "any", (b, ...))
        b = cond[name].shape[0]
    hidden = jax.random.bernoulli(key, jnp.float32(share), (b if null else 0,))

    def replaced(name, value):
        axes = tuple(range(1, np.ndim(value)))
        mask = jnp.expand_dims(hidden, axes)
        return jnp.where(mask, null[name], value).astype(value.dtype)

    return {**cond, **{name: replaced(name, cond[name]) for name in null}}
