"""Fine-tuning: training that begins with the weights of a run or a checkpoint file.

`config.init_from`, or `--init-from`, says where they come from:

    runs/pets          a run, trained or converted: the first EMA of its config
    runs/pets:0.999    another of its EMAs; runs/pets:none for the last parameters
    cifar10.pt         a file or folder that `interop.importing.load_checkpoint` reads;
                       if it does not tell its network, that is the config's

Optimizer, averages, timestep sampler and step begin anew, the averages as copies of the
weights. The network must be that of the config, but for its classes: rows of labels are
matched by the names of the classes where both sides know them, by number where there
are as many. Other rows begin anew, and the program says which.

The source is read once, when the run begins, and need not exist when it is continued.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jax_diffusion import config as configs
from jax_diffusion import data
from jax_diffusion.config import Config
from jax_diffusion.models import init_params, traits
from jax_diffusion.pipeline import Run, load_run
from jax_diffusion.pipeline.run import old_names, workdir_and_ema
from jax_diffusion.runtime import checkpoint, sharding
from jax_diffusion.runtime.files import leaves_by_name
from jax_diffusion.training import TrainState
from jax_diffusion.training.setup import TrainingSetup

HIDDEN = "(hidden)"  # the row of hidden labels, in messages and for matching
SHOWN = 3  # differences of shapes that a message shows


class Weights(NamedTuple):
    """Parameters to begin with, on the host.

    Attributes:
        params: all parameters of the network by name, as of `leaves_by_name`.
        record: where they come from, plain JSON values: "source", "ema" and "step";
            "parameters" in all and "kept"; the arrays and rows that begin "anew", the
            arrays of the source that are "left_out", and as "differs" the fields of
            schedule, objective and model that the source had otherwise.
    """

    params: dict[str, np.ndarray]
    record: dict[str, Any]

    def report(self) -> str:
        """Says what is kept and what is not, a line each."""
        told = self.record
        ema = "" if told["ema"] == "none" else f"EMA {told['ema']}, "
        lines = [
            f"{told['source']}: {ema}step {told['step']}",
            f"{told['kept']:,} of {told['parameters']:,} parameters are kept",
        ]
        lines = [" " + ", ".join(lines)]
        for key, words in (
            ("anew", ": these begin anew"),
            ("left_out", ": left out"),
            ("differs", ": this differs from it"),
        ):
            if told[key]:
                lines.append(f"{words}: {'; '.join(told[key])}")
        return "\n".join(f"init_from{line}" for line in lines)


def load_weights(source: Run | str, config: Config, setup: TrainingSetup) -> Weights:
    """Reads the weights to begin with, and fits them to the network of a config.

    On several hosts, all of them call it.

    Args:
        source: as `config.init_from`, or a run.
        config: a whole config, of the training that begins.
        setup: what it describes.

    Raises:
        ValueError: if the source cannot be read, or is of another network.
    """
    run = source if isinstance(source, Run) else load_source(source, config)
    given = leaves_by_name(run.params)
    shapes = leaves_by_name(jax.eval_shape(setup.init).params)
    ours = classes_of(
        *(setup.model, setup.batches.image_shape, config.label_dropout),
        setup.batches.class_names,
    )
    names = old_names(run) if run.class_names is None else run.class_names
    if names == ():  # as nobody knows them, they are none of ours
        names = [f"class {i} of version 0.1" for i in range(run.num_labels)]
    theirs = classes_of(
        *(run.model, run.image_shape, run.config.get("label_dropout", 0.0)),
        names,
    )
    differs = configs.differences(_plain(run.config), _plain(config))
    differs = [
        d for d in differs if d.startswith(("model.", "objective.", "schedule."))
    ]
    check_fit(given, shapes, ours, theirs, differs)
    rows, anew = match_rows(ours, theirs), []
    params = draw_params(setup, ours.axes)
    kept = sum(a.size for a in params.values())
    for name, axis in ours.axes.items():
        array = np.moveaxis(params[name], axis, 0)  # a view
        fresh = [*range(len(array))]
        if name in given:
            old = np.moveaxis(given.pop(name), theirs.axes[name], 0)
            for row, their_row in rows.items():
                array[row] = old[their_row]
            fresh = [row for row in fresh if row not in rows]
        kept -= len(fresh) * array[0].size
        if fresh:
            anew.append(f"{name} of {', '.join(str(ours.keys[row]) for row in fresh)}")
    for name in shapes:
        if name not in params:
            params[name] = np.asarray(given.pop(name), np.float32)
            kept += params[name].size
    record = {
        "source": source if isinstance(source, str) else str(run.workdir or "a run"),
        **dict(ema=run.ema, step=run.step, kept=kept, anew=anew, left_out=[*given]),
        "parameters": sum(a.size for a in params.values()),
        "differs": differs,
    }
    return Weights(params, record)


def load_source(source: str, config: Config) -> Run:
    """Loads the run or the checkpoint file that `config.init_from` names.

    Args:
        source: WORKDIR, WORKDIR:EMA or a checkpoint.
        config: describes the network of a file whose name says nothing.

    Raises:
        ValueError: if it is not there or cannot be read.
    """
    # Most runs begin with random weights, and start without these modules.
    from jax_diffusion.interop.importing import load_checkpoint
    from jax_diffusion.interop.released import RELEASED

    rule = "init_from must be WORKDIR, WORKDIR:EMA or a checkpoint that can be read"
    place, ema = workdir_and_ema(source)
    if not place.exists():
        raise ValueError(f"{rule}, got {source!r}, which is not there.")
    try:
        if ema is not None or checkpoint.latest_step(place) is not None:
            return load_run(place, ema)
        try:  # its name, or the file itself, may tell what network it is of
            return load_checkpoint(place)
        except ValueError:
            if place.stem in RELEASED:
                raise
            return load_checkpoint(place, config=config)
    except ValueError as error:
        raise ValueError(f"{rule}, got {source!r}: {error}") from error


class Classes(NamedTuple):
    """The parameters of a network that have a row for each class.

    Attributes:
        axes: by name of the parameter, along which axis.
        keys: what each row is for: the name of the class, its number if it has no
            name, or `HIDDEN`.
    """

    axes: dict[str, int]
    keys: list[str | int]


def classes_of(
    model: Any, image_shape: tuple[int, ...], label_dropout: float, names: Any
) -> Classes:
    """Finds the parameters with a row for each class: one class more makes them larger.

    Args:
        model: the network.
        image_shape: (h, w, c).
        label_dropout: the last row is for hidden labels unless this is 0.
        names: names of the classes; None if unknown.
    """
    known = traits(model)
    field = "num_classes" if known.num_labels is None else "num_labels"
    count = getattr(known, field)
    if not count:
        return Classes({}, [])
    before, after = (
        shapes_of(m, image_shape) for m in (model, model.clone(**{field: count + 1}))
    )
    axes = {}
    for name, shape in before.items():
        larger = [i for i, n in enumerate(after[name]) if n != shape[i]]
        if larger:
            axes[name] = larger[0]
    keys: list[str | int] = [*range(count)]
    keys[: len(names or ())] = names or ()
    if label_dropout:
        keys[-1] = HIDDEN
    return Classes(axes, keys)


def match_rows(ours: Classes, theirs: Classes) -> dict[int, int]:
    """Finds the row of the source for rows of the network, by number of the row.

    By the names of the classes if both sides have some; else by number, if there are as
    many. A number is a name to the side whose classes are all called by numbers. The
    row of hidden labels is matched in any case.
    """
    ours, theirs = (
        Classes(
            c.axes, [str(k) if isinstance(k, int) and called else k for k in c.keys]
        )
        for c, called in ((ours, by_numbers(theirs)), (theirs, by_numbers(ours)))
    )
    named = [
        any(isinstance(k, str) and k != HIDDEN for k in c.keys) for c in (ours, theirs)
    ]
    counts = [len([k for k in c.keys if k != HIDDEN]) for c in (ours, theirs)]
    rows = {}
    for row, key in enumerate(ours.keys):
        if key == HIDDEN or (all(named) and isinstance(key, str)):
            if key in theirs.keys:
                rows[row] = theirs.keys.index(key)
        elif not all(named) and counts[0] == counts[1]:
            rows[row] = row
    return rows


def by_numbers(classes: Classes) -> bool:
    """Tells whether all classes have names, and all names are numbers."""
    names = [key for key in classes.keys if key != HIDDEN]
    return all(isinstance(k, str) for k in names) and bool(
        data.numbers_called([str(k) for k in names])
    )


def make_init(
    params: dict[str, np.ndarray], setup: TrainingSetup, shardings: PyTree
) -> Callable[[], TrainState]:
    """Builds init() -> state, which begins with these parameters; it is called once.

    Each array is handed to the devices, where each gets its part, and then forgotten:
    the host holds the parameters once, and the devices once more than in training.

    Args:
        params: of `load_weights`; emptied by the call.
        setup: of the training.
        shardings: where each leaf of the state goes.
    """
    begin = jax.jit(
        # Copied, as the state is donated to the step and NumPy's memory is not ours.
        lambda placed: setup.start(jax.tree.map(jnp.copy, placed)),
        out_shardings=shardings,
    )

    def place(path, sharding):
        array = params.pop(jax.tree_util.keystr(path, simple=True, separator="/"))
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return lambda: begin(jax.tree_util.tree_map_with_path(place, shardings.params))


def _plain(config: Config) -> dict[str, Any]:
    return json.loads(config.to_json())


def shapes_of(model: Any, image_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), image_shape))
    return {name: a.shape for name, a in leaves_by_name(shapes).items()}


def check_fit(
    given: Mapping[str, Any],
    shapes: Mapping[str, Any],
    ours: Classes,
    theirs: Classes,
    differs: list[str],
) -> None:
    """Checks that all parameters but the rows of classes have the same shapes.

    Args:
        given: arrays of the source by name.
        shapes: those of the network.
        ours, theirs: their classes.
        differs: fields of the config that differ, for the error.

    Raises:
        ValueError: that tells how many do not fit, and the first of them.
    """

    def shape_of(name, arrays, classes):
        if name not in arrays:
            return None
        shape = tuple(arrays[name].shape)
        if name in classes.axes:
            shape = tuple(n for i, n in enumerate(shape) if i != classes.axes[name])
        return shape

    misfits = []
    for name in sorted(given.keys() | shapes.keys()):
        got, wanted = shape_of(name, given, theirs), shape_of(name, shapes, ours)
        absent = (got is None and name in ours.axes) or (
            wanted is None and name in theirs.axes
        )
        if got != wanted and not absent:
            misfits.append(f"{name} {got or '(none)'} -> {wanted or '(none)'}")
    if misfits:
        more = [line for line in differs if line.startswith("model.")]
        raise ValueError(
            "init_from must hold the network of this config, got "
            f"{len(misfits)} arrays of {len(shapes)} that do not fit: "
            f"{'; '.join(misfits[:SHOWN] + more)}."
        )


def draw_params(
    setup: TrainingSetup, names: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Draws some of the random parameters, as a run without init_from begins with."""
    if not names:
        return {}

    def draw():
        params = leaves_by_name(setup.init().params)
        return {name: params[name] for name in names}

    drawn = jax.jit(draw, out_shardings=sharding.replicated(setup.mesh))()
    return {name: np.array(array) for name, array in drawn.items()}
