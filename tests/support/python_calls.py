"""Wrong arguments of the Python API: of each kind of argument, what is none of it.

`python -m support.python_calls FOLDER` makes the calls without jaxtyping's hook, as
users do, and prints what each raised, as JSON: {name: [start, error, message], ...}.
"""

import functools
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from support.tiny_runs import LABELS, SIZE, make_run, tiny_config, write_images

import jax_diffusion as jd
from jax_diffusion.interop.exporting import export_run

X = np.zeros((2, SIZE, SIZE, 3), np.uint8)
HALF = np.zeros((SIZE, SIZE))
HALF[:4] = 1


def only_images(split, path, image_size):
    return X


def calls_of(folder):
    """Yields (name, how the error begins, call)."""
    write_images(folder / "images.npz")
    labels: Any = LABELS
    run = jd.load_run(make_run(folder / "run", **labels))
    own, text = str(folder / "own.safetensors"), folder / "text.pt"
    export_run(run, "safetensors", own)
    text.write_bytes(b"no weights")
    np.savez(folder / "other.npz", x=np.zeros(3))
    (folder / "empty").mkdir()
    draw = functools.partial(jd.sample_images, run, n=2, steps=2)
    inpaint = functools.partial(draw, task="inpaint", label=1)
    load = functools.partial(jd.data.load, batch_size=1)
    score = functools.partial(jd.evaluate, run)
    among = functools.partial(jd.evaluate, X, reference=X)
    config = tiny_config(folder / "images.npz")

    # Paths: what takes one, its field, and the function of it.
    paths = {
        "images": {
            "inpaint": lambda v: inpaint(images=v),
            "open_images": jd.data.open_images,
            "open_stored": jd.data.open_stored,
            "parse_source": jd.data.parse_source,
        },
        "low_res": {"low_res": lambda v: draw(low_res=v)},
        "mask": {"mask": lambda v: inpaint(images=X, mask=v)},
        "data": {"data": lambda v: score(metrics=["bpd"], data=v)},
        "inception": {"fid": lambda v: score(metrics=["fid"], inception=v)},
        "feature_classifier": {
            "cnn": lambda v: score(metrics=["cnn_fd"], feature_classifier=v)
        },
        "out": {"out": lambda v: among(metrics=["pixel_distance"], out=v)},
        "save_moments": {"fid": lambda v: score(metrics=["fid"], save_moments=v)},
        "checkpoint": {"load_checkpoint": jd.load_checkpoint},
        "workdir": {"load_run": jd.load_run},
        "classifier": {"guide": lambda v: draw(classifier=v)},
        "upsample": {"upsample": lambda v: draw(upsample=v)},
        "path": {
            **{
                name: lambda v, name=name: load(name, path=v, image_size=8)
                for name in ("folder", "npz", "idx", "tfds", "digits")
            },
            "check": lambda v: jd.data.check("folder", path=v),
            "own": lambda v: load("support.python_calls:only_images", path=v),
            "save_png": lambda v: jd.plotting.save_png(v, X[0]),
        },
    }
    wrong = {
        "3": 3,
        "2.5": 2.5,
        "True": True,
        "bytes": b"x",
        "list": ["x"],
        "arrays": [X, X],
        "function": max,
        "path of bytes": PathOfBytes(),
    }
    for field, functions in paths.items():
        values = wrong | ({} if field in ("upsample",) else {"run": run})
        if field not in ("images", "low_res", "mask"):
            values["array"] = X
        for where, function in functions.items():
            for name, value in values.items():
                call = functools.partial(function, value)
                yield f"{field} of {where}: {name}", f"{field} must be ", call

    words = {
        "boolean": ("yes", 1, 0, [True]),
        "string": (3, ["a"], 2.5, X),
    }
    kinds = {
        "in_memory": ("boolean", lambda v: load("digits", in_memory=v)),
        "flip": ("boolean", lambda v: load("digits", flip=v)),
        "train_feature_classifier": (
            "boolean",
            lambda v: score(train_feature_classifier=v),
        ),
        "ignore_objects": (
            "boolean",
            lambda v: jd.load_checkpoint(own, ignore_objects=v),
        ),
        "clip": ("boolean", lambda v: draw(clip=v)),
        "split": ("string", lambda v: load("digits", v)),
        "name": ("string", lambda v: jd.load_checkpoint(own, name=v)),
        "layout": ("string", lambda v: jd.load_checkpoint(own, layout=v)),
        "inception_url": ("string", lambda v: score(metrics="fid", inception_url=v)),
        "sampler": ("string", lambda v: draw(sampler=v)),
    }
    for field, (kind, function) in kinds.items():
        for value in words[kind]:
            name = f"{field}: {type(value).__name__} {str(value)[:10]}"
            yield name, f"{field} must be ", functools.partial(function, value)
    for value in (True, 1.0, [1.0], [True], np.ones(2), {1: 2}, b"1", [None]):
        rule = "label must be an integer, a string, or a list of them, got "
        yield f"label: {value!r}", rule, functools.partial(draw, label=value)
    for value in (HALF * 7.5, HALF / 2, -HALF, np.where(HALF, 1, np.nan), HALF * 2):
        rule = "mask must be of bool, of 0 and 1, or a uint8 picture, got float64 with"
        call = functools.partial(inpaint, images=X, mask=value)
        yield f"mask: {value[0, 0]}", rule, call
    for value in (3, "lr", [3], {"lr": 1}.items()):
        rule = "allow_change must be a list of names of fields, got "
        given: Any = value
        call = functools.partial(jd.train, config, folder / "new", allow_change=given)
        yield f"allow_change: {value}", rule, call
    for value in ("pets.py", 3, ["x"], X):
        rule = "config must be a config, as load_config reads it from a file, got "
        call = functools.partial(jd.load_checkpoint, own, config=value)
        yield f"config: {value!r}", rule, call

    def of(function, *values, **fields):
        return functools.partial(function, *values, **fields)

    rows = [
        ("from_uint8", "images must be a uint8 array", of(jd.data.from_uint8, [1, 2])),
        ("to_uint8", "x must be an array of numbers", of(jd.data.to_uint8, "x")),
        ("grid", "images must be a uint8 array", of(jd.plotting.grid, "x")),
        ("columns", "columns must be an int", of(jd.plotting.grid, X, columns=0)),
        ("png", "image must be a uint8", of(jd.plotting.save_png, folder / "a", "x")),
        ("options", "options must be SamplingOptions", of(score, options=3)),
        ("no path", "path must be left out", of(load, "digits", path="x")),
        ("split", "split must be 'all' or None", of(inpaint, images=X, split="trian")),
        (
            "one image",
            "images must be [n h w c] with (h, w, c) (8, 8, 3), as the run's, got uint8"
            " [8, 8, 3].",
            of(inpaint, images=X[0]),
        ),
        ("seed", "seed must be an integer", of(draw, seed=jax.random.key(0))),
        ("ids", "ids must be integers [n]", of(draw, ids=X)),
        ("ema", "ema must be one of", of(jd.load_run, folder / "run", ema="x")),
        ("no config", "config must be the path", of(jd.load_config, 3)),
        ("no mask", "mask must be of", of(inpaint, images=X, mask=None)),
        (
            "a reader of images only",
            "name must be a reader (split, path, image_size) -> (images, labels) or "
            "data.Examples, got 'support.python_calls:only_images': it returns uint8 "
            "[2, 8, 8, 3].",
            of(load, "support.python_calls:only_images"),
        ),
        (
            "no weights",
            "inception must be the file of its weights, got 'no.pth', where no file is",
            of(among, metrics="fid", inception="no.pth"),
        ),
        ("text", "checkpoint must be a file that", of(jd.load_checkpoint, text)),
        ("no file", "path must be a .npz or .npy file", of(load, "npz", path="no.npz")),
        (
            "other arrays",
            "path must have arrays called images",
            of(load, "npz", path=folder / "other.npz"),
        ),
        (
            "no images",
            "path must hold images",
            of(load, "folder", path=folder / "empty", image_size=8),
        ),
        (
            "no digits",
            "path must hold train-images",
            of(load, "idx", path=folder / "empty"),
        ),
    ]
    yield from rows


class PathOfBytes:
    """An os.PathLike, but not of text."""

    def __fspath__(self):
        return b"x"


def main(folder):
    outcomes = {}
    for name, begins, call in calls_of(folder):
        try:
            returned = call()
            outcome = ["nothing", str(type(returned))]
        except Exception as error:
            outcome = [type(error).__name__, str(error)]
        assert name not in outcomes, name
        outcomes[name] = [begins, *outcome]
    outcomes["left in the folder"] = sorted(path.name for path in folder.iterdir())
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
