"""The train step: a pure function (key, state, batch) -> (state, metrics).

Network, optimizer, schedule, objective and timestep sampler are arguments of
`make_train_step`. The caller decides about `jax.jit`, donation and sharding.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key, PyTree

from jax_diffusion import checks, data, editing, guidance, losses
from jax_diffusion.checks import placement, signatures
from jax_diffusion.diffusion import Objective, check_objective
from jax_diffusion.models import Network, bind, init_params, num_classes, traits
from jax_diffusion.schedules import NoiseSchedule, check_schedule
from jax_diffusion.timesteps import TimestepSampler, rows_of, table_of
from jax_diffusion.training import averages
from jax_diffusion.training.gradients import average_gradient
from jax_diffusion.training.optimizer import update_by_loss

DATA_KEY = "image"  # the key of a batch under which the data stand
RESERVED = (
    "x",
    "timesteps",
    "train",
    "rngs",
)  # what the trainer itself gives a network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as a pytree: no functions, no config, no key.

    The step's key is `fold_in(key, step)`, so that a resumed run draws the same numbers
    as one that never stopped.

    Attributes:
        step: number of updates made or skipped, int32 scalar.
        params: the parameters, float32.
        ema_params: moving averages of them, by name: {"0.9999": ..., "width=0.1": ...}.
        opt_state: state of the optimizer.
        timestep_state: state of the timestep sampler, such as its history of losses.
        skipped: number of updates in a row that were just skipped, int32 scalar.
    """

    step: Any
    params: PyTree = dataclasses.field(repr=False)  # millions of numbers, as the next
    ema_params: PyTree = dataclasses.field(repr=False)
    opt_state: PyTree = dataclasses.field(repr=False)
    timestep_state: PyTree = dataclasses.field(repr=False)
    skipped: Any


def init_state(
    key: Key[Array, ""],
    model: Network,
    tx: optax.GradientTransformation,
    timestep_sampler: TimestepSampler,
    image_shape: Sequence[int],
    ema_decays: Sequence[float],
    ema_widths: Sequence[float] = (),
    *,
    cond: Mapping[str, Array] | None = None,
) -> TrainState:
    """Builds the state before the first update.

    Args:
        key: of the random parameters.
        model: the network.
        tx: the optimizer.
        timestep_sampler: chooses the timesteps of training.
        image_shape: shape of one example, such as (h, w, c).
        ema_decays, ema_widths: as for `make_train_step`; all begin as copies.
        cond: what else the network is called with, by name: arrays [b, ...] such as
            those of a batch, with any b.

    Raises:
        ValueError: if an argument has another type or is out of range, or the network
            has variables that are no parameters, such as those of a batch norm.
    """
    checks.key("key", key)
    _check_parts(model, tx, timestep_sampler, ema_decays, ema_widths)
    if not isinstance(image_shape, list | tuple):
        rule = "image_shape must be the shape of one example, such as (h, w, c)"
        raise ValueError(f"{rule}, got {checks.shown(image_shape)}.")
    for axis in image_shape:
        checks.integer("image_shape's axes", axis, at_least=1)
    params = init_params(model, key, image_shape, **(cond or {}))
    return start_state(params, tx, timestep_sampler, ema_decays, ema_widths)


def start_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    timestep_sampler: TimestepSampler,
    ema_decays: Sequence[float],
    ema_widths: Sequence[float] = (),
) -> TrainState:
    """Builds the state before the first update that begins with given parameters.

    Args:
        params: the parameters.
        tx, timestep_sampler, ema_decays, ema_widths: as for `init_state`.
    """
    names = averages.average_names(ema_decays, ema_widths)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params={name: jax.tree.map(jnp.copy, params) for name in names},
        opt_state=tx.init(params),
        timestep_state=timestep_sampler.init(),
        skipped=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    model: Network,
    tx: optax.GradientTransformation,
    schedule: NoiseSchedule,
    objective: Objective | None,
    timestep_sampler: TimestepSampler,
    *,
    ema_decays: Sequence[float],
    ema_warmup: bool = True,
    ema_widths: Sequence[float] = (),
    microbatches: int = 1,
    param_sharding: Any = None,
    label_dropout: float = 0.0,
    low_res_size: int = 0,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Builds train_step(key, state, batch) -> (state, metrics), pure and jit-able.

    Arguments of `train_step`:

        key     of the run, the same at every step
        state   a `TrainState`
        batch   "image", the data: uint8 [b, ...], which is scaled to [-1, 1], or float
                [b, ...], taken as it is. Any other key goes to the network by its name,
                an array [b, ...]; "label", int32 [b], only to one that takes labels

    The metrics are float32 scalars, means over the batch: `loss`, its terms, and
    `grad_norm`, `param_norm`, `update_norm`. `quartiles` holds sums and counts of the
    terms by quartile of t, float32 [4]. On several devices the step is one program, and
    all means are over the whole batch.

    Where the loss or a gradient is not finite, the step changes nothing but the counts;
    `skipped_in_a_row`, int32, says how many times in a row that has happened.

    Args:
        model: the network, which keeps the protocol of `jax_diffusion.models`.
        tx: any optimizer of optax; one that wants `value=` is told the batch's loss.
        schedule: the noise schedule, of all T steps.
        objective: what the network learns; None trains a classifier of noisy images.
        timestep_sampler: chooses t, or a level in continuous time, and its weight in
            the loss, for every image.
        ema_decays: decay rates of averages of the parameters, in [0, 1).
        ema_warmup: whether they warm up, see `ema_decay_at`.
        ema_widths: relative widths of averages by power functions, in (0, 0.28].
        microbatches: number of parts of the batch, whose gradients are computed one
            after the other, which saves memory, and averaged. Dropout aside, that is
            the gradient of the whole batch. On the CPU, XLA computes gradients of
            convolutions within a loop about ten times as slowly.
        param_sharding: sharding of the parameters inside the network, if not that of
            the state. Replicated, it makes XLA gather parameters that are split over
            devices once a step, instead of exchanging activations at every layer.
        label_dropout: probability that an image's label is replaced by the network's
            last class, and cond and tokens by what means none, all of them together,
            for classifier-free guidance (`guidance.classifier_free`).
        low_res_size: side in pixels of the small images that a network with `low_res`
            enlarges: block means of the batch's images. 0 for any other network.

    Raises:
        ValueError: if an argument has another type or is out of range, or there is
            label_dropout and nothing to drop; when the step is traced, unless the batch
            is as above and divides by `microbatches`, and its height by
            `low_res_size`.
    """
    _check_parts(model, tx, timestep_sampler, ema_decays, ema_widths)
    checks.boolean("ema_warmup", ema_warmup)
    checks.integer("microbatches", microbatches, at_least=1)
    checks.number("label_dropout", label_dropout, at_least=0, at_most=1)
    if label_dropout and not traits(model).null:
        rule = "label_dropout must be 0 for a network without labels, cond and tokens"
        raise ValueError(f"{rule}, got {label_dropout}.")
    loss_fn = make_loss_fn(model, schedule, objective, param_sharding, low_res_size)
    rates, T = (ema_decays, ema_warmup, ema_widths), schedule.num_steps

    def train_step(key, state, batch):
        key_dropout, examples = draw_examples(
            jax.random.fold_in(key, state.step),
            batch,
            timestep_sampler,
            state.timestep_state,
            null=traits(model).null,
            label_dropout=label_dropout,
        )
        loss, terms, grads = average_gradient(
            loss_fn, microbatches, state.params, key_dropout, examples
        )
        updates, opt_state = update_by_loss(
            tx, grads, state.opt_state, state.params, loss
        )
        params = optax.apply_updates(state.params, updates)
        ema_params = averages.update(state.ema_params, params, state.step, *rates)
        t = examples[2]
        timestep_state = timestep_sampler.update(state.timestep_state, t, terms.loss)
        step, none = state.step + 1, jnp.zeros_like(state.skipped)
        updated = TrainState(step, params, ema_params, opt_state, timestep_state, none)
        skipped = dataclasses.replace(state, step=step, skipped=state.skipped + 1)

        trees = {"grad": grads, "param": params, "update": updates}
        norms = {f"{name}_norm": optax.tree.norm(tree) for name, tree in trees.items()}
        finite = jnp.isfinite(loss + norms["grad_norm"])
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), updated, skipped)
        terms = terms._asdict()
        metrics = {
            "loss": loss,
            **norms,
            "skipped_in_a_row": state.skipped,
            **{name: jnp.mean(terms[name]) for name in terms if name != "loss"},
            "quartiles": sums_by_quartile(terms, rows_of(schedule, t), T),
        }
        return state, metrics

    return train_step


def _check_parts(model: Any, tx: Any, timestep_sampler: Any, *rates: Any) -> None:
    """Raises ValueError unless these have what a train step calls, and rates fit."""
    averages.check_averages(*rates)
    for name, value, rule, attributes in (
        ("model", model, "a network, as models describes it", ("init", "apply")),
        ("tx", tx, "an optimizer of optax", ("init", "update")),
        (
            "timestep_sampler",
            timestep_sampler,
            "a TimestepSampler",
            ("sample", "update"),
        ),
    ):
        if not all(callable(getattr(value, one, None)) for one in attributes):
            raise ValueError(f"{name} must be {rule}, got {checks.shown(value)}.")


def draw_examples(
    key: Key[Array, ""],
    batch: Mapping[str, Array],
    timestep_sampler: TimestepSampler,
    timestep_state: PyTree,
    *,
    null: Mapping[str, Any],
    label_dropout: float,
) -> tuple[Key[Array, ""], tuple[Any, ...]]:
    """Draws timesteps, noise and hidden conditioning for a batch.

    Args:
        key: of this step.
        batch: as for `make_train_step`.
        timestep_sampler: draws t.
        timestep_state: its state.
        null: what replaces hidden conditioning, by its names in the batch.
        label_dropout: probability that all that of an image is hidden.

    Returns:
        A key for dropout; and x_0 [b, ...], the batch's other arrays by name, t (or its
        `Levels`) and weight [b], eps [b, ...]: all that the loss of an example depends
        on.

    Raises:
        ValueError: unless the batch has such arrays.
    """
    if not isinstance(batch, Mapping) or DATA_KEY not in batch:
        got = sorted(batch) if isinstance(batch, Mapping) else checks.shown(batch)
        raise ValueError(f"batch must have {DATA_KEY!r}, got {got}.")
    checks.key("key", key)
    checks.number("label_dropout", label_dropout, at_least=0, at_most=1)
    x_0, cond = (
        batch[DATA_KEY],
        {name: batch[name] for name in batch if name != DATA_KEY},
    )
    kind = getattr(x_0, "dtype", np.dtype(object))
    if not any(jnp.issubdtype(kind, one) for one in (np.uint8, np.floating)):
        rule = f"batch's {DATA_KEY} must be a uint8 or float array [b, ...]"
        raise ValueError(f"{rule}, got {checks.shown(x_0)}.")
    checks.array(f"batch's {DATA_KEY}", x_0, "any", ("b", ...))
    for name, value in cond.items():
        if name in RESERVED:
            rule = "batch's keys must be other arguments of the network than"
            raise ValueError(f"{rule} {', '.join(RESERVED)}, got {name!r}.")
        axes = () if name == "label" else (...,)
        what = "int" if name == "label" else "any"
        checks.array(f"batch's {name}", value, what, (*x_0.shape[:1], *axes))
    if label_dropout:
        for name in [name for name in null if name not in cond]:
            rule = f"batch must have {name!r}, of which label_dropout hides some"
            raise ValueError(f"{rule}, got {sorted(batch)}.")
        # The split below takes what fold_in of 0, 1 and 2 would give.
        cond = guidance.drop(jax.random.fold_in(key, 3), cond, null, label_dropout)
    key_t, key_eps, key_dropout = jax.random.split(key, 3)
    x_0 = data.from_uint8(x_0) if kind == np.uint8 else x_0
    t, weight = timestep_sampler.sample(key_t, timestep_state, x_0.shape[0])
    eps = jax.random.normal(key_eps, x_0.shape)
    return key_dropout, (x_0, cond, t, weight, eps)


def make_loss_fn(
    model: Network,
    schedule: NoiseSchedule,
    objective: Objective | None,
    param_sharding: Any = None,
    low_res_size: int = 0,
) -> Callable[..., tuple[Array, Any]]:
    """Builds loss_fn(params, key, x_0, cond, t, weight, eps) -> (loss, terms).

    The loss is the weighted mean that is minimized, `terms` those of each example, [b].
    The arguments of the loss are those of `draw_examples`, the others those of
    `make_train_step`.

    Raises:
        ValueError: if an argument has another type or is out of range.
    """
    check_schedule(schedule)
    if objective is not None:
        check_objective(objective)
    checks.integer("low_res_size", low_res_size, at_least=0)

    def loss_fn(params, key, x_0, cond, t, weight, eps):
        options: dict[str, Any] = dict(cond)
        label = options.pop("label", None)
        takes_label = objective is None or num_classes(model) is not None
        if takes_label and label is None:
            rule = "batch must have 'label', which the network takes or learns"
            raise ValueError(f"{rule}, got {sorted([DATA_KEY, *cond])}.")
        if options and callable(model):
            labels = () if num_classes(model) is None else ("label",)
            call = model.__call__
            signatures.takes("model", call, *RESERVED[:2], *labels, **options)
        params = placement.on_mesh(params, x_0)
        if param_sharding is not None:
            params = jax.lax.with_sharding_constraint(params, param_sharding)
        if low_res_size:
            if "low_res" in options:
                rule = "low_res_size must be 0 where the batch has 'low_res'"
                raise ValueError(f"{rule}, got {low_res_size}.")
            blocks, rest = divmod(x_0.shape[1], low_res_size)
            if rest:
                rule = f"low_res_size must divide the height {x_0.shape[1]}"
                raise ValueError(f"{rule}, got {low_res_size}.")
            options["low_res"] = editing.shrink(x_0, size=blocks)
        options |= dict(train=True, rngs={"dropout": key})
        model_fn = bind(model, params, label, **options)
        table, rows = table_of(schedule, t)
        if objective is None:
            terms = losses.classifier_loss(
                key, model_fn, table, x_0, rows, cond["label"], eps=eps
            )
        else:
            terms = losses.training_loss(
                key, model_fn, table, objective, x_0, rows, eps=eps
            )
        return jnp.mean(weight * terms.loss), terms

    return loss_fn


def sums_by_quartile(
    terms: Mapping[str, Array], t: Int[Array, "b"], num_steps: int
) -> dict[str, Array]:
    """Sums loss terms over the examples of each quartile of t.

    Args:
        terms: arrays [b] by name.
        t: timesteps, in [0, num_steps).
        num_steps: T.

    Returns:
        For each term its sums, float32 [4], and their "count".

    Raises:
        ValueError: unless t and terms are arrays [b], and num_steps an integer >= 1.
    """
    if not isinstance(terms, Mapping):
        raise ValueError(f"terms must be arrays by name, got {checks.shown(terms)}.")
    checks.integer("num_steps", num_steps, at_least=1)
    checks.array("t", t, "int", ("b",))
    checks.rows("t", t, num_steps)
    for name, value in terms.items():
        checks.array(name, value, "float", t.shape)
    member = (4 * t // num_steps)[:, None] == jnp.arange(4)[None, :]
    member = member.astype(jnp.float32)
    sums = {name: value @ member for name, value in terms.items()}
    return {"count": member.sum(axis=0), **sums}
