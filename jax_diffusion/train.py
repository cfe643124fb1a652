"""Trains a run from a config, and continues it after any stop.

    python -m jax_diffusion.train --config digits --workdir runs/digits

The same command continues a run that was stopped, bit for bit on the same number of
devices. Ctrl-C and SIGTERM stop it after saving. A workdir in which another process
trains is refused, and so is one that holds a run with another config; the differences
are shown, unless --allow-change names them. --init-from begins a new run with the
weights of another one. The command is the same on one device, on several, and on every
host of a pod (see `jax_diffusion.runtime.sharding`).

A run is its workdir, a folder:

    checkpoints/     state and config, every config.save_every updates
    metrics.jsonl    a line every config.log_every updates (see `runtime.logs`)
    run.json         command, config, commit, versions and hardware of every start
    samples/         a grid every config.sample_every updates, and at the end
    best/            the best average, if config.eval_every is given
    ema_snapshots/   averages by power functions, if config.ema_widths has any: up to
                     config.ema_snapshots (32) times the parameters for each width
    loss.png         the loss curve, in the end
"""

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from jax_diffusion import cli, data
from jax_diffusion import config as configs
from jax_diffusion.config import Config
from jax_diffusion.data import DamagedImageError
from jax_diffusion.evaluation import during_training
from jax_diffusion.pipeline import Run
from jax_diffusion.runtime import checkpoint, cpu, locks
from jax_diffusion.runtime.preemption import PreemptionSignal
from jax_diffusion.runtime.snapshots import SnapshotWriter
from jax_diffusion.training import TrainState, fine_tuning, resume
from jax_diffusion.training.averages import width_name
from jax_diffusion.training.reporting import (
    Reporter,
    flops_and_peak,
    from_plain,
    plain,
    trace_steps,
)
from jax_diffusion.training.saving import Saver
from jax_diffusion.training.setup import (
    CompiledStep,
    TrainingSetup,
    compile_step,
    make_setup,
)


@locks.holding("workdir")
def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    optimizer: optax.GradientTransformation | None = None,
    init_from: Run | str | os.PathLike | None = None,
    allow_change: Sequence[str] = (),
) -> TrainState:
    """Trains until config.total_steps, or until a signal, and returns the state.

    Continues from the newest whole checkpoint in `workdir` if there is one. On several
    hosts, all of them call it, with a `workdir` that all of them see.

    Args:
        config: as `load_config` returns it.
        workdir: the folder of the run, made if need be.
        optimizer: any optimizer of optax, learning rate and clipping included, used
            instead of the one that `config.optimizer` describes. A run that was begun
            with one must be continued with the same.
        init_from: used instead of `config.init_from`: a workdir, "WORKDIR:EMA" or a
            checkpoint file whose weights a new run begins with, or a run as
            `load_run` and `load_checkpoint` return it. See `training.fine_tuning`.
        allow_change: fields of the config, such as "optimizer.lr", or groups that may
            differ from those of the run that is continued. See `training.resume`.

    Returns:
        The state after the last update.

    Raises:
        ValueError: for bad input, before anything is written; for a workdir that
            another process trains in; and for an image that turns out to be damaged,
            after saving.
        FloatingPointError: if too many updates in a row were not finite, after saving.
        OSError: if the disk is full, or if the workdir was removed meanwhile. The
            newest whole checkpoint stays.
    """
    config = given_config(config, workdir, optimizer, init_from)
    workdir = Path(workdir)
    plain_config = json.loads(config.to_json())
    saved = resume.find_run(plain_config, workdir, allow_change)

    # Compiled first: whatever does not fit is found before anything is written.
    used = resume.undecoded(config) if saved and saved.refused else config
    with saying_how_to_skip():
        setup = make_setup(used, optimizer, saved=saved and saved.record)
    record = {
        "config": plain_config,
        "format": configs.FORMAT,
        "image_shape": list(setup.batches.image_shape),
        "data_digest": setup.batches.examples.digest,
        "class_names": setup.batches.class_names,
        "conditioning": data.record_of(setup.batches.stored_conditioning),
        "window": [],  # metrics since the last line of the log
    }
    weights = None
    if saved is not None:
        saved.check(workdir, setup)
        config.init_from = plain_config["init_from"] = saved.origin
        record |= resume.history(saved.record)
    elif config.init_from:
        source = init_from if isinstance(init_from, Run) else config.init_from
        with configs.named("config", ["init_from"] if init_from is None else []):
            weights = fine_tuning.load_weights(source, config, setup)
        record["init_from"] = weights.record
    described = (setup.model, setup.objective, setup.batches, setup.mesh)
    with saying_how_to_skip():
        evaluate = during_training.make_watch(config, workdir, record, *described)
        if jax.process_index() == 0:
            print("compiling the train step", flush=True)  # minutes, if it is large
        compiled = compile_step(setup, fresh=saved is None and weights is None)
    if weights is not None:
        init = fine_tuning.make_init(weights.params, setup, compiled.shardings)
        compiled = compiled._replace(init=init)
    cpu.release_memory()
    if jax.process_index() == 0:
        print(compiled.summary, flush=True)
        if weights is not None:
            print(weights.report(), flush=True)
    changes = saved.changes if saved else ()
    return run_loop(config, workdir, setup, compiled, evaluate, record, changes)


@contextlib.contextmanager
def saying_how_to_skip() -> Iterator[None]:
    """Adds to an error about a damaged image what can be done, before training."""
    try:
        yield
    except DamagedImageError as error:
        raise DamagedImageError(
            f"{str(error).rstrip('.')}; --check-data lists all such images, and "
            '--config.data.on_error="skip" goes on without them.'
        ) from error


def given_config(
    config: Any, workdir: Any, optimizer: Any = None, init_from: Any = None
) -> Config:
    """Checks arguments of `train`; returns the whole config that they come to.

    Raises:
        ValueError: for one of another type, or a wrong config.
    """
    if not hasattr(config, "items") or not isinstance(workdir, str | os.PathLike):
        raise ValueError(
            "train needs a config, as load_config returns it, and a folder, got "
            f"{type(config).__name__} and {workdir!r}."
        )
    if not isinstance(optimizer, optax.GradientTransformation | None):
        raise ValueError(
            f"optimizer must be an optax.GradientTransformation, got {optimizer!r}."
        )
    if not isinstance(init_from, Run | str | os.PathLike | None):
        raise ValueError(
            "init_from must be a run, or the path of a workdir or a checkpoint, got "
            f"{init_from!r}."
        )
    config = configs.complete(config)
    if optimizer is not None:
        config.optimizer = configs.GIVEN_OPTIMIZER
    if init_from is not None:
        given = isinstance(init_from, Run)
        config.init_from = configs.GIVEN if given else os.fspath(init_from)
    configs.check_config(config)
    return config


def begin(
    config: Config,
    workdir: Path,
    setup: TrainingSetup,
    compiled: CompiledStep,
    record: dict[str, Any],
    changes: Sequence[str],
) -> tuple[Saver, TrainState, Reporter]:
    """Restores or initializes the state; opens checkpoints, snapshots and the log.

    Args:
        config, workdir, setup, compiled, record, changes: of `run_loop`.

    Returns:
        What saves the run, the state and the reporter.
    """
    kept = dict(keep=config.keep, keep_every=config.keep_every or None)
    manager = checkpoint.make_manager(workdir, **kept)
    state, saved = checkpoint.restore_or_init(
        manager, compiled.init, compiled.shardings, **kept
    )
    first = int(state.step)
    if first < config.total_steps:
        resume.record_changes(record, first, changes)
    dtype = config.model.get("dtype", "float32")
    reporter = Reporter(
        *(config, workdir, first),
        batches=setup.batches,
        lr_fn=setup.lr_fn,
        flops=flops_and_peak(compiled.step, setup.mesh.size, dtype),
        about=resume.history(record),
    )
    reporter.window = from_plain(saved["window"]) if saved else []
    names = [width_name(width) for width in config.ema_widths]
    how = dict(every=config.save_every, most=config.ema_snapshots)
    snapshots = SnapshotWriter(workdir, names, first, **how)
    snapshots.take(first, state.ema_params)  # if a kill has prevented it
    return Saver(manager, snapshots), state, reporter


def run_loop(
    config: Config,
    workdir: Path,
    setup: TrainingSetup,
    compiled: CompiledStep,
    evaluate: Callable[[int, TrainState], dict[str, float]] | None,
    record: dict[str, Any],
    changes: Sequence[str] = (),
) -> TrainState:
    """Restores or initializes the state, and updates it until the run ends or stops.

    Args:
        config: a whole config.
        workdir: the folder of the run.
        setup: data, devices and preview.
        compiled: the train step.
        evaluate: evaluate(step, state) -> scores by name; None for none.
        record: what is saved with every checkpoint.
        changes: what this start changes in the config, which is recorded.

    Raises:
        ValueError, FloatingPointError, OSError: as `train`.
    """
    saver, state, reporter = begin(config, workdir, setup, compiled, record, changes)
    first = step = int(state.step)
    clock, problem = reporter.clock, ""
    batches = setup.batches.stream(first, setup.rows)
    with (
        PreemptionSignal().listen() as stop,
        contextlib.closing(batches),
        contextlib.closing(saver),
        reporter,
    ):
        try:
            while step < config.total_steps and not problem and not stop.name:
                with clock.measure("data"):
                    batch = setup.place(next(batches))
                with clock.measure("dispatch"):
                    state, metrics = compiled.step(setup.key, state, batch)
                reporter.add(metrics)
                step += 1
                last, extra = step == config.total_steps, {}
                trace_steps(workdir, step - first, config.profile_steps, last, metrics)
                if step == first + 2:  # the heap has found its shape
                    cpu.release_memory()
                if setup.preview and (step % config.sample_every == 0 or last):
                    with clock.pause():
                        extra = reporter.save_grid(step, setup.preview(state))
                if evaluate and (step % config.eval_every == 0 or last):
                    with clock.pause():
                        extra |= evaluate(step, state)
                if step % config.log_every == 0 or last:
                    problem = reporter.log_line(step, extra)
                elif extra:
                    reporter.write(step, extra)
                stop.poll(step)
                if step % config.save_every == 0 or last or problem or stop.name:
                    with clock.pause():
                        record["window"] = plain(reporter.window)
                        saver.save(step, state, record)
        except Exception as error:
            record["window"] = plain(reporter.window)
            saved = saver.save_at_error(step, state, record)
            if not isinstance(error, DamagedImageError):
                raise
            raise DamagedImageError(
                f"{str(error).rstrip('.')}; {saved} is saved; mend or remove the "
                "image and add --allow-change data.path, or give "
                "--config.data.on_error=skip; --check-data lists all such images."
            ) from error
    if problem:
        raise FloatingPointError(problem)
    reporter.finish(step, stop.name)
    return state


def check_data(config: Config) -> None:
    """Reads all images of a config's data, of all splits, and prints the damaged ones.

    Raises:
        ValueError: if there are any, or if the data cannot be opened.
    """
    fields = dict(config.data)
    if fields["name"] in data.DATASETS and fields["name"] != "tfds":
        fields["split"] = "all"  # tfds and readers of users have splits of their own
    known = inspect.signature(data.check).parameters
    fields = {k: v for k, v in fields.items() if k in known}
    damaged = configs.call(data.check, fields, "config.data")
    print("\n".join(damaged), end="\n" if damaged else "")
    if damaged:
        raise ValueError(
            f"config.data must be of whole images, got {len(damaged)} damaged."
        )
    print("All images can be read.")


def main(program: str = "python -m jax_diffusion.train") -> None:
    """Parses the command line and trains; `program` is what starts it, for --help."""
    parser = cli.make_parser(program, __doc__)
    parser.epilog = (
        "Any field of the config can be changed, as with --config.total_steps=60, and "
        "any\nargument of a group's function set, whether the file gives it or not: "
        "--config.model.dtype=bfloat16.\njax_diffusion/config/fields.py lists the "
        "fields, config/groups.py the functions;\n`pip show -f jax_diffusion` says "
        "where these and the sample configs are installed."
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="The config file, such as configs/digits.py, or the name of a sample "
        "config, such as digits, which needs no clone.",
    )
    parser.add_argument(
        "--workdir",
        metavar="FOLDER",
        help="The folder of the run, such as runs/digits. If it holds a run, that is "
        "continued.",
    )
    parser.add_argument(
        "--init-from",
        metavar="SOURCE",
        help="Begin a new run with the weights of another one, or fine-tune it: a "
        "workdir (its first EMA), WORKDIR:EMA such as runs/pets:0.999, or a checkpoint "
        "file of another code. When the run is continued, the flag may be left out.",
    )
    parser.add_argument(
        "--allow-change",
        metavar="FIELDS",
        help="Fields of the config that may differ from those of the run that is "
        "continued, such as optimizer.lr,data.path.",
    )
    parser.add_argument(
        "--check-data",
        action="store_true",
        help="Only read all images of config.data, and list those that are damaged.",
    )
    cli.add_host_flags(parser)
    args, overrides = parser.parse_known_args()
    if (args.workdir is None) != args.check_data:
        rule = "left out with" if args.check_data else "given without"
        raise ValueError(
            f"--workdir must be {rule} --check-data, got {args.workdir or 'none'}."
        )
    cli.refuse_misspelled(parser, overrides, besides=configs.FIELDS)
    cli.start_hosts(args)
    with cli.fields_as_flags(args), cli.saying_what_is_read():
        config = configs.load_config(args.config, overrides)
        if args.check_data:
            return check_data(config)
        train(
            config,
            args.workdir,
            init_from=args.init_from,
            allow_change=[*filter(None, (args.allow_change or "").split(","))],
        )


if __name__ == "__main__":
    cli.run_program(main)
