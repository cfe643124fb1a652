"""The fields of a config: their meanings, defaults and ranges."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jax_diffusion.models import MODELS, traits
from jax_diffusion.registry import hint, lookup

Config = Any  # a ConfigDict or a dict: neither has fields of static types

NEEDED = object()  # the default of a field that every config must have


class Field(NamedTuple):
    """A field of a config.

    Attributes:
        meaning: what it decides, for readers.
        default: its value where a config leaves it out; of a group, its own defaults.
        least: the smallest integer that it may be; None for other types.
        free: whether it may differ between two starts of one run.
    """

    meaning: str
    default: Any = NEEDED
    least: int | None = None
    free: bool = False


SAMPLE_FIELDS = "fields of pipeline.SamplingOptions, and n, the number of images"

FIELDS = {
    "seed": Field("seed of parameters, data order, noise and dropout"),
    "data": Field("arguments of data.load"),
    "schedule": Field(
        "name in schedules.BETAS, its arguments, rescale_timesteps, zero_terminal_snr"
    ),
    "objective": Field("arguments of Objective; None for a classifier"),
    "timesteps": Field("name in timesteps.TIMESTEP_SAMPLERS, and its arguments"),
    "model": Field("name in models.MODELS, and its arguments but out_channels"),
    "optimizer": Field("arguments of training.make_optimizer but total_steps"),
    "init_from": Field(
        "whose weights training begins with: WORKDIR, WORKDIR:EMA or a checkpoint "
        "file, see training.fine_tuning; empty for random ones",
        "",
    ),
    "ema_decays": Field("decay rates; one average of the parameters is kept for each"),
    "ema_warmup": Field("whether averages forget the random start faster"),
    "total_steps": Field("number of updates, in all", least=1, free=True),
    "log_every": Field("updates between two lines of the log", least=1, free=True),
    "save_every": Field("updates between two checkpoints", least=1, free=True),
    "sample_every": Field("updates between two sample grids", least=1, free=True),
    "sampling": Field(
        f"of the grids: {SAMPLE_FIELDS}; None for a classifier", free=True
    ),
    "label_dropout": Field(
        "probability that a label is hidden in training, for classifier-free "
        "guidance; the network then gets one class more than num_classes",
        0.0,
    ),
    "low_res_size": Field(
        "side in pixels of the small images that a network with low_res enlarges; 0 "
        "for other networks",
        0,
        least=0,
    ),
    "mesh": Field(
        "arguments of sharding.make_mesh", {"data": -1, "fsdp": 1}, free=True
    ),
    "microbatches": Field(
        "parts of a batch whose gradients are averaged, to save memory",
        1,
        least=1,
        free=True,
    ),
    "keep": Field("number of newest checkpoints that stay", 3, least=1, free=True),
    "keep_every": Field(
        "checkpoints at multiples of it stay too; 0 for none", 0, least=0, free=True
    ),
    "max_skipped": Field(
        "non-finite updates in a row after which the run stops", 20, least=1, free=True
    ),
    "log_to": Field("writers of logs.WRITERS, beside metrics.jsonl", (), free=True),
    "profile_steps": Field(
        "updates to trace for TensorBoard or Perfetto, from the 11th on; 0 for none",
        0,
        least=0,
        free=True,
    ),
    "reproduces": Field(
        "setting of a paper, a key of evaluation.published.PAPERS", "", free=True
    ),
    "eval_every": Field(
        "updates between two evaluations of every average; 0 for none",
        0,
        least=0,
        free=True,
    ),
    "evaluation": Field(
        f"of these: metric, reference, bpd_images, inception, and {SAMPLE_FIELDS}",
        dict(metric="pixel_distance", n=1000, reference=10_000)
        | dict(sampler="ddim", steps=50, spacing="sections", bpd_images=0)
        | dict(inception=""),
        free=True,
    ),
}
DEFAULTS = {k: f.default for k, f in FIELDS.items() if f.default is not NEEDED}
# Free fields of groups that are not.
FREE_IN_GROUPS = ("data.in_memory", "data.on_error")


def complete(config: Config) -> Config:
    """Returns a copy with the defaults of all fields that it leaves out.

    Fields within the groups `mesh` and `evaluation` are filled in, too.
    """
    given: dict[str, Any] = dict(ConfigDict(config).items())
    for name, default in DEFAULTS.items():
        if isinstance(default, dict) and not hasattr(given.get(name, {}), "items"):
            raise ValueError(f"config.{name} must be a group, got {given[name]!r}.")
    groups = {
        name: {**default, **given.get(name, {})}
        for name, default in DEFAULTS.items()
        if isinstance(default, dict)
    }
    return ConfigDict(DEFAULTS | given | groups)


def check_config(config: Config) -> None:
    """Checks that a config has exactly the fields of `FIELDS`, and their ranges.

    Raises:
        ValueError: that names the field, the rule and what came.
    """
    for name in config:
        if name not in FIELDS:
            raise ValueError(f"the config has no field {name!r}{hint(name, FIELDS)}")
    missing = [name for name in FIELDS if name not in config]
    if missing:
        raise ValueError(f"the config must have the fields {missing}, got none.")
    for name, field in FIELDS.items():
        value = config[name]
        if field.least is None:
            continue
        if not isinstance(value, int) or value < field.least:
            kind = "a positive integer" if field.least == 1 else "an integer >= 0"
            raise ValueError(f"config.{name} must be {kind}, got {value!r}.")
    if not config.ema_decays or not all(0 <= d < 1 for d in config.ema_decays):
        raise ValueError(
            f"config.ema_decays must be numbers in [0, 1), got {config.ema_decays}."
        )
    model = lookup("config.model.name", config.model.get("name"), MODELS)
    classifies = traits(model).num_labels is not None
    for name in ("objective", "sampling"):
        if (config[name] is None) != classifies:
            raise ValueError(
                f"config.{name} must be None for a classifier and for no other model, "
                f"got {config[name]}."
            )
