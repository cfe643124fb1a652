"""What a sampler is used for, by name in `TASKS`: generate, inpaint, edit, slerp, ...

A task is a pure function task(context, options) -> frames, float32 [k, b, h, w, c] in
[-1, 1]. The last frame is its result and the others are there to compare, except where
its row says that all frames together are the result (`is_strip`).
"""

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_diffusion import checks, editing, samplers
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.registry import is_outside, lookup, outside
from jax_diffusion.samplers import StepFn
from jax_diffusion.schedules import NoiseSchedule

# Above these, memory or time would have no bound.
MOST = {"frames": 10_000, "resamples": 10_000, "group": 2**31 - 1}
RULE = "a Task or a function (context, options) -> frames"  # of a task from outside


class Task(NamedTuple):
    """A row of `TASKS`.

    Attributes:
        draw: the function (context, options) -> frames [k, b, h, w, c].
        from_images: whether it starts from given images.
        is_strip: whether all its frames are the result, and not only the last one.
        in_groups: whether neighboring images belong together, `TaskOptions.group` each.
        needs_noise: whether the sampler must draw noise in its steps.
        clips: whether the predicted x_0 may be clipped; what is clipped cannot be
            inverted.
        takes_next: whether it also reads the image after each one, as row "next".
        takes_mask: whether it reads `TaskOptions.mask`.
        channels: the number of channels that images must have; None for any.
        reads: the fields of `TaskOptions` that have an effect; None for all.
    """

    draw: Callable[..., jax.Array]
    from_images: bool = False
    is_strip: bool = False
    in_groups: bool = False
    needs_noise: bool = False
    clips: bool = True
    takes_next: bool = False
    takes_mask: bool = False
    channels: int | None = None
    reads: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TaskOptions:
    """What to draw, and from which images.

    Attributes:
        task: a key of `TASKS`, or "package.module:function".
        images: images to start from: an array uint8 [n, h, w, c], or PATH or NAME:PATH
            of a data set; by default the run's own data. They are taken in turn.
        split: which split of the images: "train", "test" or "all". By default "all" of
            images that are given, and "test" of the run's own data.
        level: noise level to which images are noised, or down to which noise is shared,
            as a share of the steps, in [0, 1].
        frames: number of frames of a strip (default 10), or of `generate` (default 1).
        group: `complete`: number of images that share their first steps.
        mask: `inpaint`: which pixels are known: "left", "right", "top", "bottom", a
            picture file whose white pixels are known, or an array of bool or of 0 and
            1; see `masks.read_mask`.
        block: `enlarge`: upscaling factor.
        resamples: `inpaint`, `colorize`, `enlarge`: how often unknown pixels are drawn,
            as RePaint does; 1 for plain replacement.
        jump: number of steps that are resampled together.
        low_res: small images for a network with low_res to enlarge: an array [n, h, w,
            c], uint8 or float32 in [-1, 1], or PATH or NAME:PATH of images, all of
            which are taken at the size that they have.

    Raises:
        ValueError: for a value that is out of range, and for a field that the task does
            not read; it begins with the field's name.
    """

    task: str = "generate"
    images: str | os.PathLike | np.ndarray | None = None
    split: str | None = None
    level: float = 0.5
    frames: int | None = None
    group: int = 8
    mask: str | os.PathLike | np.ndarray = "top"
    block: int = 2
    resamples: int = 1
    jump: int = 10
    low_res: str | os.PathLike | np.ndarray | None = None

    def __post_init__(self):
        for name in ("group", "block", "resamples", "jump", "frames"):
            value = getattr(self, name)
            if value is not None or name != "frames":
                checks.integer(name, value, at_least=1, at_most=MOST.get(name))
        for name in ("images", "low_res"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, np.ndarray | jax.Array):
                rule = "an array [n, h, w, c], PATH or NAME:PATH"
                checks.path(name, value, rule)
        if isinstance(self.images, np.ndarray | jax.Array) and self.split:
            if self.split != "all":
                raise ValueError(
                    "split must be 'all' or None for images that are an array, got "
                    f"{checks.shown(self.split)}."
                )
        is_number = isinstance(self.level, Real) and not isinstance(self.level, bool)
        if not is_number or not 0 <= self.level <= 1:
            got = checks.shown(self.level)
            raise ValueError(f"level must be in [0, 1], got {got}.")
        if self.images is not None and not self.row.from_images:
            names = [name for name, row in TASKS.items() if row.from_images]
            raise ValueError(f"images must be for {names}, got task {self.task!r}.")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in defaults}
        plain = str | Real | None  # unlike arrays and paths, these may be the default
        self.check_read(
            name
            for name, value in values.items()
            if not isinstance(value, plain) or value != defaults[name]
        )

    def check_read(self, names: Iterable[str]) -> None:
        """Raises ValueError for a field that the task does not read."""
        reads = self.row.reads
        for name in names:
            if reads is not None and name not in ("task", "low_res", *reads):
                users = [k for k, row in TASKS.items() if name in (row.reads or ())]
                raise ValueError(
                    f"{name} is for the tasks {users}, got task {self.task!r}."
                )
            if name == "jump" and self.resamples == 1:
                raise ValueError("jump needs resamples >= 2, got 1.")

    @property
    def row(self) -> Task:
        """The task's row; a bare function of a user is a task without images."""
        row = lookup("task", OLD_TASKS.get(self.task, self.task), TASKS)
        return own_task(self.task, row) if is_outside(self.task) else row

    @property
    def split_of_images(self) -> str:
        """The split that is asked for, or the default one."""
        return self.split or ("test" if self.images is None else "all")

    @property
    def num_frames(self) -> int:
        """The number of frames that is asked for, or the task's default."""
        return self.frames or (10 if self.row.is_strip else 1)


def own_task(name: str, found: Any) -> Task:
    """Makes a row of a task from outside, whose frames are checked.

    Args:
        name: "package.module:attribute".
        found: what it names: a `Task`, or a function (context, options) -> frames.

    Raises:
        ValueError: if it is neither; `draw` of the row raises it for anything that the
            function raises, and unless it returns frames.
    """
    row = found if isinstance(found, Task) else Task(found)
    told = functools.partial(outside, "task", name, RULE)
    with told():
        checks.function("draw", row.draw, "(context, options)")
        with contextlib.suppress(ValueError):  # compiled ones need not tell
            inspect.signature(row.draw).bind("context", "options")

    @told()
    def draw(context: SamplingContext, options: TaskOptions) -> jax.Array:
        frames = row.draw(context, options)
        shape = (len(context.rows["ids"]), *context.image_shape)
        is_float = jnp.issubdtype(getattr(frames, "dtype", bool), jnp.floating)
        if not is_float or frames.shape[1:] != shape or not frames.shape[0]:
            rule = f"it must return frames, float [k, {', '.join(map(str, shape))}]"
            raise ValueError(f"{rule}, got {checks.shown(frames)}.")
        return frames

    return row._replace(draw=draw)


class SamplingContext(NamedTuple):
    """Which images are drawn, and how.

    Attributes:
        seed: the seed of all images, uint32 [].
        rows: "ids" int32 [b] and, for tasks from images, "image" (and "next") float32
            [b, h, w, c].
        denoise_fn: the denoiser, labeled and guided.
        step_fn: the sampler's step.
        schedule: its rows may be padded.
        image_shape: (h, w, c).
        num_steps: number of steps; static.
        mask: `inpaint`: 1 where pixels are known, [h, w, 1]; static.
    """

    seed: Array
    rows: Mapping[str, Array]
    denoise_fn: DenoiseFn
    step_fn: StepFn
    schedule: NoiseSchedule
    image_shape: tuple[int, ...]
    num_steps: int
    mask: np.ndarray | None = None

    def keys_of(self, ids: Array) -> Array:
        """The keys of images by number, [b]."""
        return samplers.image_keys(jax.random.key(self.seed), ids)

    @property
    def keys(self) -> Array:
        """The keys of the images of this batch, [b]."""
        return self.keys_of(self.rows["ids"])

    def x_T(self, keys: Array) -> Array:
        """The noise that sampling starts from, [b, h, w, c]."""
        return samplers.pure_noise(keys, self.schedule, self.image_shape)

    def step_at(self, level: float) -> int:
        """The step of a noise level, which is a share of the steps."""
        return max(round(level * self.num_steps) - 1, 0)

    @property
    def arguments(self) -> tuple[Array, DenoiseFn, StepFn, NoiseSchedule]:
        """The first arguments of every function that samples."""
        return self.keys, self.denoise_fn, self.step_fn, self.schedule


def generate(context: SamplingContext, options: TaskOptions) -> Array:
    """Draws images; its frames are x_t on the way to them."""
    return _frames(context, options).x


def progress(context: SamplingContext, options: TaskOptions) -> Array:
    """Shows the predicted x_0 on the way to an image (Ho et al. 2020, figure 6)."""
    return _frames(context, options).x_0


def _frames(
    context: SamplingContext, options: TaskOptions
) -> samplers.SampleState | samplers.MultistepState:
    """Draws images; keeps evenly spaced states, at most as many as asked for."""
    num_rows = context.schedule.num_steps
    size = -(-num_rows // min(options.num_frames, context.num_steps))
    # Skipped steps in front make their number divisible.
    ts = jnp.pad(
        context.schedule.steps[::-1], (-num_rows % size, 0), constant_values=-1
    )
    return samplers.sample_frames(
        *context.arguments,
        context.x_T(context.keys),
        num_frames=len(ts) // size,
        ts=ts,
    )


def complete(context: SamplingContext, options: TaskOptions) -> Array:
    """Draws groups that share x_T and all noise down to a level (Ho, figure 7)."""
    groups = context.keys_of(context.rows["ids"] // options.group)
    keys, denoise_fn, step_fn, schedule = context.arguments
    until = context.step_at(options.level)
    step_fn = samplers.share_noise(step_fn, groups, until=until)
    x_T = context.x_T(groups)
    return samplers.sample(keys, denoise_fn, step_fn, schedule, x_T)[None]


def inpaint(context: SamplingContext, options: TaskOptions) -> Array:
    """Completes images. Frames: the image, its known pixels, the result."""
    mask = jnp.asarray(context.mask, jnp.float32)
    return _repaint(
        context, options, mask, lambda x: jnp.broadcast_to(mask, x.shape) * x
    )


def colorize(context: SamplingContext, options: TaskOptions) -> Array:
    """Gives gray images colors. Frames: the image, its gray, the result."""
    return _repaint(context, options, editing.gray, editing.gray)


def enlarge(context: SamplingContext, options: TaskOptions) -> Array:
    """Gives blocks of pixels details. Frames: the image, its blocks, the result."""
    height, width = context.image_shape[:2]
    if height % options.block or width % options.block:
        sides = f"{height} x {width}"
        raise ValueError(f"block must divide {sides}, got {options.block}.")
    blocks = functools.partial(editing.block_mean, size=options.block)
    return _repaint(context, options, blocks, blocks)


def _repaint(
    context: SamplingContext, options: TaskOptions, mask: Any, show: Callable
) -> Array:
    image = context.rows["image"]
    x = editing.repaint(
        *context.arguments,
        context.x_T(context.keys),
        image,
        mask,
        jump=options.jump,
        resamples=options.resamples,
    )
    return jnp.stack([image, show(image), x])


def edit(context: SamplingContext, options: TaskOptions) -> Array:
    """Noises images to a level and denoises them (SDEdit). Frames: image, result."""
    image, t = context.rows["image"], context.step_at(options.level)
    return jnp.stack([image, editing.edit(*context.arguments, image, t=t)])


def reconstruct(context: SamplingContext, options: TaskOptions) -> Array:
    """Inverts DDIM to a level and back.

    Frames: the image, the noise it is inverted to (divided by twice its scale), the
    result.
    """
    image, t = context.rows["image"], context.step_at(options.level)
    keys, denoise_fn, _, schedule = context.arguments
    x_t, x = editing.reconstruct(keys, denoise_fn, schedule, image, t=t)
    spread = 2 * jnp.maximum(schedule.now.noise[t], 1.0)
    return jnp.stack([image, x_t / spread, x])


def interpolate(context: SamplingContext, options: TaskOptions) -> Array:
    """Mixes each image with the next one at a noise level (Ho, figure 8).

    Frames: the image, those between the two, the next image.
    """
    image, other = context.rows["image"], context.rows["next"]
    weights = jnp.linspace(0.0, 1.0, options.num_frames)
    t = context.step_at(options.level)
    between = samplers.interpolate(*context.arguments, image, other, weights, t=t)
    return jnp.concatenate([image[None], between, other[None]])


def slerp(context: SamplingContext, options: TaskOptions) -> Array:
    """Draws images whose x_T lie between that of an image and of the next one."""
    next_keys = context.keys_of(context.rows["ids"] + 1)
    weights = jnp.linspace(0.0, 1.0, options.num_frames)
    x_T, y_T = context.x_T(context.keys), context.x_T(next_keys)
    return editing.between_noises(*context.arguments, x_T, y_T, weights)


_IMAGES = ("images", "split")
_REPAINT = (*_IMAGES, "resamples", "jump")
TASKS: dict[str, Task] = {
    "generate": Task(generate, reads=("frames",)),
    "sequence": Task(generate, is_strip=True, reads=("frames",)),
    "progress": Task(progress, is_strip=True, reads=("frames",)),
    "complete": Task(
        complete, in_groups=True, needs_noise=True, reads=("level", "group")
    ),
    "inpaint": Task(
        inpaint, from_images=True, takes_mask=True, reads=(*_REPAINT, "mask")
    ),
    "colorize": Task(colorize, from_images=True, channels=3, reads=_REPAINT),
    "enlarge": Task(enlarge, from_images=True, reads=(*_REPAINT, "block")),
    "edit": Task(edit, from_images=True, reads=(*_IMAGES, "level")),
    "reconstruct": Task(
        reconstruct, from_images=True, clips=False, reads=(*_IMAGES, "level")
    ),
    "interpolate": Task(
        interpolate,
        from_images=True,
        is_strip=True,
        takes_next=True,
        reads=(*_IMAGES, "level", "frames"),
    ),
    "slerp": Task(slerp, is_strip=True, reads=("frames",)),
}
OLD_TASKS = {"colourise": "colorize"}  # names until version 0.1
