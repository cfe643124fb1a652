"""What a sampler is used for, by name in `TASKS`: pure functions of a `SamplingContext`.

Each returns frames, float32 [k, b, h, w, c] in [-1, 1]. But for `STRIPS`, the last one
is its result, and those before it are there to compare.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_diffusion import editing, samplers
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers import StepFn
from jax_diffusion.schedules import NoiseSchedule


class SamplingContext(NamedTuple):
    """Which images, and how they are drawn."""

    seed: Array  # of all images
    rows: Mapping[str, Array]  # "ids" and, where a task starts from it, "image"
    denoise_fn: DenoiseFn
    step_fn: StepFn
    schedule: NoiseSchedule
    image_shape: tuple[int, ...]

    def keys_of(self, ids: Array) -> Array:
        return samplers.image_keys(jax.random.key(self.seed), ids)

    @property
    def keys(self) -> Array:
        return self.keys_of(self.rows["ids"])

    def x_T(self, keys: Array) -> Array:
        return samplers.normal(keys, self.image_shape)

    @property
    def arguments(self) -> tuple[Array, DenoiseFn, StepFn, NoiseSchedule]:
        """The first ones of every function that samples."""
        return self.keys, self.denoise_fn, self.step_fn, self.schedule


class Options(NamedTuple):
    """What only some tasks ask for. Static."""

    num_frames: int = 1  # generate, sequence, progress; interpolate: images between
    level: int = 0  # the step to which noise is added, or down to which it is shared
    group: int = 8  # complete: so many images share their first steps
    mask: np.ndarray | None = None  # inpaint: 1 where an image is known
    block: int = 2  # enlarge: side of the blocks of pixels whose mean is known
    jump: int = 10  # inpaint, colourise, enlarge: see editing.repaint
    resamples: int = 1


def generate(job: SamplingContext, options: Options) -> Array:
    """Images, and the way to them."""
    return _frames(job, options).x


def progress(job: SamplingContext, options: Options) -> Array:
    """What x_0 was predicted to be on the way (Ho et al. 2020, figure 6)."""
    return _frames(job, options).x_0


def _frames(job: SamplingContext, options: Options) -> samplers.SampleState:
    """As many frames as asked, or fewer: evenly spaced, none before the first step."""
    num_steps = job.schedule.num_steps
    size = -(-num_steps // options.num_frames)
    # Skipped steps in front make their number divisible.
    ts = jnp.pad(job.schedule.steps[::-1], (-num_steps % size, 0), constant_values=-1)
    return samplers.sample_frames(
        *job.arguments, job.x_T(job.keys), num_frames=len(ts) // size, ts=ts
    )


def complete(job: SamplingContext, options: Options) -> Array:
    """Groups of images that share x_T and all noise down to a level (Ho, figure 7)."""
    groups = job.keys_of(job.rows["ids"] // options.group)
    keys, denoise_fn, step_fn, schedule = job.arguments
    step_fn = samplers.share_noise(step_fn, groups, until=options.level)
    x_T = job.x_T(groups)
    return samplers.sample(keys, denoise_fn, step_fn, schedule, x_T)[None]


def inpaint(job: SamplingContext, options: Options) -> Array:
    """The image, what is known of it, and that completed."""
    mask = jnp.asarray(options.mask, jnp.float32)
    return _known(job, options, mask, lambda x: jnp.broadcast_to(mask, x.shape) * x)


def colourise(job: SamplingContext, options: Options) -> Array:
    """The image, its grey, and that in colours."""
    return _known(job, options, editing.grey, editing.grey)


def enlarge(job: SamplingContext, options: Options) -> Array:
    """The image, its blocks of pixels, and those with details."""
    blocks = functools.partial(editing.block_mean, size=options.block)
    return _known(job, options, blocks, blocks)


def _known(job: SamplingContext, options: Options, mask: Any, show: Callable) -> Array:
    image = job.rows["image"]
    x = editing.repaint(
        *job.arguments,
        job.x_T(job.keys),
        image,
        mask,
        jump=options.jump,
        resamples=options.resamples,
    )
    return jnp.stack([image, show(image), x])


def edit(job: SamplingContext, options: Options) -> Array:
    """The image, and another made of it with noise up to a level."""
    image = job.rows["image"]
    return jnp.stack([image, editing.edit(*job.arguments, image, t=options.level)])


def reconstruct(job: SamplingContext, options: Options) -> Array:
    """The image, what DDIM finds for it at a level, and what DDIM makes of that."""
    image = job.rows["image"]
    keys, denoise_fn, _, schedule = job.arguments
    x_t, x = editing.reconstruct(keys, denoise_fn, schedule, image, t=options.level)
    return jnp.stack([image, x_t / 2, x])


def interpolate(job: SamplingContext, options: Options) -> Array:
    """The image, those between it and the next at a level of noise, and the next."""
    image, other = job.rows["image"], job.rows["other"]
    weights = jnp.linspace(0.0, 1.0, options.num_frames)
    between = samplers.interpolate(
        *job.arguments, image, other, weights, t=options.level
    )
    return jnp.concatenate([image[None], between, other[None]])


def slerp(job: SamplingContext, options: Options) -> Array:
    """Images whose x_T lie between that of the image and of the next."""
    next_keys = job.keys_of(job.rows["ids"] + 1)
    weights = jnp.linspace(0.0, 1.0, options.num_frames)
    x_T, y_T = job.x_T(job.keys), job.x_T(next_keys)
    return editing.between_noises(*job.arguments, x_T, y_T, weights)


TASKS: dict[str, Callable[[SamplingContext, Options], jax.Array]] = {
    "generate": generate,
    "sequence": generate,
    "progress": progress,
    "complete": complete,
    "inpaint": inpaint,
    "colourise": colourise,
    "enlarge": enlarge,
    "edit": edit,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "slerp": slerp,
}
FROM_IMAGES = (
    *("inpaint", "colourise", "enlarge", "edit", "reconstruct"),
    "interpolate",
)
STRIPS = ("sequence", "progress", "interpolate", "slerp")  # have no single result
