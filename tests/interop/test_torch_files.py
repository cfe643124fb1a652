"""Files of PyTorch: read and written without it, and nothing in them is ever run."""

import builtins
import collections
import dataclasses
import io
import json
import os
import pickle
import re
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion.interop import pickles, safetensors_files, tensors, torch_files

DTYPES = [*tensors.STORAGES.values()]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Files written by hand, as PyTorch writes them


def tensors_of(dtype):
    """A tensor of every rank up to 4, one without and one with a single number."""
    shapes = [(), (0, 3), (1,), (5,), (2, 3), (2, 1, 3), (3, 2, 3, 3)]
    rng = np.random.default_rng(0)
    high = 2 if dtype.kind == "b" else 100
    arrays = (rng.integers(0, high, shape) for shape in shapes)
    return {f"block.{i}.weight": a.astype(dtype) for i, a in enumerate(arrays)}


class Named:
    """A global of a pickle, by a name that need not exist here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Storage(tuple):
    """A persistent id."""


class Call:
    """A call in a pickle; then, perhaps, its state is set."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, *(() if state is None else (state,)))

    def __reduce__(self):
        return self.reduced


class Pickler(pickle._Pickler):
    def persistent_id(self, item):
        return tuple(item) if isinstance(item, Storage) else None

    def save(self, item, *args, **kwargs):
        if isinstance(item, Named):
            self.write(f"c{item.module}\n{item.name}\n".encode())
        else:
            super().save(item, *args, **kwargs)

    def save_reduce(self, function, args, state=None, *rest, obj=None, **kwargs):
        self.save(function)
        self.save(args)
        self.write(pickle.REDUCE)
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)


def pickled(tree):
    out = io.BytesIO()
    Pickler(out, protocol=2).dump(tree)
    return out.getvalue()


def storage(key="0", name="FloatStorage", count=6, **fields):
    pid = ("storage", Named("torch", name), key, "cpu", count)
    return Storage((*pid, *fields.values()))


def tensor(size=(2, 3), stride=(3, 1), offset=0, numbers=None):
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    numbers = storage() if numbers is None else numbers
    hooks = collections.OrderedDict()
    return Call(rebuild, numbers, offset, size, stride, False, hooks)


NUMBERS = np.arange(6, dtype=np.float32)
BYTES = NUMBERS.tobytes()


def write_zip(path, data, numbers=BYTES, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/byteorder", "little")
        archive.writestr("model/data/0", numbers)
        archive.writestr("model/version", "3\n")
    return path


def write_legacy(path, data, numbers=BYTES, little=True):
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}
    parts = [torch_files.LEGACY_MAGIC, torch_files.LEGACY_VERSION, system]
    count = struct.pack("<q", 6)
    start = b"".join(map(pickled, parts))
    path.write_bytes(start + data + pickled(["0"]) + count + numbers)
    return path


writers = pytest.mark.parametrize("write", [write_zip, write_legacy])


def refused(path, words=""):
    with pytest.raises(ValueError, match=r"whole PyTorch file|ignore_objects") as info:
        torch_files.read_torch(path)
    message = str(info.value)
    assert words in message and message.endswith(".") and "\n" not in message
    return message


@writers
def test_a_file_written_by_hand_is_read(write, tmp_path):
    metadata = Call(collections.OrderedDict, state={"_metadata": {"": {"version": 1}}})
    tree = {
        "epoch": 3,
        "model": {"weight": tensor(), "bias": tensor((2,), (2,), 1)},
        "rest": [metadata, ("text", None, True, 1.5, -7, 2**40)],
        "size": Call(Named("torch", "Size"), (2, 3)),
        "parameter": Call(
            Named("torch._utils", "_rebuild_parameter"), tensor((), ()), True, {}
        ),
    }
    read = torch_files.read_torch(write(tmp_path / "a.pt", pickled(tree)))
    np.testing.assert_array_equal(read["model"]["weight"], NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(read["model"]["bias"], [1, 3])
    assert read["parameter"].shape == () and np.asarray(read["parameter"]) == 0
    assert read["epoch"] == 3 and read["size"] == [2, 3]
    assert read["rest"] == [{}, ["text", None, True, 1.5, -7, 2**40]]


@dtypes
def test_what_is_written_is_read_bit_for_bit(dtype, tmp_path):
    tensors = tensors_of(dtype)
    torch_files.write_torch(tmp_path / "new" / "a.pt", tensors)
    assert_same(torch_files.read_torch(tmp_path / "new" / "a.pt"), tensors)
    metadata = {"format": "pt", "text": 'quoted "ü"'}
    safetensors_files.write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    read, found = safetensors_files.read_safetensors(tmp_path / "a.safetensors")
    assert len(read) == len(tensors)
    assert_same({name: read[name] for name in tensors}, tensors)  # sorted by size there
    assert found == metadata


def assert_same(read, tensors):
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)


def test_strided_arrays_are_written_in_order(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    torch_files.write_torch(tmp_path / "a.pt", {"a": array})
    safetensors_files.write_safetensors(tmp_path / "a.safetensors", {"a": array}, {})
    np.testing.assert_array_equal(torch_files.read_torch(tmp_path / "a.pt")["a"], array)
    read, _ = safetensors_files.read_safetensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read["a"], array)


@pytest.mark.parametrize("write", ["write_torch", "write_safetensors"])
def test_other_types_are_refused_before_anything_is_written(write, tmp_path):
    torch = write == "write_torch"
    arguments, module = ((), torch_files) if torch else (({},), safetensors_files)
    with pytest.raises(ValueError, match=r"got complex64 in 'b'\.$"):
        getattr(module, write)(
            tmp_path / "a",
            {"a": NUMBERS, "b": NUMBERS.astype(np.complex64)},
            *arguments,
        )
    assert not (tmp_path / "a").exists()


# Damage


@writers
def test_a_file_cut_off_anywhere_is_refused(write, tmp_path):
    path = write(tmp_path / "a.pt", pickled({"a": tensor()}))
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        refused(path)


def test_a_flipped_byte_of_the_tensors_is_noticed(tmp_path):
    path = write_zip(tmp_path / "a.pt", pickled({"a": tensor()}))
    data = bytearray(path.read_bytes())
    data[data.index(BYTES) + 9] ^= 4
    path.write_bytes(data)
    for shape, stride in (((2, 3), (3, 1)), ((2,), (1,))):  # all of it, and a part
        damaged = torch_files.read_torch(path)["a"]
        damaged = dataclasses.replace(damaged, shape=shape, strides=stride)
        with pytest.raises(ValueError, match="Bad CRC-32"):
            np.asarray(damaged)


@pytest.mark.slow
@writers
def test_no_flipped_byte_brings_another_kind_of_error(write, tmp_path):
    path = write(tmp_path / "a.pt", pickled({"a": tensor()}))
    data = path.read_bytes()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 255
        path.write_bytes(damaged)
        try:
            found = torch_files.read_torch(path)  # what nothing needs may be wrong
            jax.tree.map(np.asarray, found)
        except ValueError as error:
            assert re.search("must be a whole|must be set to", str(error))


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint\n", b"\x89PNG\r\n\x1a\n", pickled({"a": 1}), b"\x80\x02" * 9],
    ids=["empty", "text", "png", "plain pickle", "nonsense"],
)
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt")


def test_other_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme", "hello")
    refused(tmp_path / "a.pt", "0 data.pkl")
    data = pickled({"a": tensor()})
    write_zip(tmp_path / "b.pt", data, compression=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "b.pt", "a compressed archive")
    write_legacy(tmp_path / "c.pt", data, little=False)
    refused(tmp_path / "c.pt", "big-endian")


@pytest.mark.parametrize(
    "read", [torch_files.read_torch, safetensors_files.read_safetensors]
)
def test_missing_files_are_named(read, tmp_path):
    with pytest.raises(ValueError, match=r"must be a file, got '.*none\.pt'\.$"):
        read(tmp_path / "none.pt")


# Malice


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A command that leaves a file, which must not be there in the end."""
    sentinel = tmp_path / "sentinel"
    monkeypatch.setattr(builtins, "sprung", lambda *_: sentinel.touch(), raising=False)
    yield f"touch {sentinel}"
    assert not sentinel.exists()


def evil(module, name, *args, **state):
    return Call(Named(module, name), *args, **state)


MALICE = {  # what a pickle holds, and the words that tell of it
    "os.system": (lambda trap: evil("os", "system", trap), "posix.system|os.system"),
    "posix.system": (lambda trap: evil("posix", "system", trap), "posix.system"),
    "eval": (
        lambda trap: evil("builtins", "eval", "__import__('builtins').sprung()"),
        "builtins.eval",
    ),
    "getattr": (
        lambda trap: evil("builtins", "getattr", Named("os", "system"), "__call__"),
        "builtins.getattr",
    ),
    "import": (lambda trap: evil("builtins", "__import__", "os"), "__import__"),
    "Python 2's": (lambda trap: evil("__builtin__", "eval", "1"), "__builtin__.eval"),
    "torch.load": (lambda trap: evil("torch", "load", "x.pt"), "torch.load"),
    "numpy": (
        lambda trap: evil("numpy.core.multiarray", "_reconstruct"),
        "_reconstruct",
    ),
    "partial": (lambda trap: evil("functools", "partial", len), "functools.partial"),
    "dotted": (
        lambda trap: evil("collections", "OrderedDict.fromkeys", [1]),
        "OrderedDict.fromkeys",
    ),
    "in a persistent id": (
        lambda trap: tensor(numbers=Storage((evil("os", "system", trap), 1, 2, 3, 4))),
        "a 'Object' in place",
    ),
    "in hooks": (
        lambda trap: Call(
            Named("torch._utils", "_rebuild_parameter"),
            tensor(),
            True,
            evil("os", "system", trap),
        ),
        "os.system",
    ),
    "a module": (
        lambda trap: Storage(("module", Named("torch", "FloatStorage"), "a", "b", 1)),
        "a 'module' in place",
    ),
    "state of the rebuilder": (
        lambda trap: Call(
            Named("torch._utils", "_rebuild_tensor_v2"),
            state=({}, {"__call__": Named("torch", "Size")}),
        ),
        "",
    ),
}


class State:
    """A global whose attributes a pickle sets."""

    def __init__(self, module, name, state):
        self.parts = Named(module, name), state

    def save(self):
        target, state = self.parts
        start = f"c{target.module}\n{target.name}\n".encode()
        return b"\x80\x02" + start + pickled(state)[2:-1] + b"b."


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("kind", MALICE)
def test_malicious_pickles_are_refused_and_nothing_runs(kind, write, trap, tmp_path):
    make, words = MALICE[kind]
    path = write(tmp_path / "a.pt", pickled({"a": tensor(), "b": make(trap)}))
    message = refused(path)
    assert any(word in message for word in words.split("|"))


@pytest.mark.parametrize(
    "names", [*torch_files.CALLS, ("collections", "OrderedDict")], ids=str
)
@pytest.mark.parametrize(
    "state",
    [{"x": 1}, (None, {"x": 1}), (None, {"__call__": 1}), (None, {"__class__": 1})],
    ids=str,
)
def test_no_pickle_changes_what_the_reader_uses(names, state, tmp_path):
    refused(write_zip(tmp_path / "a.pt", State(*names, state).save()))
    data = pickled({"a": tensor()})
    read = torch_files.read_torch(write_zip(tmp_path / "b.pt", data))
    np.testing.assert_array_equal(read["a"], NUMBERS.reshape(2, 3))


def test_real_code_in_a_pickle_is_refused(trap, tmp_path):
    """As Python itself writes it, of every protocol."""
    item = {"a": Call(os.system, trap)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(item, protocol)
        refused(write_zip(tmp_path / "a.pt", data))
        (tmp_path / "b.pt").write_bytes(data)
        refused(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "instructions",
    [b"ios\nsystem\n(tR", b"(cos\nsystem\no", b"\x82\x01", b"P1\n"],
    ids=["INST", "OBJ", "EXT1", "PERSID"],
)
def test_other_instructions_are_refused(instructions, tmp_path):
    data = b"\x80\x02" + instructions + b"."
    refused(write_zip(tmp_path / "a.pt", data), "instruction")


def refuse(*_):
    return NotImplemented


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_all_protocols_are_read(protocol):
    tree = {
        "a": [1, -2, 2**40, 3.5],
        "b": ("x", "\xe9", None, True),
        "c": {"d": 2**2100},
    }
    data = pickle.dumps([tree, tree["a"]], protocol)
    assert pickles.load(io.BytesIO(data), refuse, refuse).tree == [tree, tree["a"]]


@pytest.mark.parametrize("data", [b"U\x01a.", b"T\x01\0\0\0a.", b"S'a'\n."])
def test_strings_of_python_2_are_read(data):
    assert pickles.load(io.BytesIO(data), refuse, refuse).tree == "a"


def test_a_pickle_cannot_ask_for_much_memory(tmp_path):
    data = b"\x80\x02Nr\xf0\xff\xff\x7f."  # remember None at place 2^31
    assert torch_files.read_torch(write_zip(tmp_path / "a.pt", data)) is None
    nested = b"\x80\x02]q\x00" + b"".join(  # 2^64 empty lists, in 64 lists of two
        b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(64)
    )
    read = torch_files.read_torch(write_zip(tmp_path / "b.pt", nested + b"."))
    assert len(read) == 2
    endless = b"\x80\x02]q\x00h\x00a."  # a list that holds itself
    refused(write_zip(tmp_path / "c.pt", endless), "recursion")


@writers
@pytest.mark.parametrize(
    "make",
    [
        lambda: tensor((2, 4), (4, 1)),
        lambda: tensor((2, 3), (3, 1), 1),
        lambda: tensor((2**40,), (1,)),
        lambda: tensor((2**62, 2**62), (1, 1)),
        lambda: tensor((-2, -3), (3, 1)),
        lambda: tensor((2, 3), (3, -1), 5),
        lambda: tensor((2, 3), (3, 1), -1),
        lambda: tensor((2, 3), (1,)),
        lambda: tensor((2.0, 3.0), (3, 1)),
        lambda: tensor("ab", "cd"),
        lambda: tensor(numbers="storage"),
        lambda: tensor(numbers=storage(count=7)),
        lambda: tensor((2**40,), (1,), numbers=storage(count=2**40)),
        lambda: tensor(numbers=storage(name="DoubleStorage")),
        lambda: tensor(numbers=storage(key="../../x")),
        lambda: tensor(numbers=storage(view=("0", 0, 6))),
        lambda: [tensor(), tensor(numbers=storage(name="IntStorage"))],
    ],
)
def test_tensors_outside_of_their_numbers_are_refused(write, make, tmp_path):
    refused(write(tmp_path / "a.pt", pickled({"a": make()})))


def test_an_expanded_tensor_takes_no_memory(tmp_path):
    path = write_zip(tmp_path / "a.pt", pickled({"a": tensor((2**40, 2), (0, 5))}))
    read = torch_files.read_torch(path)["a"]
    assert read.shape == (2**40, 2) and not np.asarray(read).flags.writeable
    np.testing.assert_array_equal(np.asarray(read)[-1], [0, 5])


# .safetensors


def safetensors_with(header, body=BYTES):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + body


def entry(dtype="F32", shape=(2, 3), start=0, end=24):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        safetensors_with(b"{"),
        safetensors_with(b"[]"),
        safetensors_with({"a": {}}),
        safetensors_with(entry("F128")),
        safetensors_with(entry(shape=(2, 4))),
        safetensors_with(entry(shape=(-2, -3))),
        safetensors_with(entry(shape=(2, "3"))),
        safetensors_with(entry(start=-24, end=0)),
        safetensors_with(entry(start=4, end=28)),
        safetensors_with(entry(), BYTES[:-1]),
    ],
)
def test_damaged_safetensors_are_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a whole \.safetensors file, got .*"):
        safetensors_files.read_safetensors(path)


def test_safetensors_written_by_hand_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_with(entry() | {"__metadata__": {"b": "c"}}))
    read, metadata = safetensors_files.read_safetensors(path)
    np.testing.assert_array_equal(read["a"], NUMBERS.reshape(2, 3))
    assert metadata == {"b": "c"}


# Against the libraries themselves


def as_torch(array):
    torch = pytest.importorskip("torch")
    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(array)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_are_read(dtype, zipped, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = tensors_of(dtype)
    theirs = {name: as_torch(array) for name, array in tensors.items()}
    path = tmp_path / "a.pt"
    torch.save(theirs, path, _use_new_zipfile_serialization=zipped)
    assert_same(torch_files.read_torch(path), tensors)


@pytest.mark.slow
@dtypes
def test_torch_reads_what_we_write(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = tensors_of(dtype)
    torch_files.write_torch(tmp_path / "a.pt", tensors)
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        expected = as_torch(array)
        assert read[name].dtype == expected.dtype
        assert torch.equal(read[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_of_torch_is_read(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    adam.step()
    base = torch.arange(24.0).reshape(2, 3, 4)
    tree = {
        "model": model.state_dict(),
        "optimizer": adam.state_dict(),
        "parameter": torch.nn.Parameter(base),
        "views": [
            base,
            base.transpose(0, 2),
            base[1, :, ::2],
            base[:1].expand(5, 3, 4),
        ],
        "rest": (torch.Size([2, 3]), 1e-3, None, "text", base.to(torch.bfloat16)),
    }
    path = tmp_path / "a.ckpt"
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    read = torch_files.read_torch(path)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(read["model"][name], value.numpy())
    first = adam.state_dict()["state"][0]["exp_avg"].numpy()
    np.testing.assert_array_equal(read["optimizer"]["state"][0]["exp_avg"], first)
    np.testing.assert_array_equal(read["parameter"], base.numpy())
    for ours, theirs in zip(read["views"], tree["views"], strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert read["rest"][:4] == [[2, 3], 1e-3, None, "text"]
    np.testing.assert_array_equal(np.asarray(read["rest"][4], np.float32), base.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_model_saved_by_torch_is_refused(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    model = torch.nn.Linear(2, 2)
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    refused(path, "Linear" if zipped else "")
