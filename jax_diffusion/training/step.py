"""The train step: a pure function of (key, state, batch), and what it needs.

The model, the schedule, the objective and the timestep sampler are arguments; the
caller decides about jit, donation and sharding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from jax_diffusion import data, editing, guidance, losses
from jax_diffusion.diffusion import Objective
from jax_diffusion.models import bind, example_inputs, num_classes
from jax_diffusion.schedules import NoiseSchedule
from jax_diffusion.timesteps import TimestepSampler

DECAYS = ("constant", "linear", "cosine")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, and nothing else: no functions, no config, no key.

    The step's key is `fold_in(key, step)`, so that a resumed run draws the same numbers
    as one that never stopped.
    """

    step: Any  # int32 scalar, the number of updates made or skipped
    params: PyTree
    ema_params: PyTree  # {"0.9999": params, ...}, by `ema_name`
    opt_state: PyTree
    timestep_state: PyTree  # of the TimestepSampler: must survive a restart
    skipped: Any  # int32 scalar, how many updates in a row were skipped just now


def make_optimizer(
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    decay: str = "constant",
    grad_clip: float | None = None,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW after clipping by global norm, and its learning rate by step.

    Args:
        lr: peak learning rate.
        total_steps: where a decay reaches zero.
        warmup_steps: grow linearly from 0 over so many steps (Ho et al.: 5000).
        decay: "constant", "linear" (improved-diffusion's annealing) or "cosine", from
            the end of the warm-up on.
        grad_clip: largest global norm of the gradient; None leaves it alone.

    Raises:
        ValueError: for an unknown decay or numbers out of range.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {DECAYS}, got {decay!r}.")
    if lr <= 0:
        raise ValueError(f"lr must be positive, got {lr}.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}.")
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(lr, rest),
    }[decay]
    warmup = optax.linear_schedule(0.0, lr, max(warmup_steps, 1))
    lr_fn = optax.join_schedules([warmup, after], [warmup_steps])
    adam = optax.adamw(lr_fn, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay)
    if grad_clip is None:
        return adam, lr_fn
    return optax.chain(optax.clip_by_global_norm(grad_clip), adam), lr_fn


def ema_name(decay: float) -> str:
    """The key of an average in `TrainState.ema_params`: 0.9999 -> "0.9999"."""
    return f"{decay:g}"


def init_state(
    key: Key[Array, ""],
    model: nn.Module,
    tx: optax.GradientTransformation,
    timestep_sampler: TimestepSampler,
    image_shape: Sequence[int],
    ema_decays: Sequence[float],
) -> TrainState:
    """Fresh parameters, every average a copy of them, and an empty history."""
    init: Any = model.init
    params = init(key, **example_inputs(model, image_shape))["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params={ema_name(d): jax.tree.map(jnp.copy, params) for d in ema_decays},
        opt_state=tx.init(params),
        timestep_state=timestep_sampler.init(),
        skipped=jnp.zeros((), jnp.int32),
    )


def ema_decay_at(decay: float, step: Array, warmup: bool = True) -> Array | float:
    """The decay in force at an update: min(decay, (1 + n) / (10 + n)) if warming up.

    Without it an average remembers the random start for 1 / (1 - decay) updates.
    """
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: NoiseSchedule,
    objective: Objective | None,
    timestep_sampler: TimestepSampler,
    *,
    ema_decays: Sequence[float],
    ema_warmup: bool = True,
    microbatches: int = 1,
    param_sharding: Any = None,
    label_dropout: float = 0.0,
    low_res_size: int = 0,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Builds train_step(key, state, batch) -> (state, metrics), pure and jit-able.

    Without an objective, the model is trained to classify noisy images.

    The key is the run's, the same at every step. `batch["image"]` is uint8
    [b, h, w, c], `batch["label"]` int32 [b]; means over them are global: the step is
    one program, not one per device. Metrics are means over the batch, except that
    `quartiles` holds sums and counts by quartile of t.

    Where the loss or a gradient is not finite, the step changes nothing but the counts;
    `metrics["skipped_in_a_row"]` says how often that has now happened.

    Args:
        microbatches: into how many parts the batch is cut, whose gradients are averaged
            one after the other, to save memory. But for dropout, the same gradient.
        param_sharding: under which the network sees its parameters, if not the state's:
            replicated, those that are split are gathered once and activations never.
        label_dropout: the share of labels that the network is not told: it is told its
            last class instead (`guidance.classifier_free`).
        low_res_size: side of the small images, block means of the images, from which a
            network with low_res makes them; 0 for any other network.

    Raises:
        ValueError: from the step, unless the batch divides by `microbatches`.
    """
    loss_fn = _loss_fn(model, schedule, objective, param_sharding, low_res_size)

    def train_step(key, state, batch):
        key = jax.random.fold_in(key, state.step)
        batch = _hide_labels(key, model, batch, label_dropout)
        key, t, examples = _examples(key, batch, timestep_sampler, state.timestep_state)
        loss, terms, grads = _grads(loss_fn, microbatches, state.params, key, examples)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        updated = TrainState(
            state.step + 1,
            params,
            _averages(state, params, ema_decays, ema_warmup),
            opt_state,
            timestep_sampler.update(state.timestep_state, t, terms.loss),
            skipped=jnp.zeros_like(state.skipped),
        )
        norms = _norms(grad=grads, param=params, update=updates)
        state = _updated_if(jnp.isfinite(loss + norms["grad_norm"]), updated, state)
        metrics = {
            "loss": loss,
            **norms,
            "skipped_in_a_row": state.skipped,
            **_summary(terms, t, schedule.num_steps),
        }
        return state, metrics

    return train_step


def _examples(key, batch, timestep_sampler, timestep_state):
    """A key for dropout, t, and x_0, label, t, weight and eps: all of the loss."""
    key_t, key_eps, key_dropout = jax.random.split(key, 3)
    x_0, label = data.from_uint8(batch["image"]), batch["label"]
    t, weight = timestep_sampler.sample(key_t, timestep_state, x_0.shape[0])
    eps = jax.random.normal(key_eps, x_0.shape)
    return key_dropout, t, (x_0, label, t, weight, eps)


def _hide_labels(key, model, batch, share):
    """The batch with some labels hidden from the network."""
    if not share:
        return batch
    # What follows splits the key by three, into what 0, 1 and 2 would give here.
    key = jax.random.fold_in(key, 3)
    known = num_classes(model)
    if known is None:
        raise ValueError(
            "label_dropout needs a model with num_classes, got one without."
        )
    null = known - 1
    return {**batch, "label": guidance.drop_labels(key, batch["label"], null, share)}


def _loss_fn(model, schedule, objective, param_sharding, low_res_size):
    """The weighted mean that is minimised, and its terms by example."""

    def loss_fn(params, key, x_0, label, t, weight, eps):
        if param_sharding is not None:
            params = jax.lax.with_sharding_constraint(params, param_sharding)
        options: dict[str, Any] = dict(train=True, rngs={"dropout": key})
        if low_res_size:
            blocks = x_0.shape[1] // low_res_size
            options["low_res"] = editing.shrink(x_0, size=blocks)
        model_fn = bind(model, params, label, **options)
        arguments = (key, model_fn, schedule)
        if objective is None:
            terms = losses.classifier_loss(*arguments, x_0, t, label, eps=eps)
        else:
            terms = losses.training_loss(*arguments, objective, x_0, t, eps=eps)
        return jnp.mean(weight * terms.loss), terms

    return loss_fn


def _norms(**trees):
    """The global norm of each tree."""
    return {f"{name}_norm": optax.tree.norm(tree) for name, tree in trees.items()}


def _updated_if(finite, updated, state):
    """The new state, or the old one with one more skipped update."""
    counts = dict(step=state.step + 1, skipped=state.skipped + 1)
    skipped = dataclasses.replace(state, **counts)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), updated, skipped)


def _grads(loss_fn, microbatches, params, key, examples):
    """The loss, its terms by example, and the gradient, of the whole batch."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (loss, terms), grads = grad_fn(params, key, *examples)
        return loss, terms, grads
    b = examples[0].shape[0]
    if microbatches < 1 or b % microbatches:
        raise ValueError(
            f"microbatches must divide the batch of {b} images, got {microbatches}."
        )

    # Part i has the examples i, i + microbatches, ...: every device has its share.
    def split(a):
        return a.reshape(b // microbatches, microbatches, *a.shape[1:]).swapaxes(0, 1)

    def join(a):
        return a.swapaxes(0, 1).reshape(b, *a.shape[2:])

    def add(total, part):
        i, part = part
        (loss, terms), grads = grad_fn(params, jax.random.fold_in(key, i), *part)
        return jax.tree.map(jnp.add, total, (loss, grads)), terms

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    parts = (jnp.arange(microbatches), jax.tree.map(split, examples))
    total, terms = jax.lax.scan(add, zero, parts)
    loss, grads = jax.tree.map(lambda a: a / microbatches, total)
    return loss, jax.tree.map(join, terms), grads


def _averages(state, params, decays, warmup):
    """Every average after one more update."""
    averages = {}
    for decay in decays:
        name, now = ema_name(decay), ema_decay_at(decay, state.step, warmup)
        averages[name] = optax.incremental_update(
            params, state.ema_params[name], 1 - now
        )
    return averages


def _summary(terms: Any, t: Array, num_steps: int) -> dict[str, Any]:
    """Means of the terms but the loss, which the weights of t enter; and the sums and
    counts of all over each quartile of t."""
    member = (4 * t // num_steps)[:, None] == jnp.arange(4)[None, :]
    member = member.astype(jnp.float32)
    terms = terms._asdict()
    sums = {name: value @ member for name, value in terms.items()}
    means = {name: jnp.mean(terms[name]) for name in terms if name != "loss"}
    return {**means, "quartiles": {"count": member.sum(axis=0), **sums}}
