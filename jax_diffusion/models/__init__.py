"""The networks, by name in `MODELS`, and what the trainer asks of a network.

A network never sees a noise schedule: it maps noisy images and timesteps to its output.
Any `flax.linen.Module` that keeps the following protocol can be trained and sampled,
and any other network that `from_functions` gives its form: of Flax NNX, Equinox, Haiku
or plain JAX. A config names what makes one as "package.module:MyNetwork".

The call is `(x, timesteps, [label], *, [low_res=], [...], train=False)`; the first
three are given by position:

    x          float32 [b, h, w, c], noisy images, or data of any other rank
    timesteps  float32 [b], one number for each image: how noisy it is
    label      int32 [b] in [0, num_classes), if the network has `num_classes`
    low_res    float32 [b, h_low, w_low, c], the same images at a lower resolution, if
               the network has `low_res`
    ...        any other array [b, ...] of the batch, by its name
    train      whether dropout is on; its random key is `rngs={"dropout": key}`

A denoiser returns float32 [b, h, w, out_channels], a classifier of noisy images float32
[b, num_labels], whatever dtype the network computes in. All variables are float32
parameters, the collection "params". No image depends on the others of its batch.

These fields of the module say what it takes and returns:

    out_channels  given to every denoiser by the config: c, or 2 c if the objective
                  learns the variance as well
    num_classes   number of labels that the network takes, including the null label of
                  classifier-free guidance; None or no such field: it takes no label
    low_res       whether the network takes `low_res`; no such field: it does not
    num_labels    number of labels that a classifier tells apart. This field makes it a
                  classifier: it is trained without an objective and cannot be sampled

`traits` reads the last three, and nothing else does. A test checks all of this for
every row of `MODELS` (tests/models/test_model_protocol.py).
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jax_diffusion.models.annotated import AnnotatedUNet
from jax_diffusion.models.dit import DiT
from jax_diffusion.models.functions import FunctionNetwork, from_functions
from jax_diffusion.models.lucidrains import LucidrainsUNet
from jax_diffusion.models.noisy_classifier import NoisyClassifier
from jax_diffusion.models.unet import UNet

__all__ = [
    "MODELS",
    "AnnotatedUNet",
    "DiT",
    "FunctionNetwork",
    "LucidrainsUNet",
    "Network",
    "NoisyClassifier",
    "Traits",
    "UNet",
    "bind",
    "example_inputs",
    "from_functions",
    "init_params",
    "num_classes",
    "traits",
]


@runtime_checkable
class Network(Protocol):
    """The type of a network; the docstring of this package states the whole protocol.

    Every `flax.linen.Module` has `init` and `apply`: only `__call__` is left to write.
    """

    def init(self, rngs: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns {"params": ...}, given a random key and the inputs of a call."""
        ...

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of a call, given {"params": ...} and its inputs."""
        ...


MODELS: dict[str, Callable[..., Network]] = {
    "unet": UNet,
    "annotated": AnnotatedUNet,
    "lucidrains": LucidrainsUNet,
    "dit": DiT,
    "noisy_classifier": NoisyClassifier,
    "encoder": NoisyClassifier,  # the old name, still in configs and checkpoints
}


class Traits(NamedTuple):
    """What a network takes besides images and timesteps, and whether it classifies.

    Attributes:
        num_classes: number of labels that the network takes; None if it takes no label.
        num_labels: number of labels that a classifier tells apart; None for a denoiser.
        low_res: whether the network takes low-resolution images (super-resolution).
    """

    num_classes: int | None = None
    num_labels: int | None = None
    low_res: bool = False


def traits(model: Any) -> Traits:
    """Returns the traits of a network, or the default traits of a class of networks.

    Args:
        model: a network, or what makes one, such as a row of `MODELS`. In a class, a
            field without a default counts as 0. Any other function counts as one that
            makes a denoiser without labels.

    >>> traits(UNet(num_classes=10))
    Traits(num_classes=10, num_labels=None, low_res=False)
    >>> traits(MODELS["noisy_classifier"]).num_labels is None
    False
    """
    required = []
    if inspect.isclass(model) and dataclasses.is_dataclass(model):
        missing = dataclasses.MISSING
        required = [
            field.name
            for field in dataclasses.fields(model)
            if field.default is missing and field.default_factory is missing
        ]
    found = {
        name: getattr(model, name, 0 if name in required else default)
        for name, default in Traits._field_defaults.items()
    }
    return Traits(found["num_classes"], found["num_labels"], bool(found["low_res"]))


def num_classes(model: Any) -> int | None:
    """Returns the number of labels that a network takes; None if it takes no label."""
    return traits(model).num_classes


def example_inputs(model: Any, image_shape: Sequence[int]) -> dict[str, Array]:
    """Returns zeros of the shapes that a network takes, by name, for `model.init`.

    Args:
        model: the network.
        image_shape: shape of one image, (h, w, c).

    Returns:
        "x" [1, h, w, c], "timesteps" [1], and "label" [1] and "low_res" [1, h, w, c] if
        the network takes them.

    >>> {name: a.shape for name, a in example_inputs(UNet(), (8, 8, 3)).items()}
    {'x': (1, 8, 8, 3), 'timesteps': (1,)}
    """
    known = traits(model)
    inputs = {"x": jnp.zeros((1, *image_shape)), "timesteps": jnp.zeros(1)}
    if known.num_classes is not None:
        inputs["label"] = jnp.zeros(1, jnp.int32)
    if known.low_res:
        inputs["low_res"] = jnp.zeros((1, *image_shape))
    return inputs


def init_params(
    model: Any, key: Array, image_shape: Sequence[int], **cond: Array
) -> PyTree:
    """Returns random parameters of a network.

    Images, timesteps and labels are given by position, as in every call: a network may
    name them as it likes.

    Args:
        model: the network.
        key: a random key.
        image_shape: shape of one image, (h, w, c).
        cond: what else the network is called with, arrays [b, ...], any b.

    Raises:
        ValueError: if the network has other variables, which training would not change.
    """
    inputs = example_inputs(model, image_shape)
    named = {k: inputs.pop(k) for k in ("low_res",) if k in inputs}
    named |= {name: value[:1] for name, value in cond.items()}
    variables = model.init(key, *inputs.values(), **named)
    if others := sorted(variables.keys() - {"params"}):
        rule = "model must be a network without variables besides its parameters"
        raise ValueError(f"{rule}, got one with {', '.join(others)}.")
    return variables.get("params", {})


def bind(model: Any, params: PyTree, label: Any, **options: Any) -> Callable[..., Any]:
    """Returns model_fn(x_t, timesteps): the network, all its other arguments bound.

    Args:
        model: the network.
        params: the parameters of the network.
        label: int32 [b]; ignored if the network takes no label.
        options: further arguments of `model.apply`: `low_res`, `train`, `rngs`, and
            other conditioning by its name.
    """
    labels = () if num_classes(model) is None else (label,)

    def model_fn(x_t, timesteps):
        return model.apply({"params": params}, x_t, timesteps, *labels, **options)

    return model_fn
