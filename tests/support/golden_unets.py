"""The official U-Nets of golden/unet: our networks of the same kind and their weights.

golden/unet/ holds small networks with random weights and what they compute, made by
improved_diffusion/unet.py of openai/improved-diffusion at 1bc7bbb, guided_diffusion/
unet.py of openai/guided-diffusion at 22e0df8, models/diffusion.py of ermongroup/ddim at
e8df66c and UNet2DModel of diffusers 0.42.1, in float32; noise_floor.json their rounding
error.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion.interop import layouts as weights
from jax_diffusion.models.unet import UNet

GOLDEN = Path(__file__).parents[1] / "golden" / "unet"
NOISE_FLOOR = json.loads((GOLDEN / "noise_floor.json").read_text())

# What each official network is in our words.
ALL = dict(
    channels=32, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(8,)
)
HO = UNet(
    **ALL,
    scale_shift=False,
    embedding_order="sin_cos",
    embedding_endpoint=True,
    norm_epsilon=1e-6,
    down_padding="bottom_right",
)
GUIDED = UNet(**ALL, head_channels=16, out_channels=6, resample="resblock")
NETWORKS = {  # file / prefix of its results -> layout, network
    "improved_a": ("openai", UNet(**ALL, scale_shift=False)),
    "improved_b": (
        "openai",
        UNet(**ALL, num_heads=2, num_classes=7, out_channels=6),
    ),
    "ermongroup_e": ("ddpm", HO),
    "diffusers_d": ("diffusers", HO),
    "guided_c/legacy_order": ("openai", GUIDED),
    "guided_c/new_order": ("openai_new", GUIDED),
}


@functools.cache
def golden(network):
    """All arrays of a network; of guided_c the results of one order of qkv only."""
    file, _, order = network.partition("/")
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        part = f"{order}/" if order else "//"
        return {name.replace(part, ""): a for name, a in arrays.items()}


def floors(network):
    file, _, order = network.partition("/")
    found = NOISE_FLOOR[f"{file}.npz"].items()
    return {name.replace(f"{order}/" if order else "//", ""): f for name, f in found}


def heads_of(model):
    size = model.head_channels
    return lambda channels: channels // size if size else model.num_heads


@functools.cache
def leaves_of(network):
    layout, model = NETWORKS[network]
    shapes = param_shapes(model, (16, 16, 3))
    return weights.leaves(shapes, layout, heads_of(model))


def golden_below(network, prefix):
    arrays = golden(network).items()
    return {k.removeprefix(prefix): v for k, v in arrays if k.startswith(prefix)}


def our_params(network):
    return weights.from_torch(golden_below(network, "params/"), leaves_of(network))


def param_shapes(model, image_shape):
    label = None if model.num_classes is None else jnp.zeros(1, jnp.int32)
    x, t = jnp.zeros((1, *image_shape)), jnp.zeros(1)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, label))["params"]
