"""Translates between the JSON files of diffusers and our keyword arguments.

A field is translated only if both sides compute the same with it. Any other field is a
ValueError that names it, so a checkpoint never means two different networks.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jax_diffusion import checks
from jax_diffusion.interop import diffusers_levels

Json = Mapping[str, Any]

MAX_SIDE, MAX_LEVELS, MAX_CHANNELS, MAX_CLASSES = 2**14, 32, 2**20, 2**31
MAX_STEPS = 10**5  # of a noise schedule
LISTS = ("block_out_channels", "down_block_types", "up_block_types")
BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}
NEEDED = ("sample_size", "in_channels", "out_channels", "block_out_channels")
NEEDED += ("down_block_types", "up_block_types")
# Fields of UNet2DModel for which we support one value, which is also the default.
FIXED_FIELDS = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
# Fields of `UNet` with the values that diffusers supports.
PLAIN_FIELDS = {
    "resample": ("conv",),
    "low_res": (False,),
    "block_size": (1,),
    "cond_dim": (0,),
    "token_dim": (0,),
}
# Fields of UNet2DModel with a choice: value there -> value of the field of `UNet`.
CHOICES = {
    "freq_shift": {0: False, 1: True},
    "flip_sin_to_cos": {True: "cos_sin", False: "sin_cos"},
    "downsample_padding": {1: "symmetric", 0: "bottom_right"},
    "resnet_time_scale_shift": {"default": False, "scale_shift": True},
}
# Default values of UNet2DModel.
DEFAULTS = {
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "resnet_time_scale_shift": "default",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "dropout": 0.0,
    "layers_per_block": 2,
    "num_class_embeds": None,
}
PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
# Not "learned": the output of diffusers is the variance there, ours its logarithm.
VARIANCES = ("fixed_small", "fixed_large", "learned_range")

# Schedulers of the process of DDPM: they differ in the steps that they take through it.
SCHEDULERS = {
    f"{name}Scheduler"
    for name in """
    DDPM DDPMParallel DDIM DDIMParallel DDIMInverse PNDM LMSDiscrete EulerDiscrete
    EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete
    DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep DPMSolverSDE
    UniPCMultistep DEISMultistep SASolver RePaint
    """.split()
}
# Those among them whose betas go from 0.00085 to 0.012 where a file gives none.
LATENT_ENDS = {f"{name}DiscreteScheduler" for name in ("Heun", "KDPM2")}
LATENT_ENDS |= {"KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"}
# Settings of them that make another process: name -> the value without it.
SAME_PROCESS = {"use_flow_sigmas": False, "timestep_type": "discrete"}


def unet_from_config(config: Json) -> dict[str, Any]:
    """Returns the arguments of the `UNet` that equals a UNet2DModel of diffusers.

    Args:
        config: content of the config.json of the UNet2DModel.

    Raises:
        ValueError: if a field is missing or has a value that we do not support.
    """
    missing = [name for name in NEEDED if name not in config]
    if missing:
        raise ValueError(f"a UNet2DModel lacks the fields {missing}.")
    config = FIXED_FIELDS | DEFAULTS | dict(config)
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ValueError(f"a network must be a UNet2DModel, got {kind!r:.80}.")
    check_types(config)
    h, _ = sides_of(config)
    differing = []
    # With scale_shift, the attention of the middle has a norm only if this is given.
    groups = config.get("attn_norm_num_groups")
    plain = config["resnet_time_scale_shift"] == "default"
    if groups != config["norm_num_groups"] and not (groups is None and plain):
        differing.append(f"attn_norm_num_groups = {groups!r}")
    types = [*config["down_block_types"], *config["up_block_types"]]
    differing += sorted(set(types) - BLOCKS)
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    if attends[::-1] != [k.startswith("Attn") for k in config["up_block_types"]]:
        differing.append("attention at different sizes on the way down and up")
    check_fields(
        "a UNet2DModel must be of the kind of google/ddpm-*",
        config,
        {name: (value,) for name, value in FIXED_FIELDS.items()} | CHOICES,
        differing,
    )
    chosen = {name: CHOICES[name][config[name]] for name in CHOICES}
    first, *_ = widths = config["block_out_channels"]
    return dict(
        channels=first,
        multipliers=tuple(w / first if w % first else w // first for w in widths),
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=tuple(
            h >> i for i, attend in enumerate(attends) if attend
        ),
        head_channels=config["attention_head_dim"],
        num_classes=config["num_class_embeds"],
        dropout=config["dropout"],
        scale_shift=chosen["resnet_time_scale_shift"],
        embedding_order=chosen["flip_sin_to_cos"],
        embedding_endpoint=chosen["freq_shift"],
        down_padding=chosen["downsample_padding"],
        num_groups=config["norm_num_groups"],
        norm_epsilon=config["norm_eps"],
        init_style="torch",
    )


def sides_of(config: Json) -> tuple[int, int]:
    """Returns height and width of the images of a UNet2DModel.

    Args:
        config: content of the config.json of the UNet2DModel.

    Raises:
        ValueError: if `sample_size` is neither one side nor two, or one is out of
            range.
    """
    size = config["sample_size"]
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2:
        raise ValueError(f"sample_size must be a number or two, got {size!r:.80}.")
    for side in sides:
        checks.integer("sample_size", side, at_least=1, at_most=MAX_SIDE)
    return sides[0], sides[1]


def check_types(config: Json) -> None:
    """Checks that the fields of a UNet2DModel are of their types, and sizes possible.

    Args:
        config: content of the config.json, with all fields of `DEFAULTS`.

    Raises:
        ValueError: that names the field.
    """
    lists = {name: config[name] for name in LISTS}
    for name, values in lists.items():
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_LEVELS:
            raise ValueError(
                f"{name} must be a list of 1 to {MAX_LEVELS}, got {values!r:.80}."
            )
    if len({len(values) for values in lists.values()}) != 1:
        raise ValueError(f"{' and '.join(LISTS)} must be of one length, got several.")
    for name in LISTS[1:]:
        if not all(isinstance(kind, str) for kind in config[name]):
            raise ValueError(f"{name} must be names, got {config[name]!r:.80}.")
    for width in config["block_out_channels"]:
        checks.integer("block_out_channels", width, at_least=1, at_most=MAX_CHANNELS)
    for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        checks.integer(name, config[name], at_least=1, at_most=MAX_CHANNELS)
    for name in ("attention_head_dim", "num_class_embeds"):
        if config[name] is not None:
            checks.integer(name, config[name], at_least=1, at_most=MAX_CLASSES)
    checks.number("norm_eps", config["norm_eps"], above=0)
    checks.number("dropout", config["dropout"], at_least=0, below=1)


def check_fields(
    rule: str,
    found: Mapping[str, Any],
    allowed: Mapping[str, Collection[Any]],
    differing: Iterable[str] = (),
) -> None:
    """Checks that fields of a network have values that another code can compute.

    Args:
        rule: the rule that the error states.
        found: values by name; all names of `allowed` are there.
        allowed: for each field that is limited, its allowed values.
        differing: what else differs, in words.

    Raises:
        ValueError: if anything differs; the error names all of it.

    >>> check_fields("x must be 1", {"x": 2, "y": 3}, {"x": [1]})
    Traceback (most recent call last):
    ValueError: x must be 1, got x = 2.
    """
    wrong = [
        name
        for name, values in allowed.items()
        if not any(found[name] == value for value in values)  # may be unhashable
    ]
    words = [*(f"{name} = {found[name]!r}" for name in wrong), *differing]
    if words:
        raise ValueError(f"{rule}, got {', '.join(words)}.")


def config_from_unet(model: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the config.json of the UNet2DModel of diffusers that equals a `UNet`.

    Args:
        model: a `UNet`.
        image_shape: (h, w, c).

    Raises:
        ValueError: if UNet2DModel cannot compute what the network does.
    """
    size, width, channels = image_shape
    widths = [round(m * model.channels) for m in model.multipliers]
    attends = [size >> i in model.attention_resolutions for i in range(len(widths))]
    differing = []
    if model.multipliers[0] != 1:
        differing.append(f"multipliers = {model.multipliers}")
    attending = {w for w, a in zip(widths, attends, strict=True) if a} | {widths[-1]}
    if model.head_channels is None and model.num_heads > 1 and len(attending) > 1:
        differing.append(f"num_heads = {model.num_heads} at several widths")
    check_fields(
        "the network must be one that diffusers' UNet2DModel can compute",
        vars(model),
        PLAIN_FIELDS,
        differing,
    )
    head = model.head_channels
    if head is None and model.num_heads > 1:
        head = widths[-1] // model.num_heads
    kinds = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    return {
        "_class_name": "UNet2DModel",
        **FIXED_FIELDS,
        "sample_size": size if size == width else [size, width],
        "in_channels": channels,
        "out_channels": model.out_channels,
        "freq_shift": int(model.embedding_endpoint),
        "flip_sin_to_cos": model.embedding_order == "cos_sin",
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": 0 if model.down_padding == "bottom_right" else 1,
        "dropout": model.dropout,
        "attention_head_dim": head,
        "norm_num_groups": model.num_groups,
        "attn_norm_num_groups": model.num_groups,
        "norm_eps": model.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        "num_class_embeds": model.num_classes,
        "num_train_timesteps": None,
    }


def process_from_scheduler(config: Json) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the groups `schedule` and `objective` of a config for a scheduler.

    Args:
        config: content of the scheduler_config.json.

    Raises:
        ValueError: if it is of another process than DDPM's, EDM's or a flow, or if we
            do not have its beta schedule, prediction type or variance.
    """
    name = config.get("_class_name", "DDPMScheduler")  # old files name none
    if isinstance(name, str) and name in diffusers_levels.ROWS:
        return diffusers_levels.process_of_levels(name, config)
    if not isinstance(name, str) or name.removeprefix("Flax") not in SCHEDULERS:
        raise ValueError(
            "a scheduler must have a _class_name with the process of DDPM, such as "
            "'DDPMScheduler' or 'DDIMScheduler', or be one of "
            f"{sorted(diffusers_levels.ROWS)}, got {name!r:.80}."
        )
    return chain_from_scheduler(name.removeprefix("Flax"), config)


def chain_from_scheduler(
    name: str, config: Json
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`process_from_scheduler` of a scheduler in `SCHEDULERS`, by its name and config.

    Raises:
        ValueError: as there.
    """
    for field, plain in SAME_PROCESS.items():
        if (value := config.get(field)) is not None and value != plain:
            raise ValueError(
                f"{field} of a scheduler must be {plain!r}, got {value!r:.80}."
            )
    start, end = (0.00085, 0.012) if name in LATENT_ENDS else (1e-4, 0.02)
    num_steps = config.get("num_train_timesteps", 1000)
    checks.integer("num_train_timesteps", num_steps, at_least=1, at_most=MAX_STEPS)
    start, end = config.get("beta_start", start), config.get("beta_end", end)
    checks.number("beta_start", start, above=0, below=1)
    checks.number("beta_end", end, above=0, below=1)
    ends = dict(num_steps=num_steps, start=start, end=end)
    kind, given = config.get("beta_schedule", "linear"), config.get("trained_betas")
    schedules = {
        "linear": dict(name="linear", rescale=False, **ends),
        "scaled_linear": dict(name="quadratic", **ends),
        "sigmoid": dict(name="sigmoid", **ends),
        "squaredcos_cap_v2": dict(name="cosine", num_steps=num_steps),
    }
    if given is not None:
        if not isinstance(given, list | tuple) or len(given) != num_steps:
            raise ValueError(
                f"trained_betas must be {num_steps} numbers, got {given!r:.80}."
            )
        for beta in given:
            checks.number("trained_betas", beta, above=0, at_most=1)
        schedules[str(kind)] = dict(
            name="given", num_steps=num_steps, betas=tuple(given)
        )
    options = {}
    if config.get("rescale_betas_zero_snr"):
        options["zero_terminal_snr"] = True
    means = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    mean = config.get("prediction_type", "epsilon")
    variance = config.get("variance_type")
    if variance is None:  # as solvers of the ODE have it
        variance = "fixed_small"
    names = all(isinstance(name, str) for name in (kind, mean, variance))
    if (
        not names
        or kind not in schedules
        or mean not in means
        or variance not in VARIANCES
    ):
        raise ValueError(
            f"a scheduler must have a beta_schedule of {sorted(schedules)}, a "
            f"prediction_type of {sorted(means)} and a variance_type of {VARIANCES}, "
            f"got {kind!r}, {mean!r} and {variance!r}."
        )
    loss = "hybrid" if variance == "learned_range" else "l2"
    objective = dict(mean_type=means[mean], var_type=variance, loss=loss)
    return schedules[kind] | options, objective


def scheduler_from_process(
    betas: np.ndarray, objective: Any, rescale_timesteps: bool
) -> dict[str, Any]:
    """Returns the scheduler_config.json of a DDPMScheduler.

    Args:
        betas: float64 [T], the variances.
        objective: the `Objective`: how the network's output is read.
        rescale_timesteps: whether the network is given 1000 t / T in place of t.

    Raises:
        ValueError: if DDPMScheduler cannot read the network's output in this way.
    """
    if objective.mean_type not in PREDICTIONS or objective.var_type not in VARIANCES:
        raise ValueError(
            f"diffusers must know how to read the output, of {sorted(PREDICTIONS)} and "
            f"{VARIANCES}, got {objective.mean_type!r} and {objective.var_type!r}."
        )
    if rescale_timesteps and len(betas) != 1000:
        raise ValueError(
            "diffusers tells the network t itself, so that a schedule with "
            f"rescale_timesteps must have 1000 steps, got {len(betas)}."
        )
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": [float(beta) for beta in betas],
        "prediction_type": PREDICTIONS[objective.mean_type],
        "variance_type": objective.var_type,
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }
