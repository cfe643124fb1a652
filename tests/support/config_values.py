"""Wrong values of config fields, made from type hints and ranges, and what train says.

    python tests/support/config_values.py FOLDER

runs `train` in this process once for each of them, through its command line, and prints
a JSON object for each: what was given and what came. The process has no import hook of
jaxtyping, whose words for a wrong type would come before ours.
"""

import contextlib
import inspect
import io
import itertools
import json
import resource
import sys
import time
import types
import typing
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SMOKE = ROOT / "configs" / "smoke.py"
NAN, INF = float("nan"), float("inf")

# Values of each kind; whatever kinds a hint does not allow are wrong for it.
KINDS = {
    type(None): [None],
    bool: [True],
    int: [3],
    float: [2.5],
    str: ["a", ""],
    Sequence: [("a",), [[1]], ({},)],
    dict: [{"a": 1}],
}
NEVER = [NAN, INF, -INF]
TURNS = itertools.count()
TEXT = "many"  # on the command line, where no string is allowed

# Groups by which the functions are chosen whose arguments are tried.
NAMES = {
    "schedule": (
        *("cosine", "linear", "quadratic", "sigmoid", "sigmoid_alpha_bar"),
        *("constant", "warmup", "jsd", "given", "edm", "flow", "logit_normal"),
        *("cosine_log_snr", "laplace", "vdm"),
    ),
    "timesteps": ("loss_second_moment", "uniform", "antithetic", "stratified"),
    "model": ("unet", "annotated", "lucidrains", "dit"),
}
NEEDED = {"given": {"betas": (0.1,) * 50}}

# Values of the right type that are out of range, by group and field.
RATES, SHARES = [-0.1, 1.0, 1.5, 10**30], [-0.1, 1.1, 10**30]
VARIANCES, COUNTS = [-0.1, 0.0, 1.5], [0, -1, -(10**30)]
OUT_OF_RANGE = {
    "": {
        "seed": [-1, 2**32, 10**30],
        "total_steps": [*COUNTS, 2**31],
        "log_every": COUNTS,
        "save_every": COUNTS,
        "sample_every": [-1],
        "microbatches": [*COUNTS, 7],
        "keep": COUNTS,
        "keep_every": [-1],
        "max_skipped": COUNTS,
        "profile_steps": [-1],
        "eval_every": [-1],
        "low_res_size": [-1, 4],
        "label_dropout": RATES,
        "ema_decays": [(), (0.9, 0.9), [0.99, 0.990], (1.0,), (-0.1,), (0.9, NAN)],
        "ema_widths": [(0.1, 0.1), (0.3,), (0.0,), (0.05, NAN), 0.1, ("x",)],
        "ema_snapshots": COUNTS,
        "log_to": [("mlflow",), ("",)],
        "reproduces": ["ddpm", "DDPM_CIFAR10"],
    },
    "data": {
        "name": ["cifar", "digits ", "numpy:nothing", "json:__doc__"],
        "split": ["valid", "", "Train"],
        "batch_size": [*COUNTS, 10**9],
        "image_size": [*COUNTS, 7, 10**9],
        "in_memory": [False],
        "seed": [1],
        "start_step": [5],
        "train": [False],
    },
    "objective": {
        "mean_type": ["epsilon", ""],
        "var_type": ["learned-range"],
        "loss": ["mse"],
        "weighting": ["min-snr"],
        "reduction": ["none"],
    },
    "timesteps": {
        "num_steps": [*COUNTS, 51],
        "history": [*COUNTS, 10**9],
        "uniform_prob": SHARES,
        "name": ["random"],
    },
    "optimizer": {
        "lr": [0.0, -1.0],
        "learning_rate": [1e-3],
        "warmup_steps": [-1, 2**31],
        "decay": ["step", ""],
        "grad_clip": [0.0, -1.0],
        "b1": RATES,
        "b2": RATES,
        "epsilon": [0.0, -1e-8],
        "weight_decay": [-1e-2],
        "name": ["adam", "optax:adan_"],
        "total_steps": [100],
    },
    "mesh": {"data": [0, -2, 1000], "fsdp": [0, -2, 1000], "devices": [None]},
    "sampling": {
        "sampler": ["ddmi", "math:nothing"],
        "steps": [0, -1, 51, 10**30],
        "spacing": ["leading"],
        "eta": [-0.1, 2.0],
        "churn": [-1.0, 1.0],
        "churn_interval": [(1.0, 0.5), (1.0, 2.0)],
        "churn_noise": [-1.0, 2.0],
        "threshold": [0.0, 1.5],
        "rounding": ["ceil"],
        "label": [-1, 10, (1, 99)],
        "guidance": [2.0],
        "guide_with": ["nowhere", ""],
        "guidance_method": ["cfg", "apg"],
        "guidance_rescale": [-0.1, 1.1],
        "guidance_interval": [(1.0, 0.5)],
        "n": [*COUNTS, 10**9],
    },
    "evaluation": {
        "metric": ["fidd", "bpd"],
        "n": [1, 0, -1, 10**9],
        "reference": [1, -1],
        "bpd_images": [-1],
        "inception": ["nowhere.npz"],
        "eta": [-0.1, 2.0],
        "churn": [-1.0, 1.0],
        "threshold": [0.0, 1.5],
        "rounding": ["ceil"],
        "sampler": ["ddmi"],
    },
    "model": {
        "name": ["vit", ""],
        "out_channels": [2],
        "parent": [None],
        "channels": [*COUNTS, 2, 6, 10**9],
        "multipliers": [(), (0,), (-1, 2), (1, 1, 1, 1, 1), (1,) * 20, (10**9,)],
        "num_res_blocks": [-1, -5, 10**9],
        "attention_resolutions": [(3,), (4, 16), (-4,), (0,)],
        "num_heads": [*COUNTS, 3],
        "head_channels": [*COUNTS, 3],
        "dropout": RATES,
        "num_classes": [*COUNTS, 3, 10**9],
        "num_groups": [*COUNTS, 3],
        "norm_epsilon": [0.0, -1e-5],
        "dtype": ["float8", "int8", "flot32", "", "bool"],
        "init_style": ["he"],
        "resample": ["up"],
        "embedding_order": ["sin"],
        "down_padding": ["same"],
        "remat": ["everything", "save_only_these_names", "__doc__"],
        "attention_implementation": ["flash", "", "cudnn"],  # float32
        "block_size": COUNTS,
        "low_res": [True],
    },
}
OF_NAMES = {
    "linear": {"start": VARIANCES, "end": [*VARIANCES, 0.9], "num_steps": [1, 19]},
    "quadratic": {"start": VARIANCES, "end": VARIANCES},
    "cosine": {"offset": [-0.1], "min_beta": SHARES, "max_beta": VARIANCES},
    "sigmoid": {"start": VARIANCES, "end": VARIANCES},
    "sigmoid_alpha_bar": {"start": [3.0], "end": [-3.0], "tau": [0.0]},
    "constant": {"value": [*VARIANCES, 1.0], "num_steps": [*COUNTS, 1, 10**9]},
    "warmup": {"fraction": SHARES, "start": VARIANCES, "end": VARIANCES},
    "given": {"betas": [(), (0.1,) * 49, (0.0,) * 50, (0.1,) * 49 + (2.0,)]},
    "edm": {
        "sigma_min": [0.0],
        "sigma_max": [0.001],
        "rho": [0.0],
        "num_steps": COUNTS,
    },
    "flow": {"shift": [0.0, -1.0]},
    "logit_normal": {"std": [0.0], "shift": [0.0]},
    "cosine_log_snr": {"shift": [0.0], "log_snr_max": [-20.0]},
    "laplace": {"scale": [0.0]},
    "vdm": {"log_snr_max": [-6.0]},
    "annotated": {"expansion": COUNTS, "head_dim": COUNTS, "channels": [2, 10**9]},
    "lucidrains": {"num_memory": [-1], "head_dim": COUNTS, "dropout": RATES},
    "dit": {"depth": [*COUNTS, 10**9], "patch_size": [*COUNTS, 3], "mlp_ratio": [0.0]},
}


def allowed(hint):
    """The kinds of `KINDS` that a hint allows; None if it allows everything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return None
    if origin in (typing.Union, types.UnionType):
        found = [allowed(h) for h in inner]
        return None if None in found else set().union(*found)
    if origin is typing.Literal:
        return {type(row) for row in inner}
    if origin is not None:
        return {Sequence} if issubclass(origin, Sequence) else set()
    return {float: {float, int}}.get(hint, {hint})


def wrong_types(hint):
    """Values that are of none of the types that a hint allows."""
    kinds = allowed(hint)
    if kinds is None:
        return []
    wrong = [v for kind, some in KINDS.items() if kind not in kinds for v in some]
    if Sequence in kinds:  # of numbers or strings, as all are
        wrong += [({},), (None,)]
    turn = next(TURNS)  # a third of them, others for each field: time is dear
    return [*wrong, *NEVER][turn % 3 :: 3]


def is_told(hint):
    """Whether a hint allows something, but no string."""
    return hint not in (None, inspect.Parameter.empty) and str not in (
        allowed(hint) or {str}
    )


def cases():
    """(group, name of its function or None, field, value), without repetition."""
    from jax_diffusion.config import FIELDS
    from jax_diffusion.config.groups import GROUPS, known_fields

    found = []
    for field, row in FIELDS.items():
        hint = int if row.least is not None else row.hint
        values = [3, "a", [1]] if field in GROUPS else wrong_types(hint)
        found += [("", None, field, value) for value in values]
    for group in GROUPS:
        for name in NAMES.get(group, (None,)):
            fields = known_fields(group, {"name": name} if name else {})
            for field, parameter in fields.items():
                hint = parameter.annotation
                if field not in (*GROUPS[group].fixed, "name") and hint is not None:
                    found += [(group, name, field, v) for v in wrong_types(hint)]
                if name in (None, NAMES.get(group, ("",))[0]) and is_told(hint):
                    found.append((group, None, field, TEXT))
    for group, fields in OUT_OF_RANGE.items():
        for field, values in fields.items():
            found += [(group, None, field, value) for value in values]
    for group, names in NAMES.items():
        for name in names:
            for field, values in OF_NAMES.get(name, {}).items():
                found += [(group, name, field, value) for value in values]
    return list({repr(case): case for case in found}.values())


def config_text(group, name, field, value):
    """A config file: that of the smoke run, with one field changed."""
    change = f"config['{field}'] = value"
    if group:
        change = (
            f"config['{group}'] = {{**config.get('{group}', {{}}), '{field}': value}}"
        )
        if name:
            kept = {"num_steps": 50} if group == "schedule" else {}
            new = {"name": name, **kept, **NEEDED.get(name, {})}
            change = f"config['{group}'] = {{**{new!r}, '{field}': value}}"
    return (
        "import runpy\nfrom ml_collections import ConfigDict\n"
        "nan, inf = float('nan'), float('inf')\n\n\n"
        "def get_config():\n"
        f"    config = runpy.run_path({str(SMOKE)!r})['get_config']().to_dict()\n"
        f"    value = {value!r}\n"
        f"    {change}\n"
        "    return ConfigDict(config)\n"
    )


class Begun(Exception):
    """The run would have begun: the value was accepted."""


def run_one(main, argv, workdir):
    """Runs a command line here: exit status, stderr, seconds, whether it wrote."""
    from jax_diffusion import cli

    errors, status, begun = io.StringIO(), 0, time.perf_counter()
    sys.argv = argv
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            cli.run_program(main)
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - begun
    return dict(
        status=status, said=errors.getvalue(), seconds=seconds, left=workdir.exists()
    )


def main(folder):
    """Runs all cases; prints a JSON object for each, and the memory in the end."""
    from support.programs import train

    def run_loop(*args):
        raise Begun("accepted")

    train.run_loop = run_loop
    config, workdir = folder / "config.py", folder / "run"
    argv = ["train", "--config", str(config), "--workdir", str(workdir)]
    config.write_text(config_text("", None, "seed", -1))
    run_one(train.main, argv, workdir)  # imports
    # What is compiled once for all.
    config.write_text(config_text("model", None, "num_classes", 3))
    run_one(train.main, argv, workdir)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases():
        group, _, field, _ = case
        if case[-1] is TEXT:
            changed = [*argv, f"--config.{group}.{field}={TEXT}"]
            changed[2] = str(SMOKE)
            found = run_one(train.main, changed, workdir)
        else:
            config.write_text(config_text(*case))
            found = run_one(train.main, argv, workdir)
        where = f"{group}.{field}" if group else field
        print(json.dumps(dict(case=repr(case), field=f"config.{where}", **found)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"mebibytes": (peak - before) / 1024}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
