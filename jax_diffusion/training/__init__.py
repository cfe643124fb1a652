"""Training: the train step and its optimizer; from a config to a compiled step.

    step       TrainState, make_train_step
    averages   names, rates and updates of averages of the parameters (EMA)
    post_hoc_ema  averages of other widths, from snapshots of those by power functions
    optimizer  make_optimizer, OPTIMIZERS: AdamW, or any optimizer of optax
    gradients  the gradient of a batch, in microbatches
    setup      a config -> data, network and compiled train step, for `train`
    resume     what may change between two starts of one run
    fine_tuning  training that begins with the weights of a run or a checkpoint file
    saving     what `train` saves: checkpoints and snapshots of averages
    reporting  what `train` writes down: metrics, grids of samples, loss curve

The loop itself is `jax_diffusion.train`. This package re-exports the first three, which
need no config.
"""

from jax_diffusion.models import bind, example_inputs, num_classes
from jax_diffusion.training.averages import ema_decay_at, ema_name
from jax_diffusion.training.optimizer import DECAYS, OPTIMIZERS, make_optimizer
from jax_diffusion.training.step import (
    TrainState,
    init_state,
    make_train_step,
    start_state,
)

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "TrainState",
    "averages",
    "bind",
    "consistency",
    "ema_decay_at",
    "ema_name",
    "example_inputs",
    "fine_tuning",
    "gradients",
    "init_state",
    "make_optimizer",
    "make_train_step",
    "num_classes",
    "optimizer",
    "post_hoc_ema",
    "reporting",
    "resume",
    "saving",
    "setup",
    "start_state",
    "step",
]
