"""JSON and .npz files of others: bounded by their own size, refused in one sentence."""

import io
import json
import zipfile

import numpy as np
import pytest

from jax_diffusion.runtime import files, untrusted


def refused(path, words):
    with pytest.raises(ValueError, match=r"must be a whole \.npz file") as info:
        files.read_npz(path)
    message = str(info.value)
    assert words in message and message.endswith(".") and "\n" not in message


def header(shape, descr="<f4"):
    out = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, fields)
    return out.getvalue()


def archive(path, content, compression=zipfile.ZIP_STORED, name="a.npy"):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header((2**40, 2**20)), "0 bytes for float32"),
        (header((3,)) + bytes(11), "11 bytes for float32 (3,)"),
        (header((3,)) + bytes(13), "13 bytes for float32 (3,)"),
        (b"no array", "magic"),
        (header((3,))[:20], ""),
        (b"\x93NUMPY\x07\x00", ""),
    ],
)
def test_an_array_that_claims_more_than_it_holds_is_refused(content, words, tmp_path):
    refused(archive(tmp_path / "a.npz", content), words)


def test_an_archive_that_becomes_very_large_is_refused(tmp_path):
    path = archive(
        tmp_path / "a.npz",
        header((3 * 2**26,), "|u1") + bytes(3 * 2**26),
        zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 2**20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrusted, "MAX_UNPACKED", 2**27)
        refused(path, "an archive of")


def test_compressed_images_are_read(tmp_path):
    images = np.zeros((100, 32, 32, 3), np.uint8)  # 300 KB that become 400 bytes
    np.savez_compressed(tmp_path / "a.npz", images=images)
    np.testing.assert_array_equal(files.read_npz(tmp_path / "a.npz")["images"], images)


def test_entries_that_overlap_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", header((1000,)) + bytes(4000))
        first = file.infolist()[0]
        info = zipfile.ZipInfo("b.npy")
        info.header_offset, info.CRC = first.header_offset, first.CRC
        info.file_size = info.compress_size = first.file_size
        file.filelist.append(info)
        file.NameToInfo["b.npy"] = info
    refused(tmp_path / "a.npz", "overlap")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "a JSON list in place of an object"),
        ("3", "a JSON int in place"),
        ("null", "a JSON NoneType in place"),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": -Infinity}', "the number -Infinity"),
        ('{"a": 1e999}', "the number 1e999"),
        ('{"a": 1, "a": 2}', "a name that stands there twice"),
        ("[" * 100_000, "too many brackets"),
        ('{"a":' * 100_000, "too many brackets"),
        (b"\xff", "can't decode byte"),
        ("9" * 5000, "limit"),
    ],
)
def test_wrong_json_is_refused(text, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        untrusted.parse_json(text)
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"a\.json must be a JSON file, got .*\.$"):
        untrusted.read_json(path)


def test_json_that_is_whole_is_read_and_large_files_are_not(tmp_path):
    content = {"a": [1, 2.5, None, True], "b": {"c": "ü"}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert untrusted.read_json(tmp_path / "a.json") == content
    with pytest.raises(ValueError, match="got over 10 bytes"):
        untrusted.read_json(tmp_path / "a.json", most=10)
    with pytest.raises(ValueError, match="must be there, got no such file"):
        untrusted.read_json(tmp_path / "none.json")
