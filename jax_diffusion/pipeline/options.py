"""SamplingOptions: what flags, config groups and keywords of sampling turn into."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import checks, data
from jax_diffusion import config as configs
from jax_diffusion.config import Config
from jax_diffusion.diffusion import Prediction
from jax_diffusion.guidance import GUIDANCE_METHODS
from jax_diffusion.registry import hint, is_outside, lookup, outside
from jax_diffusion.samplers import SAMPLERS, Sampler, as_sampler, start
from jax_diffusion.samplers.loop import STEP_ARGUMENTS
from jax_diffusion.samplers.state import check_state, marked, traits_of
from jax_diffusion.schedules import NoiseSchedule

NEEDS = {  # the fields that have no effect without another one, and which
    "guide_with": "guidance",
    "guidance_method": "guidance",
    "guidance_rescale": "guidance",
    "classifier_scale": "classifier",
    "reclip": "classifier",
    "churn_interval": "churn",
    "churn_noise": "churn",
}
ARRAYS = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingOptions:
    """How images are drawn: the solver, its steps, clipping, labels and guidance.

    Attributes:
        sampler: a key of `samplers.SAMPLERS`, or "package.module:function".
        steps: number of steps; by default the sampler's.
        spacing: which steps, a key of `spacing.SPACINGS`; by default the sampler's.
        eta: noise of `ddim` on any process, in [0, 1]: 0 is deterministic, and on flows
            and EDM's levels Euler's method; 1 draws from the posterior, as `ddpm` and
            `euler_ancestral` do.
        clip: whether the predicted x_0 is clipped to [-1, 1].
        threshold: instead, clip x_0 to this quantile of |x_0| and divide by it (dynamic
            thresholding), in (0, 1].
        rounding: how floats become uint8: "floor" (OpenAI) or "round" (DDIM).
        label: the images get these labels in turn: numbers or names of classes, as 3,
            "0,1,2", "dog,cat" or ["dog", "cat"]; by default all labels. Where names of
            classes are numbers, 3 is the class of that name, not the fourth class.
        guidance: scale of guidance; 1 is the labeled prediction. Classifier-free, or
            away from what `guide_with` predicts.
        guidance_rescale: how far, in [0, 1], guided images are scaled to the standard
            deviation of the labeled prediction.
        guidance_interval: (low, high) of noise / signal, in which guidance acts.
        classifier: workdir of a classifier of noisy images that guides.
        classifier_scale: scale of its gradient.
        reclip: whether x_0 is clipped again after a classifier has shifted it.
        cond: of a network that takes vectors or tokens, what it is told: arrays by name
            ("cond" [k, d], "tokens" [k, n, d], "tokens_mask" bool [k, n]), an array
            [k, d] alone, or a .npz file of such arrays; image i gets row i, in turn. By
            default that of the images that a task starts from.
        guide_with: workdir of a weaker run that predicts in place of the network
            without a label (autoguidance), or WORKDIR:EMA for one average of it. It is
            told the same labels, or takes none.
        guidance_method: a key of `guidance.GUIDANCE_METHODS`: "classifier_free" (which
            is the default), "apg" or "zero_star".
        churn: S_churn of EDM's stochastic sampler, `edm_heun` on the levels of
            `schedules.churned` (Karras et al. 2022, alg. 2): how much noise all steps
            together add anew. Steps are odd then, 2 N - 1 calls for N levels. 0 is
            `edm_heun` as it is.
        churn_interval: (S_tmin, S_tmax) of noise / signal, in which it is added.
        churn_noise: S_noise, the standard deviation of what is added.

    Raises:
        ValueError: for a value that is out of range; it begins with the field's name.

    >>> SamplingOptions(sampler="ddim", steps=50, eta=0.5).row.takes_eta
    True
    """

    sampler: str = "ddim"
    steps: int | None = None
    spacing: str | None = None
    eta: float = 0.0
    clip: bool = True
    threshold: float | None = None
    rounding: str = "floor"
    label: int | str | Sequence[int | str] | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: str | Sequence[float] | None = None
    classifier: str | os.PathLike | None = None
    classifier_scale: float = 1.0
    reclip: bool = True
    cond: Any = None
    guide_with: str | os.PathLike | None = None
    guidance_method: str | None = None
    churn: float = 0.0
    churn_interval: str | Sequence[float] | None = None
    churn_noise: float = 1.0

    def __post_init__(self):
        self._check_types()
        takes_eta = self.row.takes_eta
        for name in ("eta", "guidance_rescale"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}.")
        if self.eta and not takes_eta:
            names = [name for name, row in SAMPLERS.items() if row.takes_eta]
            raise ValueError(f"eta is for the samplers {names}, got {self.sampler!r}.")
        self.check_churn()
        checks.choice("rounding", self.rounding, data.ROUNDINGS)
        if self.guidance_method is not None:
            checks.choice("guidance_method", self.guidance_method, [*GUIDANCE_METHODS])
        if self.guide_with is not None:
            checks.path("guide_with", self.guide_with, "the path of a workdir")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}.")
        if self.threshold is not None and not self.clip:
            raise ValueError(
                "threshold must not be given where nothing is clipped, got "
                f"{self.threshold}."
            )
        for name in ("guidance", "classifier_scale"):
            scale = getattr(self, name)
            if scale is not None and not math.isfinite(scale):
                raise ValueError(f"{name} must be finite, got {scale}.")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = (k for k in NEEDS if np.any(getattr(self, k) != defaults[k]))
        self.check_useful(changed)

    def check_useful(self, names: Iterable[str]) -> None:
        """Raises ValueError for a field that has no effect without another one."""
        for name in names:
            other = NEEDS.get(name)
            # Without it: as by default, which is 0 for churn.
            if other is not None and getattr(self, other) == getattr(type(self), other):
                raise ValueError(f"{name} needs {other}, got none.")

    def check_churn(self) -> None:
        """Raises ValueError unless the options of churn fit sampler and steps."""
        for name in ("churn", "churn_noise"):
            checks.number(name, getattr(self, name), at_least=0)
        if self.churn and not self.row.takes_churn:
            names = [name for name, row in SAMPLERS.items() if row.takes_churn]
            raise ValueError(
                f"churn is for the samplers {names}, got {self.sampler!r}."
            )
        if self.churn and self.steps is not None and self.steps % 2 == 0:
            raise ValueError(
                "steps must be odd with churn, 2 N - 1 calls for N levels, got "
                f"{self.steps}."
            )
        self._interval("churn_interval")

    def _interval(self, name: str) -> tuple[float, float]:
        """The two numbers of a field LOW,HIGH; everything where it is None."""
        value = getattr(self, name)
        found = [0.0, math.inf] if value is None else _floats(value)
        low, high = found if len(found) == 2 else (math.nan, math.nan)
        if not 0 <= low <= high:
            rule = f"{name} must be LOW,HIGH with 0 <= LOW <= HIGH"
            raise ValueError(f"{rule}, got {value!r}.")
        return low, high

    def _check_types(self) -> None:
        optional = ("threshold", "guidance")
        for name in ("eta", "guidance_rescale", "classifier_scale", *optional):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number and (value is not None or name not in optional):
                raise ValueError(f"{name} must be a number, got {checks.shown(value)}.")
        for name in ("clip", "reclip"):
            checks.boolean(name, getattr(self, name))
        label: Any = self.label
        if isinstance(label, ARRAYS):
            label = np.ravel(label).tolist()
        several = isinstance(label, Sequence) and not isinstance(label, str | bytes)
        for one in label if several else [label]:
            if one is not None or several:
                if not isinstance(one, str | Integral) or isinstance(one, bool):
                    rule = "label must be an integer, a string, or a list of them"
                    raise ValueError(f"{rule}, got {checks.shown(self.label)}.")
        given = self.cond
        if given is not None and not isinstance(given, ARRAYS | Mapping):
            checks.path("cond", given, "arrays by name, an array [k, d] or a .npz file")
        whole = isinstance(self.steps, Integral) and not isinstance(self.steps, bool)
        if self.steps is not None and not whole:
            raise ValueError(
                f"steps must be an integer, got {checks.shown(self.steps)}."
            )

    @property
    def row(self) -> Sampler:
        """The sampler's row of `SAMPLERS`, or one made of a user's own step."""
        row = as_sampler(lookup("sampler", self.sampler, SAMPLERS))
        if not is_outside(self.sampler):
            return row

        @marked(**traits_of(row.step))
        @outside("sampler", self.sampler, f"a step {STEP_ARGUMENTS} -> SampleState")
        def step(keys, denoise_fn, schedule, state, t, **eta):
            new = row.step(keys, denoise_fn, schedule, state, t, **eta)
            check_state(new, state)
            return new

        return row._replace(step=step)

    def check_step(self, schedule: NoiseSchedule, image_shape: tuple[int, ...]) -> None:
        """Checks what a user's own step returns; computes nothing.

        Args:
            schedule: the steps to take.
            image_shape: (h, w, c).

        Raises:
            ValueError: unless it is a state like the one that the step is given.
        """
        row = self.row

        def one(x, **eta):
            def denoise_fn(x_t, t, **cond):
                return Prediction(jnp.zeros_like(x_t), jnp.zeros_like(x_t))

            keys, t = jax.random.split(jax.random.key(0), 2), jnp.zeros(2, jnp.int32)
            return row.step(keys, denoise_fn, schedule, start(x, row.step), t, **eta)

        eta = {"eta": np.float32(self.eta)} if row.takes_eta else {}
        jax.eval_shape(one, np.zeros((2, *image_shape), np.float32), **eta)

    @property
    def of_second_stage(self) -> "SamplingOptions":
        """The same without what is for the first of two stages only."""
        changes: dict[str, Any] = dict(label=None, cond=None, classifier=None)
        if self.guide_with is not None:
            changes |= dict(guide_with=None, guidance=None)
        left = vars(self) | changes
        if left["guidance"] is None:
            changes["guidance_interval"] = None
        for field in dataclasses.fields(self):
            if field.name in NEEDS and left[NEEDS[field.name]] is None:
                changes[field.name] = field.default
        return dataclasses.replace(self, **changes)

    def make_schedule(self, config: Config) -> tuple[NoiseSchedule, str]:
        """Builds the schedule of these steps, and tells which spacing it has.

        Args:
            config: the group `schedule` of a config.

        Raises:
            ValueError: for more steps than there are, or an unknown spacing.
        """
        most, row = configs.num_steps(config), self.row
        if self.churn:
            most = 2 * most - 1
        steps = self.steps
        if steps is None:
            steps = min(row.steps or most, most)
        spacing = row.spacing if self.spacing is None else self.spacing
        if not self.churn:
            return configs.make_schedule(config, steps=steps, spacing=spacing), spacing
        s_min, s_max = self._interval("churn_interval")
        churn = dict(churn=float(self.churn), s_min=s_min, s_max=s_max)
        return configs.make_churned(config, steps, spacing, **churn), spacing

    def numbers(self, null: Mapping[str, Any] | None) -> dict[str, float]:
        """Returns the numbers that can change without another compilation, by name.

        Args:
            null: what the network is told for hidden conditioning, see `Run.null`.

        Raises:
            ValueError: if the network has not learned what guidance needs.
        """
        numbers = {"eta": self.eta}
        if self.guidance is not None:
            if null is None and self.guide_with is None:
                raise ValueError(
                    "guidance needs a run that was trained with label_dropout, got one "
                    "without; `guide_with` and `classifier` work with any run."
                )
            numbers |= {"scale": self.guidance, "rescale": self.guidance_rescale}
        if self.classifier is not None:
            numbers["classifier_scale"] = self.classifier_scale
        if self.guidance_interval is not None:
            if len(numbers) == 1:
                got = f"{self.guidance_interval!r} with neither"
                raise ValueError(
                    f"guidance_interval needs guidance or a classifier, got {got}."
                )
            numbers["low"], numbers["high"] = self._interval("guidance_interval")
        if self.churn:
            numbers["s_noise"] = self.churn_noise
        return {name: float(number) for name, number in numbers.items()}

    def conditioning(self) -> data.Conditioning:
        """Returns the arrays that `cond` gives or names, checked; empty if none.

        Raises:
            ValueError: if they are not as `data.as_conditioning` says.
        """
        given = self.cond
        if given is None:
            return {}
        if isinstance(given, str | os.PathLike):
            return data.read_conditioning(given)
        given = given if isinstance(given, Mapping) else {"cond": given}
        for name in given:
            checks.choice("cond's names", name, data.CONDITIONING)
        if not given:
            raise ValueError("cond must hold cond or tokens, got no array.")
        return data.as_conditioning(given)

    def labels(
        self, known: int | None, class_names: Sequence[str] | None = None
    ) -> np.ndarray | None:
        """Returns the labels that are asked for, int32 [k]; None if none are.

        Args:
            known: the number of labels; None for a network that takes none.
            class_names: what they are called, if that is known.

        Raises:
            ValueError: for labels that the network does not know.
        """
        if self.label is None:
            return None
        if known is None:
            raise ValueError(
                "label needs a network that knows labels, got one without."
            )
        names = {name: i for i, name in enumerate((class_names or ())[:known])}
        numbers = {int(name): i for name, i in names.items() if data.is_number(name)}
        rule = f"of the classes {data.in_words(names)}" if names else ""
        if not numbers:  # else a number is a name
            numbers = {i: i for i in range(known)}
            rule += f"{', or ' if names else ''}from 0 to {known - 1}"
        known_labels = numbers | names
        parts = _parts(self.label, names)
        found = [known_labels.get(part, -1) for part in parts]
        if not found or min(found) < 0:
            wrong = parts[found.index(-1)] if found else ""
            part = f", where {wrong!r} is none" if names and len(found) > 1 else ""
            folded = {name.lower(): name for name in names}
            like = folded.get(str(wrong).lower(), wrong)
            close = hint(like, names) if isinstance(wrong, str) else "."
            raise ValueError(f"label must be {rule}, got {self.label!r}{part}{close}")
        return np.array(found, np.int32)


def _parts(label: Any, names: Mapping[str, int]) -> list[str | int]:
    """The labels of "dog,3", 3 or ["dog", 3]; a name may have a comma in it."""
    if isinstance(label, str):
        parts = [label] if label in names else [p.strip() for p in label.split(",")]
    else:
        parts = np.ravel(label).tolist()
    found: list[str | int] = []
    for part in parts:
        number = [] if part in names else _floats(part)
        whole = len(number) == 1 and number[0].is_integer()
        found.append(int(number[0]) if whole else str(part))
    return found


def _floats(value: Any) -> list[float]:
    """The numbers of "1,2", 1 or [1, 2]; none if one of them is no number."""
    parts = value.split(",") if isinstance(value, str) else np.ravel(value).tolist()
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        return []


def make_options(fields: Mapping[str, Any], *classes: type) -> list[Any]:
    """Makes an object of each dataclass; every field goes to the one that knows it.

    Raises:
        ValueError: for a field that none of them knows, or as the classes do.

    >>> make_options({"steps": 20}, SamplingOptions)[0].steps
    20
    """
    known = [[field.name for field in dataclasses.fields(c)] for c in classes]
    for name in fields:
        if not any(name in names for names in known):
            every = [name for names in known for name in names]
            raise ValueError(f"there is no option {name!r}{hint(name, every)}")
    return [
        c(**{name: fields[name] for name in names if name in fields})
        for c, names in zip(classes, known, strict=True)
    ]
