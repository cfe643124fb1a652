"""Runs of tiny random networks, as conversion leaves them, and images of noise."""

import functools
import json

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_diffusion import config as configs
from jax_diffusion.models import example_inputs
from jax_diffusion.runtime import checkpoint

T, SIZE = 8, 8
COSINE = dict(name="cosine", num_steps=T)
X_0 = dict(mean_type="x_0", var_type="learned_range", loss="hybrid")
UNET = dict(
    name="unet",
    channels=8,
    multipliers=(1,),
    num_res_blocks=0,
    attention_resolutions=(),
    num_groups=4,
)
ENCODER = UNET | dict(name="encoder", num_labels=3)
KNOWN = 4  # labels of the network; one more, the last, means hidden
LABELS = dict(model=UNET | dict(num_classes=KNOWN), label_dropout=0.1)


@functools.cache
def param_shapes(model, shape):
    inputs = example_inputs(model, shape)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)["params"])


def random_params(model, shape, scale=0.2):
    """Parameters of a network for images of a shape, nowhere zero: all of it matters.

    Args:
        model: the network.
        shape: (h, w, c).
        scale: standard deviation of the parameters.
    """
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(np.float32),
        param_shapes(model, tuple(shape)),
    )


def make_run(workdir, *, shape=(SIZE, SIZE, 3), scale=0.3, class_names=None, **changes):
    """A run as conversion leaves it, of a random network, nowhere zero."""
    source = dict(name="npz", path=str(workdir.parent / "images.npz"), batch_size=1)
    config = dict(data=source, schedule=COSINE, objective=X_0, model=UNET)
    config |= dict(ema_decays=(), label_dropout=0.0) | changes
    params = random_params(configs.build(config, shape[-1]).model, shape, scale)
    record = dict(config=json.loads(ConfigDict(config).to_json()), window=[])
    record |= dict(image_shape=list(shape), format=configs.FORMAT)
    if class_names is not None:
        record["class_names"] = class_names
    checkpoint.save_params(workdir, params, record)
    return workdir


def write_images(path, size=SIZE, channels=3, labels=(2, 0, 1, 3, 2, 1, 0)):
    rng = np.random.default_rng(1)
    labels = np.repeat(labels, 10)  # a tenth is for tests
    images = rng.integers(0, 256, (len(labels), size, size, channels), np.uint8)
    np.savez(path, images, labels)


def tiny_config(images, **changes):
    """A whole config of a training that takes a moment, on images of `write_images`."""
    config = dict(
        seed=0,
        data=dict(name="npz", path=str(images), batch_size=8),
        schedule=COSINE,
        objective=dict(mean_type="eps", var_type="fixed_small", loss="l2"),
        timesteps=dict(name="uniform"),
        model=dict(name="support.networks:Tiny"),
        optimizer=dict(lr=1e-2),
        ema_decays=(0.9,),
        ema_warmup=True,
        total_steps=2,
        log_every=1,
        save_every=1,
        sample_every=100,
        sampling=dict(sampler="ddim", steps=1, n=1),
    )
    for name, value in changes.items():
        group = config.get(name)
        config[name] = group | value if isinstance(group, dict) else value
    return configs.complete(config)
