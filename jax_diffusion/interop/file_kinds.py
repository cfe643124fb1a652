"""Tells what a file is by its first bytes, for errors: a web page, an image, a stub.

What is downloaded under the name of a checkpoint often is something else.
"""

import zipfile
from pathlib import Path

HEAD = 512  # bytes that are looked at
ZIP = b"PK\x03\x04"
# A pickle, and the first number of PyTorch's old files where they have protocol 1.
PICKLES = (b"\x80", b"L119547037146038801333356L\n.")

# First bytes -> what the file is.
KINDS: dict[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive, which must be unpacked first",
    b"BZh": "a bzip2 archive, which must be unpacked first",
    b"\xfd7zXZ": "an xz archive, which must be unpacked first",
    b"7z\xbc\xaf": "a 7z archive, which must be unpacked first",
    b"Rar!": "a RAR archive, which must be unpacked first",
    b"\x28\xb5\x2f\xfd": "a zstd archive, which must be unpacked first",
    b"\x93NUMPY": "a .npy array",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"GGUF": "a GGUF file",
    b"\x08\x08\x12": "an ONNX file",
}
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def is_torch(path: Path) -> bool:
    """Whether a file begins as PyTorch's files do: as a whole zip archive or a pickle.

    Args:
        path: a file.
    """
    head = _head(path)
    if head.startswith(ZIP):
        return zipfile.is_zipfile(path)
    return head.startswith(PICKLES) and path.stat().st_size > 2


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as .safetensors files do.

    Args:
        path: a file.
    """
    head = _head(path)
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= path.stat().st_size - 8


def describe(path: Path) -> str:
    """Says what a file is that is not what it should be.

    Args:
        path: a file.

    Returns:
        Words to follow "got", such as "an empty file".
    """
    head, size = _head(path), path.stat().st_size
    if not size:
        return "an empty file"
    for start, kind in KINDS.items():
        if head.startswith(start):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:16].lower().startswith(PAGES):
        return "an HTML page: what was downloaded is not the file"
    if head.startswith(ZIP):
        if zipfile.is_zipfile(path):
            return "a zip archive of other files"
        return f"a zip archive that is cut off after {size} bytes"
    if is_safetensors(path):
        return "a .safetensors file"
    if not any(head):
        return f"a file that begins with zeros, of {size} bytes"
    start = text[:40].decode("utf-8", "replace").rstrip("\ufffd")
    if start and all(c.isprintable() or c in "\r\n\t" for c in start):
        if "\ufffd" not in start:
            return f"a text file that begins with {start!r}"
    return f"a file of {size} bytes of another kind, or a damaged one"
