"""What a network predicts and how it is scored: `Objective`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Array

from jax_diffusion import checks
from jax_diffusion.schedules import NoiseSchedule, check_chain, check_schedule

MeanType = Literal["eps", "x_0", "v", "flow", "mu"]
VarType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
LossType = Literal["l2", "l1", "huber", "vlb", "hybrid"]
Weighting = Literal[
    "uniform", "snr", "min_snr", "truncated_snr", "p2", "edm", "sigmoid", "vdm"
]
Reduction = Literal["mean", "sum"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the network outputs, and the loss that it is trained with.

    Static: hashable, without arrays.

    Attributes:
        mean_type: what the network predicts: eps (DDPM), x_0, v (Salimans & Ho 2022),
            flow, which is eps - x_0 (Liu et al. 2023), or mu, the mean of
            p(x_{t-1} | x_t).
        var_type: the variance of p(x_{t-1} | x_t): that of the posterior (fixed_small),
            its upper bound, beta where signal^2 + noise^2 = 1 (fixed_large), or an
            output of the network, either its logarithm (learned) or its place between
            the other two (learned_range).
        loss: l2, l1 or huber loss of the output; vlb, the variational bound; hybrid, l2
            plus the bound, whose gradient then reaches the variance only.
        weighting: of the l2, l1 or huber term over noise levels, see
            `losses.loss_weight`; or a function of (schedule, t) that returns the
            weights [b] of the error in what the network predicts. It reads the schedule
            by `schedules.take(schedule, t, 1)`, which also works where t lies on a mesh
            with Explicit axes, as `schedule.now.signal[t]` does not.
        vlb_scale: the bound counts vlb_scale * T times its term at the sampled t, which
            is vlb_scale times L_vlb on average. Default 1e-3 in "hybrid" (Improved
            DDPM; OpenAI's RESCALED_MSE) and 1 in "vlb" (RESCALED_KL); 1 / T gives their
            MSE and KL. At least 0.
        min_snr_gamma: gamma of the weighting "min_snr", > 0.
        p2_gamma: gamma of the weighting "p2", at least 0.
        p2_k: k of the weighting "p2", > 0.
        sigma_data: standard deviation of the data, of the weighting "edm" and of
            preconditioning, > 0.
        sigmoid_bias: bias of the weighting "sigmoid".
        reduction: of the l2, l1 or huber term over an image: mean, or sum (the DDIM
            repository), which is larger by the number of values in an image. Adam's
            step hardly depends on that factor; gradient clipping and Adam's epsilon do.
        precondition: whether the network is wrapped by `preconditioning.precondition`,
            with sigma_data, wherever its output is read; for mean_type "x_0".

    Raises:
        ValueError: for an unknown name, a number out of range, "hybrid" without a
            learned variance, or preconditioning of another output than x_0.

    >>> Objective(mean_type="v", var_type="learned_range", loss="hybrid").mean_type
    'v'
    """

    mean_type: MeanType = "eps"
    var_type: VarType = "fixed_large"
    loss: LossType = "l2"
    weighting: Weighting | Callable[[NoiseSchedule, Array], Array] = "uniform"
    vlb_scale: float | None = None
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    sigma_data: float = 0.5
    sigmoid_bias: float = 0.0
    reduction: Reduction = "mean"
    precondition: bool = False

    def __post_init__(self):  # not a pytree, so checking here is safe
        checks.choice("mean_type", self.mean_type, get_args(MeanType))
        checks.choice("var_type", self.var_type, get_args(VarType))
        checks.choice("loss", self.loss, get_args(LossType))
        if not callable(self.weighting):
            checks.choice("weighting", self.weighting, get_args(Weighting))
        checks.choice("reduction", self.reduction, get_args(Reduction))
        if self.vlb_scale is not None:
            checks.number("vlb_scale", self.vlb_scale, at_least=0)
        checks.number("min_snr_gamma", self.min_snr_gamma, above=0)
        checks.number("p2_gamma", self.p2_gamma, at_least=0)
        checks.number("p2_k", self.p2_k, above=0)
        checks.number("sigma_data", self.sigma_data, above=0)
        checks.number("sigmoid_bias", self.sigmoid_bias)
        checks.boolean("precondition", self.precondition)
        if self.precondition and self.mean_type != "x_0":
            raise ValueError(
                "precondition must be False unless mean_type is 'x_0', got True and "
                f"{self.mean_type!r}."
            )
        if self.loss == "hybrid" and not self.learns_variance:
            raise ValueError(
                f"loss 'hybrid' needs a learned variance, got {self.var_type!r}."
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the network outputs twice the channels, the second half of them for
        the variance.
        """
        return self.var_type.startswith("learned")

    @property
    def needs_chain(self) -> bool:
        """Whether training needs the steps of a chain: mu, a learned variance and the
        bound are defined by them.
        """
        of_bound = self.loss == "vlb" or self.weighting == "vdm"
        return self.mean_type == "mu" or self.learns_variance or of_bound


def check_signal(schedule: NoiseSchedule, objective: Objective) -> None:
    """Raises ValueError where the `objective`'s output does not determine x_0.

    That is eps on a `schedule` that ends in zero signal, v on one whose
    signal^2 + noise^2 is not 1, and mu, or a learned variance, where there is no chain.
    They must be such objects, too. A traced schedule has no values to check.
    """
    check_schedule(schedule)
    check_objective(objective)
    if objective.mean_type == "mu" or objective.learns_variance:
        check_chain(schedule)
    signal, noise, _ = schedule.now
    if not checks.known(signal):
        return
    # NumPy: jnp would be traced within a jit.
    if objective.mean_type == "eps" and not np.all(np.asarray(signal) > 0):
        raise ValueError(
            "mean_type must be 'v', 'flow', 'x_0' or 'mu' for a schedule that ends in "
            "zero signal, got 'eps', which does not determine x_0 there."
        )
    if objective.mean_type == "v" and checks.known(noise):
        if not np.allclose(np.hypot(signal, noise), 1, 1e-4):
            raise ValueError(
                "mean_type must be 'flow', 'eps', 'x_0' or 'mu' for a schedule whose "
                "signal^2 + noise^2 is not 1, got 'v'."
            )


def check_objective(objective: Any) -> None:
    """Raises ValueError unless `objective` is an Objective."""
    if not isinstance(objective, Objective):
        rule = "objective must be an Objective"
        raise ValueError(f"{rule}, got {checks.shown(objective)}.")
