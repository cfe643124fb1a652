"""Wrong files of every kind that `convert` and the reader of exports may meet.

`make(folder)` writes them and returns, for each, its name and the call that must refuse
it: the arguments of `convert` behind --checkpoint PATH, or "export".
"""

import contextlib
import io
import json
import pickle
import resource
import shutil
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from jax_diffusion.interop import safetensors_files, torch_files
from jax_diffusion.interop.importing import RECORD

NAMED = ("--name", "cifar10_uncond_50M_500K")


def pickled_zip(data, entries=(("data/0", bytes(24)),), compression=0):
    """A .pt file with this pickle; entries are names and contents."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in entries:
            archive.writestr(f"a/{name}", content)
    return out.getvalue()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def storage(kind="FloatStorage", count=6, key="0"):
    pid = text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    return b"(" + pid + number(count) + b"tQ"


def tensor(size=(2, 3), stride=(3, 1), offset=0, numbers=None):
    """The instructions for one tensor."""
    sizes = b"(" + b"".join(map(number, size)) + b"t"
    strides = b"(" + b"".join(map(number, stride)) + b"t"
    rest = b"\x89ccollections\nOrderedDict\n)R"
    start = b"ctorch._utils\n_rebuild_tensor_v2\n("
    numbers = storage() if numbers is None else numbers
    return start + numbers + number(offset) + sizes + strides + rest + b"tR"


def state(*items):
    """A pickle of a dict of instructions by name."""
    inside = b"".join(text(name) + value for name, value in items)
    return b"\x80\x02}(" + inside + b"u."


def call(module, name, arguments=b")"):
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def pickles():
    """Name -> a pickle that must be refused, or a dict without a known network."""
    one = ("w", tensor())
    shared = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    yield "no instructions", b"\x80\x02."
    yield "a number", b"\x80\x02K\x01."
    yield "a list", b"\x80\x02]."
    yield "an empty dict", b"\x80\x02}."
    yield "shared tuples as a key", b"\x80\x02}" + shared + b"K\x01s."
    yield "deep tuples", b"\x80\x02)" + b"\x85" * 900_000 + b"."
    yield "3 million tuples", b"\x80\x02)" + b"\x85" * 3_000_000 + b"."
    yield "deep lists", b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
    yield "3 million dicts", b"\x80\x02(" + b"}" * 3_000_000 + b"l."
    yield "a list in itself", b"\x80\x02]q\x00h\x00a."
    yield "shared sizes", b"\x80\x02" + shared + b"q\xff" + b"\x85."
    yield "wrong memo", b"\x80\x02h\x05."
    yield "stack underflow", b"\x80\x02ttt."
    yield "no mark", b"\x80\x02K\x01t."
    yield "odd items", b"\x80\x02}(K\x01u."
    yield "cut off", state(one)[:-30]
    yield "no stop", state(one)[:-1]
    yield "items of a tuple", b"\x80\x02)K\x01K\x01s."
    yield "build of a name", b"\x80\x02ctorch\nSize\n}b."
    yield "reduce of a number", b"\x80\x02K\x01)R."
    yield "no arguments", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."
    yield "ext", b"\x80\x02\x82\x01."
    yield "persid", b"\x80\x02P1\n."
    yield "inst", b"\x80\x02(ios\nsystem\n."
    yield "obj", b"\x80\x02(cos\nsystem\no."
    yield "long4", b"\x80\x02\x8b\xff\xff\xff\x7f."
    yield "a huge string", b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x."
    yield "bad utf-8", b"\x80\x02X\x02\x00\x00\x00\xff\xfe."
    yield "a namespace", state(one, ("args", call("argparse", "Namespace")))
    yield "numpy", state(one, ("s", call("numpy.core.multiarray", "scalar")))
    yield "system", state(one, ("s", call("os", "system", text("true") + b"\x85")))
    yield "eval", state(one, ("s", call("builtins", "eval", text("1") + b"\x85")))
    yield "unprintable", state(("w\n\x00", tensor()))
    sizes = {
        "beyond": tensor((2, 4), (4, 1)),
        "huge": tensor((2**62, 2**62), (1, 1)),
        "expanded": tensor((2**40, 2), (0, 1)),
        "negative": tensor((-2, -3), (3, 1)),
        "negative stride": tensor((2, 3), (3, -1)),
        "ranks": tensor((2, 3), (1,)),
        "offset": tensor(offset=2**40),
        "count": tensor(numbers=storage(count=2**40)),
        "negative count": tensor(numbers=storage(count=-1)),
        "kind": tensor(numbers=storage("DoubleStorage")),
        "unknown kind": tensor(numbers=storage("ComplexFloatStorage")),
        "key": tensor(numbers=storage(key="../../etc/passwd")),
        "no storage": tensor(numbers=b"K\x01"),
        "tuple storage": tensor(numbers=b"()tQ"),
        "quantized": call("torch._utils", "_rebuild_qtensor"),
    }
    yield from ((f"tensor: {name}", state(("w", t))) for name, t in sizes.items())


def torch_contents():
    """Name -> bytes of a file that ends in .pt."""
    good = pickled_zip(state(("w", tensor())))
    for name, data in pickles():
        yield name, pickled_zip(data)
    for cut in (1, 10, 40, 100, 200, len(good) // 2, len(good) - 1, len(good) - 22):
        yield f"cut at {cut}", good[:cut]
    for place in range(0, len(good), 29):
        flipped = bytearray(good)
        flipped[place] ^= 0xFF
        yield f"flipped at {place}", bytes(flipped)
    yield "empty", b""
    yield "one byte", b"\x80"
    yield "zeros", bytes(1000)
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    yield "html", b"<!DOCTYPE html>\n<html><body>404</body></html>"
    yield "xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
    yield "json", b'{"error": "Repository not found"}'
    yield "text", b"no checkpoint\n"
    yield "latin text", "kein Prüfpunkt".encode("latin-1")
    yield "png", b"\x89PNG\r\n\x1a\n" + bytes(100)
    yield "gzip", b"\x1f\x8b\x08" + bytes(100)
    yield "hdf5", b"\x89HDF\r\n\x1a\n" + bytes(100)
    yield "npy", b"\x93NUMPY\x01\x00" + bytes(100)
    yield "plain pickle", pickle.dumps({"a": 1})
    yield "numpy pickle", pickle.dumps({"a": np.zeros(3)})
    yield "noise", np.random.default_rng(0).bytes(3000)
    yield "compressed", pickled_zip(state(), compression=zipfile.ZIP_DEFLATED)
    big = pickled_zip(b"\0" * 10_000_000, compression=zipfile.ZIP_DEFLATED)
    yield "compressed zeros", big
    yield "another zip", pickled_zip(b"").replace(b"data.pkl", b"date.pkl")
    yield "big-endian", pickled_zip(state(), [("byteorder", b"big")])
    yield "two pickles", pickled_zip(state(), [("b/data.pkl", state())])
    yield "overlapping entries", overlapping()
    yield "legacy magic only", pickle.dumps(torch_files.LEGACY_MAGIC, 2)


def overlapping():
    """An archive of which every entry claims the same megabyte."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", state(("w", tensor())))
        archive.writestr("a/data/0", bytes(2**20))
        for key in range(1, 60):
            info = zipfile.ZipInfo(f"a/data/{key}")
            first = archive.infolist()[1]
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = first.file_size
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    return out.getvalue()


def safetensors(header, body=bytes(24), length=None):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def safetensors_contents():
    """Name -> bytes of a file that ends in .safetensors."""
    yield "empty", b""
    yield "short", b"abc"
    yield "long header", safetensors({}, length=2**60)
    yield "header over the file", safetensors({}, length=1000)
    headers = {
        "no JSON": b"{",
        "a list": [],
        "deep": b"[" * 100_000,
        "deep dict": b'{"a":' * 100_000,
        "a null": {"w": None},
        "a list entry": {"w": [1]},
        "no dtype": {"w": {}},
        "more fields": {"w": entry(x=1)},
        "unknown dtype": {"w": entry("F128")},
        "list dtype": {"w": entry(["F32"])},
        "shape": {"w": entry(shape=(2, 4))},
        "negative shape": {"w": entry(shape=(-2, -3))},
        "huge shape": {"w": entry(shape=(2**62, 2**62))},
        "true shape": {"w": entry(shape=(True, 6))},
        "float shape": {"w": entry(shape=(2.0, 3.0))},
        "text shape": {"w": entry(shape="23")},
        "deep shape": {"w": entry(shape=[[2], [3]])},
        "1000 axes": {"w": entry(shape=(1,) * 1000)},
        "one offset": {"w": entry(offsets=(24,))},
        "negative offsets": {"w": entry(offsets=(-24, 0))},
        "reversed": {"w": entry(offsets=(24, 0))},
        "beyond": {"w": entry(offsets=(8, 32))},
        "a gap": {"w": entry(shape=(5,), offsets=(4, 24))},
        "overlap": {"w": entry(), "v": entry()},
        "NaN": b'{"w": NaN}',
        "infinity": b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0]}}',
        "a long number": b'{"w": ' + b"9" * 10_000 + b"}",
        "twice": b'{"w": 1, "w": 2}',
        "metadata list": {"__metadata__": [1], "w": entry()},
        "metadata numbers": {"__metadata__": {"a": 1}, "w": entry()},
        "unprintable": {"w\n\u0000": entry()},
        "no tensors": {"__metadata__": {}},
        "bad utf-8": b'{"\xff": 1}',
    }
    yield from ((name, safetensors(header)) for name, header in headers.items())
    yield "cut", safetensors({"w": entry()})[:-1]
    yield "more bytes", safetensors({"w": entry()}) + b"x"
    yield "html", b"<html></html>"
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\n"


WRONG_UNETS = {
    "sample_size": [None, 0, -8, 2**40, "8", [8], [8, 8, 8], [8, "8"], {}, True, 7],
    "in_channels": [None, 0, -1, 10**9, "3", [3], 3.5],
    "out_channels": [None, 0, 10**12, [3]],
    "block_out_channels": [
        *(None, [], 8, "88", [8], [8, 16, 32], [8, 0], [8, -16], [8, "16"]),
        *([10**9, 10**9], [8, 1e400], [[8], [16]], [8] * 100_000),
    ],
    "layers_per_block": [0, -1, 10**9, 50_000, "1", None, [1], 1.5],
    "down_block_types": [None, [], "ab", [1, 2], [["a"], ["b"]], ["X", "Y"], {}],
    "up_block_types": [None, [], [None, None], ["UpBlock2D", "UpBlock2D"]],
    "attention_head_dim": [0, -8, 7, "8", [8], 10**30],
    "norm_num_groups": [0, -1, 3, None, "4", [4]],
    "norm_eps": [0, -1, "x", None, [1e-5]],
    "dropout": [-1, 1.5, "x", None],
    "num_class_embeds": [0, -1, 10**30, "5", [5]],
    "act_fn": ["gelu", None, ["silu"], {}],
    "freq_shift": [[0], {}, "0", 2],
    "resnet_time_scale_shift": [[], {}, None, "spatial"],
    "_class_name": ["UNet2DConditionModel", None, [], 3],
}
WRONG_SCHEDULERS = {
    "num_train_timesteps": [0, -1, 10**12, "1000", None, [1000], 1.5],
    "beta_schedule": ["exp", None, [], {}, 3],
    "beta_start": [0, -1, 2, "x", None, [1]],
    "beta_end": [0, 7, "x", None],
    "trained_betas": ["x", [0.1], [2.0] * 20, [[0.1]] * 20, {}],
    "prediction_type": [[], None, "flow"],
    "variance_type": [[], "learned", {}],
}
WRONG_TEXTS = {
    "empty": "",
    "list": "[]",
    "null": "null",
    "cut": '{"sample_size": 8',
    "deep": "[" * 200_000,
    "deep dict": '{"a":' * 200_000,
    "twice": '{"a": 1, "a": 2}',
    "html": "<html></html>",
    "NaN": '{"norm_eps": NaN}',
}


def hubs(root, good):
    """Name -> a hub folder that must be refused.

    Args:
        good: a hub folder that is read.
    """
    model, process = good / "unet", good / "scheduler"
    unet = json.loads((model / "config.json").read_text())
    scheduler = json.loads((process / "scheduler_config.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    weights = (model / name).read_bytes()

    def hub(place, fields=unet, steps=scheduler, content=weights):
        folder = root / place
        folder.mkdir(parents=True)
        for stem, value in (("config", fields), ("scheduler_config", steps)):
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / f"{stem}.json").write_text(text)
        (folder / name).write_bytes(content)
        return folder

    for field, values in WRONG_UNETS.items():
        for i, value in enumerate(values):
            fields = unet | {field: value}
            yield f"{field} = {value!r:.40}", hub(f"{field}{i}", fields)
    for field, values in WRONG_SCHEDULERS.items():
        for i, value in enumerate(values):
            fields = scheduler | {field: value}
            if field in ("beta_start", "beta_end", "beta_schedule"):
                fields["trained_betas"] = None
            yield f"{field} = {value!r:.40}", hub(f"s {field}{i}", steps=fields)
    for kind, content in WRONG_TEXTS.items():
        yield f"config {kind}", hub(f"c {kind}", content)
        yield f"scheduler {kind}", hub(f"sc {kind}", steps=content)
    for i, content in enumerate((b"", b"<html>", weights[:-1], weights + b"x")):
        yield f"weights {i}", hub(f"w{i}", content=content)
    index = {
        "no map": {},
        "list": {"weight_map": []},
        "absent": {"weight_map": {"w": "w.safetensors"}},
        "none": {"weight_map": {}},
        "outside": {"weight_map": {"w": f"../../{name}"}},
    }
    for kind, fields in index.items():
        place = hub(f"i {kind}")
        (place / name).unlink()
        (place / f"{name}.index.json").write_text(json.dumps(fields))
        yield f"index {kind}", place
    alone = hub("alone")
    (alone / "scheduler_config.json").unlink()
    yield "no scheduler", alone
    (root / "nothing").mkdir()
    yield "an empty folder", root / "nothing"


def records(run):
    """Name -> bytes of a .safetensors file of ours whose record is wrong.

    Args:
        run: a good file of ours.
    """
    tensors, metadata = safetensors_files.read_safetensors(run)
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    good = json.loads(metadata[RECORD])

    def replaced(group, value):
        return {**good, "config": {**good["config"], group: value}}

    def changed(group, **fields):
        return replaced(group, {**good["config"][group], **fields})

    wrong = {
        "list": [],
        "nothing": {},
        "config list": {**good, "config": []},
        "config empty": {**good, "config": {}},
        "no shape": {**good, "image_shape": None},
        "two sides": {**good, "image_shape": [8, 8]},
        "text side": {**good, "image_shape": [8, 8, "1"]},
        "huge side": {**good, "image_shape": [2**40, 2**40, 1]},
        "zero side": {**good, "image_shape": [0, 8, 1]},
        "format": {**good, "format": "x"},
        "model text": replaced("model", "unet"),
        "schedule list": replaced("schedule", []),
        "objective text": replaced("objective", "eps"),
        "code": changed("model", name="os:system"),
        "code in schedule": changed("schedule", name="subprocess:getoutput"),
        "code in data": changed("data", name="os.path:exists"),
        "unknown name": changed("model", name="vit"),
        "list name": changed("model", name=["unet"]),
        "channels": changed("model", channels=10**9),
        "zero channels": changed("model", channels=0),
        "text channels": changed("model", channels="8"),
        "infinite depth": changed("model", num_res_blocks=10**9),
        "depth": changed("model", num_res_blocks=5000),
        "no depth": changed("model", num_res_blocks=0),
        "zero groups": changed("model", num_groups=0),
        "levels": changed("model", multipliers=[1] * 10_000),
        "no levels": changed("model", multipliers=[]),
        "text level": changed("model", multipliers=["a", "b"]),
        "unknown field": changed("model", colour=3),
        "dtype": changed("model", dtype="float99"),
        "steps": changed("schedule", num_steps=10**12),
        "no steps": changed("schedule", num_steps=0),
        "text steps": changed("schedule", num_steps="20"),
        "mean type": changed("objective", mean_type="x"),
        "other network": changed("model", channels=4),
    }
    for name, record in wrong.items():
        extra = {RECORD: json.dumps(record)}
        yield name, safetensors_files.safetensors_content(tensors, extra)
    for name, content in {
        "deep": "[" * 100_000,
        "cut": "{",
        "NaN": '{"a":NaN}',
    }.items():
        yield name, safetensors_files.safetensors_content(tensors, {RECORD: content})
    for name, bad in {
        "NaN weights": np.full(tensors["conv_in.bias"].shape, np.nan, np.float32),
        "integer weights": np.zeros(tensors["conv_in.bias"].shape, np.int32),
        "infinite weights": np.full(tensors["conv_in.bias"].shape, np.inf, np.float16),
    }.items():
        wrong_tensors, extra = tensors | {"conv_in.bias": bad}, dict(metadata)
        yield name, safetensors_files.safetensors_content(wrong_tensors, extra)


SIDE_CARS = {
    "empty": b"",
    "list": b"[1]",
    "null": b"null",
    "number": b"3",
    "nothing": b"{}",
    "cut": b'{"weights": ',
    "deep": b"[" * 200_000,
    "deep dict": b'{"a":' * 200_000,
    "bad utf-8": b"\xff\xfe",
}
WRONG_RECORDS = {
    "sha256": [None, 3, [], "x"],
    "weights": [3, "x", [], {"file": 1}, {"sha256": 3}, True],
    "inputs": [None, 3, [], {}, {"label": None}, {"label": {}}],
    "num_labels": [-1, "3", [], 1.5, {}],
    "versions": [None, 3, {}, [], {"jax": 3}],
}


def exports(root, export):
    """Name -> an exported sampler that must be refused.

    Args:
        export: a good one, with weights beside.
    """
    good = json.loads(Path(f"{export}.json").read_text())

    def place(name, record=None, npz=None, data=None):
        folder = root / name
        folder.mkdir(parents=True)
        for end in ("", ".json", ".npz"):
            shutil.copy(f"{export}{end}", folder / f"a{end}")
        if record is not None:
            is_text = isinstance(record, bytes)
            text = record if is_text else json.dumps(record).encode()
            (folder / "a.json").write_bytes(text)
        for end, new in ((".npz", npz), ("", data)):
            if new is not None:
                (folder / f"a{end}").write_bytes(new)
        return folder / "a"

    for name, content in SIDE_CARS.items():
        yield name, place(name, content)
    for field, values in WRONG_RECORDS.items():
        for i, value in enumerate(values):
            record = {**good, field: value}
            if field == "num_labels":
                label = {**good["inputs"]["label"], field: value}
                record = {**good, "inputs": {**good["inputs"], "label": label}}
            yield f"{field} = {value!r}", place(f"{field}{i}", record)
    data = Path(export).read_bytes()
    yield "cut", place("cut data", data=data[:100])
    yield "empty data", place("empty data", data=b"")
    for name, npz in {"cut": data[:100], "empty": b"", "html": b"<html>"}.items():
        yield f"weights {name}", place(f"npz {name}", npz=npz)


def make(folder, run, hub, export):
    """Writes all of them.

    Args:
        folder: where; made if need be.
        run: a good .safetensors file of ours.
        hub: a good folder for diffusers.
        export: a good exported sampler, with weights beside.

    Returns:
        [kind, name, path, arguments] each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = []

    def write(kind, ending, contents, *arguments):
        for i, (name, content) in enumerate(contents):
            path = folder / f"{kind}{i}{ending}"
            path.write_bytes(content)
            cases.append([kind, name, str(path), list(arguments)])

    write("torch", ".pt", torch_contents(), *NAMED)
    write("safe", ".safetensors", safetensors_contents(), *NAMED)
    write("record", ".safetensors", records(run))
    cases += [["hub", n, str(p), []] for n, p in hubs(folder / "hubs", hub)]
    cases += [["export", n, str(p), []] for n, p in exports(folder / "e", export)]
    return cases


LIMIT = 2**30  # bytes beyond the start


def refuse(cases, good_export):
    """Lets `convert` or `export.read` meet each file, in one process.

    Args:
        cases: as `make` returns them.
        good_export: is read first, so that all libraries are loaded.

    Returns:
        A dict for each: exit status, what stderr got, seconds of this process, peak
        memory, and whether anything was written.
    """
    from jax_diffusion import cli, convert, export

    export.read(good_export)
    status = dict(line.split(":") for line in Path("/proc/self/status").open())
    size = int(status["VmSize"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT, size + LIMIT))
    found = []
    for kind, name, path, arguments in cases:
        out, error = Path(path).parent / "out", io.StringIO()
        sys.argv = ["convert", "--checkpoint", path, "--workdir", str(out), *arguments]
        start, code = time.process_time(), 0
        main = (
            (lambda path=path: export.read(path)) if kind == "export" else convert.main
        )
        with contextlib.redirect_stderr(error):
            try:
                cli.run_program(main)
            except SystemExit as stop:
                code = stop.code
            except BaseException as trace:
                code = f"{type(trace).__name__}: {trace}"[:300]
        found.append(
            dict(
                case=f"{kind}: {name}",
                code=code,
                error=error.getvalue(),
                seconds=time.process_time() - start,
                written=out.exists(),
                peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            )
        )
    return found


if __name__ == "__main__":
    _, cases_file, out_file, good_export = sys.argv
    found = refuse(json.loads(Path(cases_file).read_text()), good_export)
    Path(out_file).write_text(json.dumps(found))
