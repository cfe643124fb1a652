"""Checks that the fields of a config fit the images, the network and each other."""

from collections.abc import Sequence
from typing import Any

import jax

from jax_diffusion import data
from jax_diffusion.models import Network, check_takes, traits
from jax_diffusion.models.unet import Trunk


def check_dtype(config: Any) -> None:
    """Raises ValueError for a dtype of a new run's network that JAX would not give it.

    Runs of older versions may have one.

    Args:
        config: its model.dtype is checked.
    """
    dtype = config.model.get("dtype")
    if str(dtype) == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "config.model.dtype must be of at most 32 bits unless JAX_ENABLE_X64 is "
            f"set, got {dtype!r}."
        )


def check_attention(config: Any, model: Network, image_shape: Sequence[int]) -> None:
    """Checks that a level of the U-Net has each resolution that shall have attention.

    Runs of older versions may have others, to no effect.

    Args:
        config: its group model is checked, as far as it gives the resolutions.
        model: the network.
        image_shape: (h, w, c).

    Raises:
        ValueError: for a resolution that no level has.
    """
    wanted = config.model.get("attention_resolutions", ())
    if not isinstance(model, Trunk):
        return
    height = image_shape[0] // getattr(model, "block_size", 1)
    heights = [height // 2**level for level in range(len(model.multipliers))]
    if not {*wanted} <= {*heights}:
        raise ValueError(
            f"config.model.attention_resolutions must be some of {heights}, the heights"
            f" in pixels of the network's levels, got {wanted}."
        )


def check_fit(
    config: Any,
    model: Network,
    batches: data.Batches,
    *,
    fresh: bool = True,
    old: bool = False,
) -> None:
    """Checks that the network takes these labels, conditioning and image sizes.

    Args:
        config: its label_dropout, low_res_size and microbatches are checked.
        model: the network, as `config.build` has built it.
        batches: the training images and their labels.
        fresh: whether the run begins now: then it has as many classes as the data name.
        old: whether it continues a run of version 0.1.

    Raises:
        ValueError: that names the field.
    """
    share, image_shape, known = config.label_dropout, batches.image_shape, traits(model)
    if share and not known.null:
        raise ValueError(
            "config.label_dropout must be 0 for a network that takes no labels, cond "
            f"or tokens, got {share}."
        )
    # `config.build` has added the class of hidden labels.
    taken = known.num_classes and known.num_classes - bool(share)
    names = batches.class_names
    for name, count in (("num_classes", taken), ("num_labels", known.num_labels)):
        if count is None:
            continue
        field = f"config.model.{name}"
        # What version 0.1 took without labels goes on as it began.
        if not batches.labeled and count > 1 and not old:
            raise ValueError(
                f"training images must have labels for {field} = {count}, got images "
                f"without labels{f', all in {names[0]!r}' if names else ''}."
            )
        most = batches.num_classes
        if names and (most > count or (fresh and most < count)):
            raise ValueError(
                f"{field} must be {most}, as the data have classes "
                f"({data.in_words(names)}), got {count}."
            )
        if most > count:
            raise ValueError(f"labels must be below {field} = {count}, got {most - 1}.")
    check_takes(model, batches.conditioning, " of the training images")
    if batches.batch_size % config.microbatches:
        raise ValueError(
            f"config.microbatches must divide the batch of {batches.batch_size} images,"
            f" got {config.microbatches}."
        )
    size = config.low_res_size
    if bool(size) != known.low_res:
        raise ValueError(
            "config.low_res_size must be given for a model with low_res and for no "
            f"other, got {size}."
        )
    h, w, _ = image_shape
    if size and (size < 0 or h % size or w % (h // size)):
        raise ValueError(
            f"config.low_res_size must divide images {image_shape}, got {size}."
        )


def tell_unused(batches: data.Batches, num_classes: int | None) -> None:
    """Logs conditioning of the data that the network does not take, and labels of the
    network, `num_classes` of them, that the data do not have.
    """
    if batches.labeled and (num_classes or 0) > batches.num_classes:
        line = f"config.model.num_classes is {num_classes}: labels from "
        data.LOGGER.info("%s%s are never trained", line, batches.num_classes)
    for name, field in (("cond", "cond_dim"), ("tokens", "token_dim")):
        if name in batches.examples.conditioning.keys() - batches.conditioning.keys():
            line = f"{name} of the data is not used: config.model.{field} is 0"
            data.LOGGER.info("%s", line)
