"""What a denoiser predicts, and the types of denoisers: `Prediction`, `DenoiseFn`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array

from jax_diffusion import checks
from jax_diffusion.checks import signatures


class Prediction(NamedTuple):
    """What a denoiser predicts from x_t: the clean data, and a variance.

    eps, v, the score and the mean of p(x_{t-1} | x_t) follow from x_0 and are not
    stored, so that none of them can contradict another.

    Attributes:
        x_0: [b, ...] the estimate of the clean data, on the scale of the data.
        log_var: log variance of p(x_{t-1} | x_t), in nats; [b, ...] or a shape that
            broadcasts to it.
        grad: [b, ...] what guidance adds to the score of x_t; None, nothing.
    """

    x_0: Array
    log_var: Array
    grad: Any = None


@runtime_checkable
class DenoiseFn(Protocol):
    """A network read as a distribution: denoise_fn(x_t, t) -> Prediction.

    x_t is float32 [b, ...], t int32 [b]. `denoiser` makes one of a network; `clip_x_0`,
    `threshold_x_0` and the functions of `guidance` wrap one. Any function of that form
    is one.
    """

    def __call__(self, x_t: Array, t: Array, /) -> Prediction:
        """Predicts x_0 from x_t, which is at the noise levels of rows t."""
        ...


@runtime_checkable
class ConditionalDenoiseFn(Protocol):
    """A `DenoiseFn` that may also be given conditioning by name, such as `label`.

    Arrays that are given have a leading axis [b]; numbers are for all images.
    """

    def __call__(self, x_t: Array, t: Array, /, **conditioning: Any) -> Prediction:
        """Predicts x_0 from x_t and what is known of it."""
        ...


AnyDenoiseFn = TypeVar("AnyDenoiseFn", bound=Callable[..., Prediction])
"""What a wrapper takes and returns: a denoiser of x_t, t and the same conditioning."""


def check_denoise_fn(denoise_fn: Any) -> None:
    """Raises ValueError unless `denoise_fn` can be called with x_t and t."""
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    signatures.takes("denoise_fn", denoise_fn, "x_t", "t")


def check_prediction(
    prediction: Any, x_t: Array | None = None, name: str = "denoise_fn"
) -> None:
    """Raises ValueError unless `prediction` is one, as `x_t` [b, ...] if that is given.

    What a denoise_fn returns is checked by this wherever one is called: a raw network,
    passed in the place of one, returns an array. The sentence calls it `name`.
    """
    if not all(hasattr(prediction, field) for field in Prediction._fields):
        raise ValueError(
            f"{name} must return a Prediction, as diffusion.denoiser makes it of a "
            f"network's output, got {checks.shown(prediction)}."
        )
    shape = (...,) if x_t is None else x_t.shape
    checks.array(f"{name}'s x_0", prediction.x_0, "float", shape)
    checks.broadcasts(f"{name}'s log_var", prediction.log_var, prediction.x_0.shape)
    if prediction.grad is not None:
        checks.array(f"{name}'s grad", prediction.grad, "float", shape)
