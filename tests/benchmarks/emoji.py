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
from pathlib import Path

LEFT_OUT = ("Component",)


def sort_emoji(package: Path, out: Path) -> dict[str, int]:
    """Copies the images into `out`, a folder for each category.

    Args:
        package: folder of the unpacked package, with emoji.json and img/google/64.
        out: folder to make; it must not exist.

    Returns:
        The number of images by name of the folder.

    Raises:
        ValueError: if `package` lacks one of the two, or `out` exists.
    """
    table, images = package / "emoji.json", package / "img" / "google" / "64"
    if not (table.is_file() and images.is_dir()):
        raise ValueError(f"--package must hold emoji.json and img, got {package}.")
    if out.exists():
        raise ValueError(f"--out must be a folder to make, but {out} exists.")
    counts: dict[str, int] = {}
    for emoji in json.loads(table.read_text()):  # variants of skin stand within these
        if emoji["category"] in LEFT_OUT or not emoji["has_img_google"]:
            continue
        name = "_".join(re.findall("[a-z]+", emoji["category"].lower()))
        (out / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / emoji["image"], out / name / emoji["image"])
        counts[name] = counts.get(name, 0) + 1
    return counts


def main() -> None:
    """Prints the folders and their numbers of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name, count in sort_emoji(args.package, args.out).items():
        print(f"{args.out / name}: {count} images")


if __name__ == "__main__":
    main()
