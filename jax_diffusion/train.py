"""Trains a run from a config, and continues it after any stop.

    python -m jax_diffusion.train --config configs/digits.py --workdir runs/digits

The same command continues a run that was stopped, bit for bit on the same number of
devices. It is the same on one device, on several, and on every host of a pod (see
`jax_diffusion.runtime.sharding`).

A run is its workdir:

    checkpoints/     state and config, every config.save_every updates
    metrics.jsonl    a line every config.log_every updates (see `runtime.logs`)
    run.json         command, config, commit, versions and hardware of every start
    samples/         a grid every config.sample_every updates
    best/            the best average, if config.eval_every is given
    loss.png         the loss curve, in the end
"""

import contextlib
import json
from pathlib import Path

import jax
import optax

from jax_diffusion import cli
from jax_diffusion import config as configs
from jax_diffusion.config import Config
from jax_diffusion.evaluation import during_training
from jax_diffusion.runtime import checkpoint, cpu, logs, sharding
from jax_diffusion.runtime.preemption import PreemptionSignal
from jax_diffusion.training import TrainState
from jax_diffusion.training.reporting import Reporter, plain, trace_steps
from jax_diffusion.training.setup import compile_step, make_setup

GIVEN = {"name": "given to train()"}  # config.optimizer of a run with its own optimizer


def train(
    config: Config,
    workdir: str | Path,
    *,
    optimizer: optax.GradientTransformation | None = None,
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

    Returns:
        The state after the last update.

    Raises:
        ValueError: for bad input, before anything is written.
        FloatingPointError: if too many updates in a row were not finite, after saving.
    """
    config, workdir = configs.complete(config), Path(workdir)
    if optimizer is not None:
        config.optimizer = GIVEN
    configs.check_config(config)
    logs.check_writers(config.log_to)
    record = {"config": json.loads(config.to_json()), "window": []}
    record["format"] = configs.FORMAT
    if not sharding.same_on_all_hosts(json.dumps(record["config"], sort_keys=True)):
        raise ValueError("all processes must be given one config, got several.")
    fresh = checkpoint.latest_step(workdir) is None
    if not fresh:
        saved = configs.upgrade(checkpoint.load_record(workdir))["config"]
        changed = configs.differences(saved, record["config"])
        if changed:
            raise ValueError(
                f"workdir {str(workdir)!r} holds a run with another config, which must "
                f"not change: {'; '.join(changed)}."
            )

    # Compiled first: whatever does not fit is found before anything is written.
    setup = make_setup(config, optimizer)
    record["image_shape"] = list(setup.batches.image_shape)
    evaluate = during_training.make_watch(config, workdir, setup, record)
    compiled = compile_step(setup, fresh=fresh)
    cpu.release_memory()
    if jax.process_index() == 0:
        print(compiled.summary, flush=True)

    manager = checkpoint.make_manager(
        workdir, keep=config.keep, keep_every=config.keep_every or None
    )
    state, saved = checkpoint.restore_or_init(
        manager, compiled.init, compiled.shardings
    )
    first = step = int(state.step)
    reporter, problem = Reporter(config, workdir, setup, compiled, first), ""
    reporter.window = saved["window"] if saved else []
    clock, batches = reporter.clock, setup.batches.stream(first, setup.rows)
    with PreemptionSignal().listen() as stop, contextlib.closing(batches), reporter:
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
                    checkpoint.save(manager, step, state, record)
    manager.close()  # waits for the last checkpoint
    if problem:
        raise FloatingPointError(problem)
    reporter.finish(step, stop.name)
    return state


def main() -> None:
    """Parses the command line and trains."""
    parser = cli.make_parser("train", __doc__, allow_abbrev=False)
    parser.epilog = (
        "Any field of the config can be changed, as with --config.total_steps=60 or "
        "--config.model.channels=64."
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="The config file, such as configs/digits.py.",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="FOLDER",
        help="The folder of the run, such as runs/digits. If it holds a run, that is "
        "continued.",
    )
    cli.add_host_flags(parser)
    args, overrides = parser.parse_known_args()
    cli.start_hosts(args)
    train(configs.load_config(args.config, overrides), args.workdir)


if __name__ == "__main__":
    cli.run_program(main, long=True)
