"""Builds the compiled function that draws a batch of images."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_diffusion import diffusion, guidance, samplers
from jax_diffusion.diffusion import DenoiseFn, Objective
from jax_diffusion.models import Network, bind, traits
from jax_diffusion.pipeline import tasks
from jax_diffusion.pipeline.options import SamplingOptions
from jax_diffusion.pipeline.tasks import TaskOptions
from jax_diffusion.registry import is_outside

MAX_KEPT = 16  # samplers that stay compiled for other calls
kept: dict[Hashable, Callable[..., Any]] = {}  # the one that was used last stands last
keeping = threading.Lock()


def make_sampler(
    model: Network,
    objective: Objective | None,
    image_shape: tuple[int, ...],
    options: SamplingOptions,
    task: TaskOptions,
    *,
    num_steps: int,
    mask: np.ndarray | None = None,
    null: Mapping[str, Any] | None = None,
    classifier: Network | None = None,
    guide_labels: np.ndarray | None = None,
    guide: tuple[Network, Objective | None] | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Callable[..., Any]:
    """Builds a compiled draw(params, schedule, seed, rows, numbers) -> frames.

    Frames are float32 [k, b, h, w, c]; the task decides k. Schedules padded to one
    length, and all numbers, share one compilation, in later calls with equal arguments,
    too: the last `MAX_KEPT` samplers are kept. The arguments of draw:

        params    {"model": parameters}; those of "classifier" and "guide", if given
        schedule  padded or not
        seed      uint32 []
        rows      of each image: "ids" and "label", int32 [b]; if the network or the
                  task wants them, "low_res" or "image", float32 [b, h, w, c], and
                  "cond", "tokens" and "tokens_mask" as in `jax_diffusion.models`
        numbers   those of `SamplingOptions.numbers`

    Args:
        model, objective: the network, and how its output is read.
        image_shape: (h, w, c).
        options: sampler, clipping and guidance; its numbers are not used.
        task: what is drawn.
        num_steps: number of steps of the schedule.
        mask: of the task, see `masks.read_mask`.
        null: what the network is told for hidden conditioning, by name, see `Run.null`.
        classifier: the network that guides.
        guide_labels: its label for each label, int32 [k]; None if they agree.
        guide: a weaker network, and how its output is read; by default it is the
            network with its conditioning hidden.
        on_step: called on the host with the timestep of every step.

    Raises:
        ValueError: if the network is a classifier.
    """
    if objective is None:
        raise ValueError("the run must be of a denoiser, got a classifier's.")
    networks = (model, objective, image_shape, classifier, guide)
    fixed = (num_steps, mask, null, guide_labels)
    # What stands outside of the package may have been loaded anew, or be changed.
    others = (classifier, guide and guide[0])
    may_change = any(map(is_compared_by_identity, (model, *others)))
    if on_step or may_change or is_outside(options.sampler) or is_outside(task.task):
        return _make_sampler(options, task, networks, fixed, on_step)
    if task.task == "generate" and task.num_frames == 1:
        fixed = (None, *fixed[1:])  # these frames do not depend on the number of steps
    arrays = ("images", "low_res", "mask")  # which are rows, or among `fixed`
    told = [v for k, v in vars(task).items() if k not in arrays]
    names = ("clip", "threshold", "reclip", "guidance_method")
    told += [task.row, options.row, *(getattr(options, name) for name in names)]
    told.append(guidance.GUIDANCE_METHODS.get(options.guidance_method or ""))
    # Arrays are not read when a sampler is traced, and must not be kept with it.
    bare = dataclasses.replace(options, cond=None, label=None)
    bare_task = dataclasses.replace(
        task, images=None, low_res=None, mask=TaskOptions.mask
    )
    made_of = (bare, bare_task, networks, (num_steps, *fixed[1:]), None)
    make = functools.partial(_make_sampler, *made_of)
    return keep((*networks, *told, *map(_as_key, fixed)), make)


def is_compared_by_identity(network: Any) -> bool:
    """Tells whether a network equals itself only, even after a change of it.

    Flax's modules, and those of this package, are frozen and equal if their fields are.
    """
    return network is not None and type(network).__eq__ is object.__eq__


def _as_key(value: Any) -> Any:
    """Something that is equal where arrays, or arrays by name, are."""
    if isinstance(value, Mapping):
        return tuple((name, _as_key(value[name])) for name in sorted(value))
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    return value


def keep(key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Returns what was made for an equal key before, or makes it.

    Args:
        key: of what is made. If it cannot be hashed, nothing is kept.
        make: called without arguments.
    """
    with keeping:  # threads may draw at the same time
        try:
            found = kept.pop(key, None)
        except TypeError:  # a network of somebody else need not be hashable
            return make()
        kept[key] = found = found or make()
        if len(kept) > MAX_KEPT:
            del kept[next(iter(kept))]
    return found


def _make_sampler(
    options: SamplingOptions,
    task: TaskOptions,
    networks: tuple[Any, ...],
    fixed: tuple[Any, ...],
    on_step: Callable[[Any], None] | None,
) -> Callable[..., Any]:
    """`make_sampler` without a look at those that were made before."""
    guide: tuple[Network, Objective] | None
    model, objective, image_shape, classifier, guide = networks
    num_steps, mask, null, guide_labels = fixed
    sampler, row = options.row, task.row

    def clip(denoise_fn: DenoiseFn) -> DenoiseFn:
        if not (row.clips and options.clip):
            return denoise_fn
        if options.threshold is None:
            return diffusion.clip_x_0(denoise_fn)
        return diffusion.threshold_x_0(denoise_fn, quantile=options.threshold)

    def denoiser(model, objective, params, schedule):
        return diffusion.denoiser(network_fn(model, params), schedule, objective)

    @jax.jit
    def draw(params, schedule, seed, rows, numbers):
        denoise_fn = denoiser(model, objective, params["model"], schedule)
        takes = ("low_res", "label", *traits(model).null)
        known = {name: rows[name] for name in takes if name in rows}
        if "scale" in numbers and (guide or null is not None):
            weak_fn = guide and denoiser(*guide, params["guide"], schedule)
            scale = _in_interval(schedule, numbers, "scale", outside=1.0)
            names = known.keys() - {"low_res"} if null is None else null
            wanted = {name: known.pop(name) for name in sorted(names)}
            told = dict(wanted=wanted, null=null)
            scales = dict(scale=scale, rescale=numbers["rescale"])
            name = options.guidance_method or "classifier_free"
            denoise_fn = guided(name, denoise_fn, weak_fn, **told, **scales)
        denoise_fn = clip(functools.partial(denoise_fn, **known))
        if classifier is not None:
            label = rows["label"]
            if guide_labels is not None:
                label = jnp.asarray(guide_labels)[label]
            logits_fn = bind(classifier, params["classifier"], label)
            log_prob = guidance.label_log_prob(logits_fn, label)
            scale = _in_interval(schedule, numbers, "classifier_scale", outside=0.0)
            denoise_fn = guidance.classifier(denoise_fn, schedule, log_prob, scale)
            if options.reclip and not sampler.uses_mean:
                denoise_fn = clip(guidance.shift_x_0(denoise_fn, schedule))
        names = ["eta"] * sampler.takes_eta + ["s_noise"] * ("s_noise" in numbers)
        step = functools.partial(sampler.step, **{k: numbers[k] for k in names})
        if on_step is not None:
            step = samplers.on_step(step, on_step)
        context = tasks.SamplingContext(
            seed, rows, denoise_fn, step, schedule, image_shape, num_steps, mask
        )
        return row.draw(context, task)

    return draw


def check_churn(
    objective: Objective | None, options: SamplingOptions, task: TaskOptions
) -> None:
    """Raises ValueError if churn is asked for, which task or network does not take."""
    if not options.churn:
        return
    if task.row.from_images:
        names = [name for name, row in tasks.TASKS.items() if not row.from_images]
        raise ValueError(f"churn is for the tasks {names}, got task {task.task!r}.")
    if objective and (objective.mean_type == "mu" or objective.learns_variance):
        raise ValueError(
            "churn needs a network that predicts neither mu nor a variance, got "
            f"{objective.mean_type} and {objective.var_type}."
        )


def network_fn(model, params):
    """Returns model_fn(x_t, timesteps, label, **told), which drops what it cannot take.

    A weaker network that guides need not be told what the other one is.
    """
    takes = ("low_res", *traits(model).null)

    def model_fn(x_t, timesteps, label, **told):
        told = {name: a for name, a in told.items() if name in takes}
        return bind(model, params, label, **told)(x_t, timesteps)

    return model_fn


def guided(name, denoise_fn, weak_fn, *, wanted, null, scale, rescale):
    """A denoiser that is told what is wanted, by a method of `GUIDANCE_METHODS`.

    Away from `weak_fn`, or where that is None from what it predicts when told `null`.
    """
    method = guidance.GUIDANCE_METHODS[name]
    if weak_fn is None and name == "classifier_free":  # both in one call
        args = (wanted, null, scale)
        return guidance.classifier_free(denoise_fn, *args, rescale=rescale)
    weaker = wanted
    if weak_fn is None:
        weaker = {name: jnp.full_like(a, null[name]) for name, a in wanted.items()}
    weak_fn = functools.partial(weak_fn or denoise_fn, **weaker)
    told_fn = functools.partial(denoise_fn, **wanted)
    return method(told_fn, weak_fn, scale, rescale=rescale)


def progress_bar(num_steps: int) -> Callable[[Any], None]:
    """Returns a function of t that shows how many of `num_steps` a batch has made."""
    bar = tqdm(total=num_steps, unit="step", leave=False, disable=None)

    def show(t: Any) -> None:  # of the present batch
        if not bar.disable:
            bar.update(num_steps - int(t) - bar.n)

    return show


def _in_interval(schedule, numbers, name, *, outside):
    low, high = (numbers.get(k, v) for k, v in (("low", 0.0), ("high", np.inf)))
    return guidance.within(schedule, numbers[name], low=low, high=high, outside=outside)
