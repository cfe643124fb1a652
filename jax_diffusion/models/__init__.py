"""The networks, by name in `MODELS`, and what the trainer asks of a network.

A network never sees a noise schedule: it maps noisy images and timesteps to its output.
Any `flax.linen.Module` that keeps the following protocol can be trained and sampled,
and any other network that `from_functions` gives its form: of Flax NNX, Equinox, Haiku
or plain JAX. A config names what makes one as "package.module:MyNetwork".

The call is `(x, timesteps, [label], *, [low_res=], [cond=], [...], train=False)`; the
first three are given by position:

    x          float32 [b, h, w, c], noisy images, or data of any other rank
    timesteps  float32 [b], one number for each image: how noisy it is. In a chain of
               betas the step, 0 to T - 1 (or to 1000); in a flow 1000 s, s in [0, 1];
               in EDM log(sigma) / 4; elsewhere the log-SNR
    label      int32 [b] in [0, num_classes), if the network has `num_classes`
    low_res    float32 [b, h_low, w_low, c], the same images at a lower resolution, if
               the network has `low_res`
    cond       float32 [b, cond_dim], vectors that say what is wanted, if the network
               has `cond_dim`; zeros mean none, for classifier-free guidance
    tokens     float32 [b, n, token_dim], sequences of vectors that say it, if the
               network has `token_dim`; with it comes tokens_mask, bool [b, n], the
               tokens that count; none of them means none
    ...        any other array [b, ...] of the batch, by its name
    train      whether dropout is on; its random key is `rngs={"dropout": key}`

A denoiser returns float32 [b, h, w, out_channels], a classifier of noisy images float32
[b, num_labels], whatever dtype the network computes in. All variables are float32
parameters, the collection "params". No image depends on the others of its batch.

These fields of the module say what it takes, and what it returns:

    out_channels  given to every denoiser by the config: c, or 2 c if the objective
                  learns the variance as well
    num_classes   number of labels that the network takes, including the null label of
                  classifier-free guidance (`config.model.num_classes` is without it);
                  None or no such field: it takes no label
    low_res       whether the network takes `low_res`; no such field: it does not
    cond_dim      length of `cond`; 0 or no such field: it takes none
    token_dim     length of each of the `tokens`; 0 or no such field: it takes none
    num_labels    number of labels that a classifier tells apart. This field makes it a
                  classifier: it is trained without an objective and cannot be sampled

`traits` reads all but the first, and nothing else does. A test checks all of this for
every row of `MODELS` (tests/models/test_model_protocol.py).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
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
    "annotated",
    "attention",
    "bind",
    "check_takes",
    "cpu_convs",
    "dit",
    "dropout",
    "example_inputs",
    "feature_cnn",
    "folding",
    "from_functions",
    "functions",
    "inception",
    "init_params",
    "inputs",
    "layers",
    "lucidrains",
    "noisy_classifier",
    "num_classes",
    "resampling",
    "torch_layers",
    "traits",
    "unet",
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
        cond_dim: length of the vectors `cond` that it takes; 0 for none.
        token_dim: length of the `tokens` that it takes; 0 for none.
    """

    num_classes: int | None = None
    num_labels: int | None = None
    low_res: bool = False
    cond_dim: int = 0
    token_dim: int = 0

    @property
    def null(self) -> dict[str, Any]:
        """What means no conditioning, by name; the last label means none.

        >>> Traits(num_classes=11, cond_dim=3).null
        {'label': 10, 'cond': 0.0}
        """
        null: dict[str, Any] = {}
        if self.num_classes is not None:
            null["label"] = self.num_classes - 1
        null |= {"cond": 0.0} if self.cond_dim else {}
        return null | ({"tokens": 0.0, "tokens_mask": False} if self.token_dim else {})


def traits(model: Any) -> Traits:
    """Returns the traits of a network, or the default traits of a class of networks.

    Args:
        model: a network, or what makes one, such as a row of `MODELS`. In a class, a
            field without a default counts as 0. Any other function counts as one that
            makes a denoiser without labels.

    >>> traits(UNet(num_classes=10))
    Traits(num_classes=10, num_labels=None, low_res=False, cond_dim=0, token_dim=0)
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
    sizes = {name: found[name] or 0 for name in ("cond_dim", "token_dim")}
    return Traits(**{**found, **sizes, "low_res": bool(found["low_res"])})


def num_classes(model: Any) -> int | None:
    """Returns the number of labels that a network takes; None if it takes no label."""
    return traits(model).num_classes


def example_inputs(model: Any, image_shape: Sequence[int]) -> dict[str, Array]:
    """Returns zeros of the shapes that a network takes, by name, for `model.init`.

    Args:
        model: the network.
        image_shape: shape of one image, (h, w, c).

    Returns:
        "x" [1, h, w, c], "timesteps" [1], and "label" [1], "low_res" [1, h, w, c],
        "cond" [1, cond_dim], "tokens" [1, 1, token_dim] and "tokens_mask" [1, 1] if the
        network takes them.

    >>> {name: a.shape for name, a in example_inputs(UNet(), (8, 8, 3)).items()}
    {'x': (1, 8, 8, 3), 'timesteps': (1,)}
    """
    known = traits(model)
    inputs = {"x": jnp.zeros((1, *image_shape)), "timesteps": jnp.zeros(1)}
    if known.num_classes is not None:
        inputs["label"] = jnp.zeros(1, jnp.int32)
    if known.low_res:
        inputs["low_res"] = jnp.zeros((1, *image_shape))
    if known.cond_dim:
        inputs["cond"] = jnp.zeros((1, known.cond_dim))
    if known.token_dim:
        inputs["tokens"] = jnp.zeros((1, 1, known.token_dim))
        inputs["tokens_mask"] = jnp.ones((1, 1), bool)
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
    given = [inputs.pop(k) for k in ("x", "timesteps", "label") if k in inputs]
    named = inputs | {name: value[:1] for name, value in cond.items()}
    variables = model.init(key, *given, **named)
    if others := sorted(variables.keys() - {"params"}):
        rule = "model must be a network without variables besides its parameters"
        raise ValueError(f"{rule}, got one with {', '.join(others)}.")
    return variables.get("params", {})


def check_takes(model: Any, arrays: Mapping[str, Any], of: str = "") -> None:
    """Checks that arrays have what a network takes, of the length that it takes.

    Args:
        model: the network.
        arrays: by name; only the lengths of "cond" [n, d] and "tokens" [n, k, d] count.
        of: whose they are, for errors, such as " of the training images".

    Raises:
        ValueError: if one is missing or of another length; it begins with its name.
    """
    known = traits(model)
    for name, axes, field in (
        ("cond", "n", "cond_dim"),
        ("tokens", "n, k", "token_dim"),
    ):
        size, array = getattr(known, field), arrays.get(name)
        if size and (array is None or array.shape[-1] != size):
            got = "None" if array is None else f"{[*array.shape]}"
            rule = f"{name}{of} must be [{axes}, {size}] for a network with"
            raise ValueError(f"{rule} {field} = {size}, got {got}.")


def bind(
    model: Any, params: PyTree, label: Any = None, **options: Any
) -> Callable[..., Any]:
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
