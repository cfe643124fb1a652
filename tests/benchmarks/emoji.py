"""Sorts the emoji of the npm package `emoji-datasource-google` into folders of classes.

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python -m tests.benchmarks.emoji --package package --out data/emoji

Each of the package's categories becomes a folder of the PNGs of 64 pixels, which are
copied as they are. Variants of skin tones stay out, as does the category "Component",
which has nothing but hair and patches of skin. The images are Google's, under the
Apache License 2.0.
"""

import argparse
import json
import re
import shutil
from collections import Counter
from pathlib import Path

from jax_diffusion import cli
from jax_diffusion.registry import short
from jax_diffusion.runtime import files

LEFT_OUT = ("Component",)
ROW = ("image", "category")


def sort_emoji(package: Path, out: Path) -> dict[str, int]:
    """Copies the images into `out`, a folder for each category.

    Args:
        package: folder of the unpacked package, with emoji.json and img/google/64.
        out: folder to make; it must not exist.

    Returns:
        The number of images by name of the folder.

    Raises:
        ValueError: if `package` lacks one of the two or an image, if its table is
            another one, or if `out` exists or cannot be made; nothing is copied then.
    """
    table, images = package / "emoji.json", package / "img" / "google" / "64"
    if not (table.is_file() and images.is_dir()):
        raise ValueError(f"--package must hold emoji.json and img, got {package}.")
    files.check_output("--out", out, "folder")
    if out.exists():
        raise ValueError(f"--out must be a folder to make, but {out} exists.")
    found = read_table(table)
    for name in found:
        path = images / name
        if not path.is_file():
            raise ValueError(
                f"--package must hold the images of emoji.json, not {path}."
            )
    for name, folder in found.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / name, out / folder / name)
    return dict(Counter(found.values()))


def read_table(path: Path) -> dict[str, str]:
    """Returns the folder of each image of emoji.json, by name of the image.

    Variants of skin tones stand within these, and are left out.

    Raises:
        ValueError: if it is no such table, or has names that are no plain ones.
    """
    rule = "--package must hold emoji.json, a list of rows with image and category"
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{rule}, got no JSON.") from error
    found = {}
    for row in rows if isinstance(rows, list) else [rows]:
        told = [row.get(key) for key in ROW] if isinstance(row, dict) else []
        if not told or not all(isinstance(value, str) for value in told):
            raise ValueError(f"{rule}, got {short(row)}.")
        image, category = told
        folder = "_".join(re.findall("[a-z]+", category.lower()))
        if not re.fullmatch(r"[\w-]+\.png", image) or not folder:
            raise ValueError(f"{rule} that can be names, got {short(told)}.")
        if category not in LEFT_OUT and row.get("has_img_google"):
            found[image] = folder
    if not found:
        raise ValueError(f"{rule}, got none with an image.")
    return found


def main() -> None:
    """Prints the folders and their numbers of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name, count in sort_emoji(args.package, args.out).items():
        print(f"{args.out / name}: {count} images")


if __name__ == "__main__":
    cli.run_program(main)
