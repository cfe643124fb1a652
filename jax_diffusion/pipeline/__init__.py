"""A trained run as Python functions: load it, and draw from it.

    run = load_run("runs/digits")
    images = sample_images(run, n=64, sampler="ddim", steps=50)  # uint8 [64, 8, 8, 1]

Image i depends on the seed and on i alone, whatever the batch size and the devices.

    run      Run, load_run; open_images and open_split of its data
    options  SamplingOptions: solver, steps, clipping, labels, guidance
    inputs   labels, images to start from, a classifier; checked against the run
    masks    read_mask: which pixels of an image are known
    bound    BoundSampler: a compiled sampler with all that it draws with
    draw     make_sampler: the compiled function that draws a batch
"""

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion import data, export, schedules
from jax_diffusion.checks import shown
from jax_diffusion.models import example_inputs, traits
from jax_diffusion.pipeline.bound import BoundSampler
from jax_diffusion.pipeline.draw import check_churn, make_sampler, progress_bar
from jax_diffusion.pipeline.inputs import (
    Inputs,
    check_inputs,
    load_guides,
    load_other,
    read_inputs,
)
from jax_diffusion.pipeline.masks import read_mask
from jax_diffusion.pipeline.options import SamplingOptions, make_options
from jax_diffusion.pipeline.run import (
    Run,
    fit_labels,
    load_run,
    match_classes,
    open_images,
    open_split,
    with_conditioning,
    with_effect,
)
from jax_diffusion.pipeline.tasks import TaskOptions
from jax_diffusion.registry import is_outside
from jax_diffusion.samplers import SAMPLERS

__all__ = [
    "BoundSampler",
    "Run",
    "SamplingOptions",
    "TaskOptions",
    "bind_sampler",
    "bound",
    "draw",
    "export_sampler",
    "fit_labels",
    "inputs",
    "load_other",
    "load_run",
    "make_options",
    "make_sampler",
    "masks",
    "match_classes",
    "open_images",
    "open_split",
    "options",
    "read_inputs",
    "run",
    "sample_folder",
    "sample_images",
    "tasks",
    "with_conditioning",
    "with_effect",
]

LONG = 100  # steps, from which on a sampler has a progress bar of its own


def sample_images(
    run: Run,
    n: int | None = None,
    *,
    seed: int = 0,
    ids: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 256,
    upsample: Run | str | os.PathLike | None = None,
    options: SamplingOptions | None = None,
    **fields: Any,
) -> np.ndarray:
    """Draws images from a run.

    Args:
        run: as `load_run` returns it.
        n: number of images; by default 64, or as many as `cond` has rows.
        seed: decides all images, an integer >= 0.
        ids: numbers of the images, [n]; by default 0 to n - 1. An image depends on the
            seed and on its number only.
        batch_size: number of images that are drawn together.
        upsample: a run of a network with low_res, or its workdir, that enlarges what is
            drawn.
        options: how images are drawn; fields change some of it.
        fields: fields of `SamplingOptions` (sampler, steps, label, cond, ...) and
            of `tasks.TaskOptions` (task, images, mask, level, ...).

    Returns:
        uint8 [n, h, w, c]; of a task whose frames are the result ("sequence",
        "progress", "interpolate", "slerp") uint8 [k, n, h, w, c].

    Raises:
        ValueError: for a field that is unknown, out of range, or does not fit the run.
    """
    if not isinstance(run, Run):
        raise ValueError(f"run must be what load_run returns, got {shown(run)}.")
    for name, value, least in (
        ("n", 1 if n is None else n, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not least <= value < 2**32:
            raise ValueError(
                f"{name} must be an integer in [{least}, 2^32), got {shown(value)}."
            )
    numbers = np.arange(1) if ids is None else np.asarray(ids)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers [n], got {shown(ids)}.")
    if numbers.min() < 0 or numbers.max() >= 2**31:
        raise ValueError(f"ids must be in [0, 2^31), got {shown(ids)}.")
    if options is not None:
        fields = vars(options) | fields
    options, task = make_options(fields, SamplingOptions, TaskOptions)
    if task.task == "generate" and task.frames is not None:
        raise ValueError(f"frames is for tasks that return them, got {task.frames}.")
    if upsample is not None and not isinstance(upsample, Run):
        upsample = load_other("upsample", upsample)
    bound = bind_sampler(run, options, task, upsample=upsample)
    if ids is None:
        numbers = np.arange(n or bound.default_n)
    size = min(batch_size, len(numbers))
    batches = bound.batches(ids=numbers, seed=seed, batch_size=size)
    keep = slice(None) if task.row.is_strip else -1
    return np.concatenate([frames[keep] for frames, _ in batches], axis=-4)


def bind_sampler(
    run: Run,
    options: SamplingOptions | None = None,
    task: TaskOptions | None = None,
    *,
    upsample: Run | None = None,
    one_program: bool = True,
    show_steps: bool = False,
) -> BoundSampler:
    """Binds a run, and how to draw from it, to a sampler; nothing is compiled yet.

    Args:
        run: the network. Its parameters may be None, and come with every call.
        options: solver, steps, labels, guidance.
        task: what is drawn.
        upsample: a run of a network with low_res that enlarges what is drawn.
        one_program: pad the steps to T, so that every number of steps, spacing, eta and
            scale shares one compilation.
        show_steps: show a progress bar for each batch of a sampler of many steps.

    Raises:
        ValueError: if an option does not fit the run.
    """
    options, task = options or SamplingOptions(), task or TaskOptions()
    check_inputs(run, options, task, upsample)
    second, others = None, load_guides(run, options)
    inputs = read_inputs(run, options, task, others.get("classifier"), upsample)
    if upsample is not None:
        second = _bind(
            *(upsample, options.of_second_stage, task, {}, Inputs({}), None),
            one_program=one_program,
        )
    bound = _bind(
        *(run, options, task, others, inputs, second),
        one_program=one_program,
        show_steps=show_steps,
    )
    if options.cond is None:
        return bound
    told = {k: a for k, a in inputs.rows.items() if k in data.CONDITIONING}
    choices = {**bound.choices, "conditioning": data.record_of(told)}
    return dataclasses.replace(bound, choices=choices)


def _bind(
    run: Run,
    options: SamplingOptions,
    task: TaskOptions,
    others: Mapping[str, Run],
    inputs: Inputs,
    second: BoundSampler | None,
    *,
    one_program: bool,
    show_steps: bool = False,
) -> BoundSampler:
    """`bind_sampler` once all files are read; `others` are runs that guide."""
    params = {name: r.params for name, r in ({"model": run} | {**others}).items()}
    classifier, guide = others.get("classifier"), others.get("guide")
    check_churn(run.objective, options, task)
    schedule, spacing = options.make_schedule(run.config.schedule)
    num_steps = schedule.num_steps
    if is_outside(options.sampler):
        options.check_step(schedule, run.image_shape)
    if task.jump > max(num_steps, TaskOptions.jump):  # which is also the default
        raise ValueError(
            f"jump must be at most the number of steps, {num_steps}, got {task.jump}."
        )
    mask = read_mask(task.mask, run.image_shape) if task.row.takes_mask else None
    if task.num_frames == 1 and one_program:
        total = configs.num_steps(run.config.schedule)
        schedule = schedules.pad(schedule, max(total, num_steps))
    on_step: Callable[[Any], None] | None = None
    if show_steps and num_steps > LONG and jax.process_index() == 0:
        on_step = progress_bar(num_steps)
    draw = make_sampler(
        *(run.model, run.objective, run.image_shape, options, task),
        num_steps=num_steps,
        mask=mask,
        null=run.null,
        classifier=classifier and classifier.model,
        guide_labels=inputs.guide_labels,
        guide=guide and (guide.model, guide.objective),
        on_step=on_step,
    )
    choices = {
        "steps": num_steps,
        "spacing": spacing,
        "ema": run.ema,
        "mask": None if mask is None else zlib.crc32(mask.tobytes()),
    }
    # Until 0.1 these drew other noise: a job that was begun then is not gone on with.
    repaints = task.row.reads is None or "resamples" in task.row.reads
    if repaints or options.sampler not in SAMPLERS:
        choices["noise"] = "by row"
    numbers = options.numbers(run.null)
    if is_outside(task.task) and params["model"] is not None:
        rows = {"ids": np.zeros(1, np.int32)}
        rows |= {name: a[:1] for name, a in inputs.rows.items()}
        rows = {k: np.float32(a) if a.dtype == np.uint8 else a for k, a in rows.items()}
        scalars = {name: np.float32(number) for name, number in numbers.items()}
        jax.eval_shape(draw, params, schedule, np.uint32(0), rows, scalars)
    return BoundSampler(
        *(draw, params, schedule, inputs.rows, numbers, options.rounding, choices),
        *(second, inputs.upsample_labels, inputs.class_names),
    )


def export_sampler(
    path: str | os.PathLike,
    run: Run,
    options: SamplingOptions | None = None,
    *,
    weights_beside: bool = False,
    about: Mapping[str, Any] | None = None,
) -> BoundSampler:
    """Writes a sampler of a run as one file that needs no jax_diffusion; see `export`.

    Args:
        path: of the file; beside it lie a .json and perhaps an .npz.
        run: the network.
        options: solver, steps, guidance; labels and conditioning are inputs of the
            file.
        weights_beside: put the weights into path + ".npz".
        about: what the .json shall say besides, JSON values.

    Returns:
        The sampler that was written.

    Raises:
        ValueError: if an option does not fit the run, or as `export.write` does.
    """
    options = options or SamplingOptions()
    if run.conditioning:  # any will do
        if options.cond is not None:
            rule = "cond must be left out, as it is an input of the file"
            raise ValueError(f"{rule}, got {shown(options.cond)}.")
        known = example_inputs(run.model, run.image_shape)
        options = dataclasses.replace(
            options, cond={k: known[k] for k in run.conditioning}
        )
    bound = bind_sampler(run, options, one_program=False)

    def draw_images(params, seed, ids, label, **cond):
        rows = {"ids": ids, "label": label, **cond}
        return bound.draw(params, bound.schedule, seed, rows, bound.numbers)[-1]

    if jax.process_index() == 0:
        known = traits(run.model)
        labeled = "classifier" in bound.params or known.num_classes is not None
        axes = {"cond": (f"{known.cond_dim}", np.float32)}
        axes |= {"tokens": (f"k, {known.token_dim}", np.float32)}
        axes |= {"tokens_mask": ("k", np.bool_)}
        choices = {k: v for k, v in bound.choices.items() if k != "conditioning"}
        export.write(
            os.fspath(path),
            draw_images,
            bound.params,
            beside=weights_beside,
            num_labels=int(bound.rows["label"].max()) + 1 if labeled else None,
            conditioning={name: axes[name] for name in run.conditioning},
            about={**(about or {}), **choices},
        )
    return bound
