"""Exports a sampler to one file, which runs without this package and without Flax.

`write` makes FILE, the program that `jax.export` serializes followed by its SHA-256;
FILE.json, a description of the program, its inputs and its output; and FILE.npz if the
weights are kept apart. The program draws any number of images on a CPU, a GPU or a TPU;
it has been run on CPUs only. The machine that draws needs

    pip install jax flatbuffers

with a jax at least as new as the one that wrote the file. The one that writes needs
`pip install 'jax_diffusion[export]'`. The following script, saved as draw.py, draws the
images 0 to N - 1 of a seed: `python draw.py FILE SEED N images.npy`. It takes all
labels in turn, as `sample` does. If a network is told vectors or tokens, `draw` takes
them after the labels as {"cond": [n, d], "tokens": [n, k, d], "tokens_mask": [n, k]}.

    import hashlib
    import json
    import sys

    import jax.export
    import numpy as np

    path, seed, n, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    data, record = open(path, "rb").read(), json.load(open(path + ".json"))
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        sys.exit("error: the file is not the one that its .json describes.")
    weights = dict(np.load(path + ".npz")) if record["weights"] else {}
    draw = jax.jit(jax.export.deserialize(bytearray(data)).call)
    ids = np.arange(n, dtype=np.int32)
    label = ids % (record["inputs"]["label"]["num_labels"] or 1)
    images = draw(weights, np.uint32(seed), ids, label)  # [n, h, w, c] in [-1, 1]
    np.save(out, images)
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from jaxtyping import Array, PyTree

from jax_diffusion import checks
from jax_diffusion.runtime import files, untrusted

PLATFORMS = ("cpu", "cuda", "tpu")
MAX_INSIDE = 2**31 - 2**24  # bytes of weights: a flatbuffer holds less than 2 GiB
MAX_CONVENTION = jax.export.maximum_supported_calling_convention_version
DIGEST = hashlib.sha256().digest_size

DrawFn = Callable[..., Array]  # (params, seed, ids [b], label [b]) -> images [b, ...]
Sampler = Callable[..., Array]  # (seed, ids [b], label [b] = None) -> images [b, ...]
Conditioning = Mapping[str, tuple[str, Any]]  # name -> axes after b, as "k, 5"; dtype


def export_sampler(
    draw: DrawFn,
    params: PyTree,
    *,
    beside: bool = False,
    conditioning: Conditioning | None = None,
) -> bytes:
    """Serializes a sampler, for batches of any size.

    The serialized function is f(weights, seed, ids, label) -> images. Its `weights` are
    {} if they are inside the program, else a flat dict {"a/b/c": array}.

    Args:
        draw: pure function draw(params, seed, ids, label) -> images: seed is a uint32
            scalar, ids and label are int32 [b], images are float32 [b, h, w, c] in
            [-1, 1]. Image i may depend only on seed, ids[i] and label[i], because draw
            is traced for a single image.
        params: the parameters; every array is whole in this process.
        beside: whether the weights are left out, to be passed by the caller.
        conditioning: what draw takes by name, arrays [b, ...]; f takes it as a
            dict after label.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: if the package flatbuffers is missing, if the weights are too large
            to be inside or have a dtype that .npz cannot hold, or if draw returns
            anything but one float32 array.
    """
    _check_flatbuffers()
    inside, structure = _flat(params), jax.tree.structure(params)
    size = sum(array.nbytes for array in inside.values())
    if size > MAX_INSIDE and not beside:
        raise ValueError(
            f"weights of over {MAX_INSIDE} bytes must lie beside the sampler, got "
            f"{size}."
        )

    def sampler(weights, seed, ids, label, *cond):
        source = weights if beside else inside
        tree = jax.tree.unflatten(structure, [source[name] for name in inside])

        def one(number, its_label, *its_cond):
            more = {name: a[None] for some in its_cond for name, a in some.items()}
            return draw(tree, seed, number[None], its_label[None], **more)[0]

        return jax.vmap(one)(ids, label, *cond)

    scope = jax.export.SymbolicScope()

    def of_batch(axes, dtype):
        shape = jax.export.symbolic_shape(f"b, {axes}", scope=scope)
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = of_batch("", np.int32)
    cond = {name: of_batch(*kind) for name, kind in (conditioning or {}).items()}
    exported = jax.export.export(jax.jit(sampler), platforms=PLATFORMS)(
        inside if beside else {}, np.uint32(0), numbers, numbers, *[cond] * bool(cond)
    )
    if [a.dtype for a in exported.out_avals] != [np.float32]:
        raise ValueError(
            f"draw must return one float32 array, got {exported.out_avals}."
        )
    body = bytes(exported.serialize())
    # A flatbuffer has no checksum; readers ignore what follows its end.
    return body + hashlib.sha256(body).digest()


def load_sampler(
    data: bytes,
    *,
    record: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> Sampler:
    """Makes a sampler of the bytes that `export_sampler` returned.

    Args:
        data: the bytes. They are a program, which is run: use trusted files only.
        record: content of FILE.json, to check data and labels against.
        weights: the weights {"a/b/c": array}, if they are not inside.

    Returns:
        sampler(seed, ids, label=None, **cond) -> images. The seed is an integer, ids
        and label are integers [b], conditioning has its name and arrays [b, ...],
        images are float32 [b, h, w, c] in [-1, 1] on the default device. It is compiled
        once for each b. It raises ValueError for other shapes, for conditioning that is
        missing and, given a record, for labels that are missing or out of range.

    Raises:
        ValueError: if the package flatbuffers is missing; if the data are damaged, are
            not those of the record, or cannot run with this jax on this device; or if
            the weights do not fit.
    """
    _check_flatbuffers()
    if not isinstance(data, bytes):
        raise ValueError(f"data must be the bytes of a file, got {checks.shown(data)}.")
    record = dict(record or {})
    if record:
        _check_record(record)
    if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
        raise ValueError(
            "a sampler must be whole and written by jax_diffusion.export, got "
            f"{len(data)} bytes that are damaged or something else."
        )
    if record and record.get("sha256") != _sha256(data):
        raise ValueError(
            f"the sampler must be that of its side-car, sha256 {record.get('sha256')}, "
            f"got {_sha256(data)}."
        )
    call, weights, told = _call(data, record, dict(weights or {}))
    num_labels = record["inputs"]["label"]["num_labels"] if record else None

    def sampler(seed, ids, label=None, **cond):
        ids = _numbers("ids", ids)
        if label is None and not num_labels:
            label = np.zeros_like(ids)  # the program ignores it
        label = _numbers("label", label)
        if ids.shape != label.shape:
            raise ValueError(
                f"label must have the shape of ids, {ids.shape}, got {label.shape}."
            )
        if num_labels and not np.all((label >= 0) & (label < num_labels)):
            raise ValueError(f"labels must be in [0, {num_labels}), got {label}.")
        if cond.keys() != told.keys():
            rule = f"the sampler must be told {', '.join(told) or 'no conditioning'}"
            raise ValueError(f"{rule}, got {', '.join(cond) or 'none'}.")
        for name, aval in told.items():
            sizes = [n if isinstance(n, int) else str(n) for n in aval.shape[1:]]
            kind = "bool" if aval.dtype == bool else "float"
            given = np.asarray(cond[name])
            if kind == "float" and given.dtype.kind in "iuf":  # a mask is not rounded
                given = given.astype(aval.dtype)
            cond[name] = given
            checks.array(name, cond[name], kind, (len(ids), *sizes))
        numbers = np.uint32(seed % 2**32), ids, label
        return call(weights, *numbers, *[cond] * bool(cond))

    return sampler


def write(
    path: str | Path,
    draw: DrawFn,
    params: PyTree,
    *,
    beside: bool = False,
    num_labels: int | None = None,
    conditioning: Conditioning | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a sampler: FILE, its description FILE.json, and perhaps FILE.npz.

    Files appear whole or not at all, and `read` refuses files of different exports.

    Args:
        path: FILE; folders are made.
        draw: the sampler, see `export_sampler`.
        params: the parameters, see `export_sampler`.
        beside: whether the weights go to FILE.npz.
        num_labels: labels are in [0, num_labels); None if draw ignores labels.
        conditioning: what draw takes, see `export_sampler`.
        about: further content of FILE.json, under "about": plain JSON values.

    Returns:
        The content of FILE.json.

    Raises:
        ValueError: as `export_sampler` does.
    """
    for suffix in ("", ".json", *([".npz"] if beside else [])):
        files.check_output("path", f"{os.fspath(path)}{suffix}")
    path = Path(path)
    data = export_sampler(draw, params, beside=beside, conditioning=conditioning)
    record = {"file": path.name, "sha256": _sha256(data), "weights": None}
    content: dict[Path, files.Content] = {path: data}
    if beside:
        buffer = io.BytesIO()
        np.savez(buffer, **_flat(params))  # type: ignore[arg-type]
        file, weights = Path(f"{path}.npz"), buffer.getvalue()
        content[file] = weights
        record["weights"] = {"file": file.name, "sha256": _sha256(weights)}
    record |= {**_describe(data, num_labels), "about": dict(about or {})}
    content[Path(f"{path}.json")] = files.json_text(record, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_all_atomic(content)
    return record


def read(path: str | Path) -> Sampler:
    """Reads the sampler that `write` wrote.

    Args:
        path: FILE; FILE.json, and perhaps FILE.npz, lie beside it.

    Returns:
        The sampler, see `load_sampler`.

    Raises:
        ValueError: as `load_sampler` does, or if a file is missing or belongs to
            another export.
    """
    path = Path(path)
    record = untrusted.read_json(f"{path}.json")
    weights = None
    try:
        _check_record(record)
        data = path.read_bytes()
        if record["weights"]:
            beside = Path(f"{path}.npz")
            if files.sha256_of_file(beside) != record["weights"]["sha256"]:
                raise ValueError("the weights are not those of the sampler")
            weights = files.read_npz(beside)
    except OSError as error:
        raise ValueError(
            f"{error.filename} must be there: {error.strerror}."
        ) from error
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{path} cannot be read with its side-car: {reason}."
        ) from error
    return load_sampler(data, record=record, weights=weights)


def _check_record(record: Mapping[str, Any]) -> None:
    """Checks the fields of a side-car that are used.

    Raises:
        ValueError: that names the field.
    """
    texts = ["sha256", "versions.jax"]
    if record.get("weights", "") is not None:  # they lie beside the sampler
        texts.append("weights.sha256")
    for name in texts:
        value = _inside(record, *name.split("."))
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, got {value!r:.80}.")
    label = _inside(record, "inputs", "label")
    if not isinstance(label, dict) or "num_labels" not in label:
        raise ValueError(f"inputs.label must have num_labels, got {label!r:.80}.")
    if label["num_labels"] is not None:
        checks.integer("num_labels", label["num_labels"], at_least=0)


def _inside(record: Mapping[str, Any], *names: str) -> Any:
    """Returns a field of a dict inside of dicts; None if there is none."""
    found: Any = record
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _call(data, record, weights):
    """Returns the compiled call, the weights on the device, and what else it takes."""
    mine = f"jax {jax.__version__} on {jax.default_backend()}"
    theirs = f"jax {record['versions']['jax']}" if record else "another jax"
    try:
        exported = jax.export.deserialize(bytearray(data))
        if exported.calling_convention_version > MAX_CONVENTION:  # JAX does not check
            raise ValueError("its calling convention is newer")
        (wanted, *numbers), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)

        def zeros(a):  # of one image
            return np.zeros([n if isinstance(n, int) else 1 for n in a.shape], a.dtype)

        one = jax.tree.map(zeros, numbers)
        call = jax.jit(exported.call)
        call.lower(wanted, *one)  # reads the program itself, which may be too new
    except Exception as error:  # of many kinds, from many layers of JAX
        raise ValueError(
            f"{mine} cannot run the sampler that {theirs} exported: "
            f"{str(error).splitlines()[0].rstrip('.')}."
        ) from error
    if {n: (a.shape, a.dtype) for n, a in wanted.items()} != {
        n: (np.shape(a), a.dtype) for n, a in weights.items()
    }:
        raise ValueError(
            f"weights must be the {len(wanted)} arrays that lie beside the sampler, "
            f"got {len(weights)} that are not those."
        )
    return call, jax.device_put(weights), dict(*numbers[3:])


def _describe(data, num_labels):
    """Returns what FILE.json says about inputs, output and versions."""
    exported = jax.export.deserialize(bytearray(data))

    def shaped(aval):
        sizes = [d if isinstance(d, int) else str(d) for d in aval.shape]
        return {"shape": sizes, "dtype": str(aval.dtype)}

    avals, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    names = ("weights", "seed", "ids", "label", "cond")[: len(avals)]
    inputs = dict(zip(names, jax.tree.map(shaped, avals), strict=True))
    inputs["label"]["num_labels"] = num_labels
    return {
        "usage": f"jax.export.deserialize(data).call({', '.join(names)}) -> images, "
        "after pip install jax flatbuffers; see jax_diffusion/export.py",
        "versions": {
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "jax_diffusion": sys.modules[__name__.partition(".")[0]].__version__,
        },
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "inputs": inputs,
        "output": {**shaped(exported.out_avals[0]), "range": [-1, 1]},
    }


def _flat(params):
    """Returns the leaves of a tree by name, {"a/b/c": array}."""
    leaves = files.leaves_by_name(jax.device_get(params))
    weights = {name: np.asarray(array) for name, array in leaves.items()}
    for name, array in weights.items():
        if array.dtype.kind == "V":  # bfloat16 and the like
            raise ValueError(f"weights must be float32, got {array.dtype}: {name}.")
    return weights


def _check_flatbuffers():
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError(
            "exported samplers need the package flatbuffers: pip install "
            "'jax_diffusion[export]'."
        )


def _numbers(name, value):
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a vector of integers, got {value!r}.")
    return array.astype(np.int32)


def _sha256(data):
    return hashlib.sha256(data).hexdigest()
