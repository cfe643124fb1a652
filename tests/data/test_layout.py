"""Splits and classes of folders: layouts by hand, and random ones against the truth."""

import itertools
import re

import numpy as np
import pytest

from jax_diffusion import data
from jax_diffusion.data import folder

SPLITS = {"train": "train", "Training": "train", "TRAIN": "train"}
SPLITS |= {"val": "val", "valid": "val", "Validation": "val"}
SPLITS |= {"test": "test", "Testing": "test"}


def touch(root, names):
    """Files that no test here decodes."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def read(root, split):
    """The class of each image of a split, by path; None without labels."""
    found = folder.read_folder(split, root, 8)
    names = found.class_names or [None]
    paths = [found.paths[i] for i in range(len(found))]
    assert found.labeled == (len(found.class_names or ()) > 1)
    return {
        path[len(str(root)) + 1 :]: names[label]
        for path, label in zip(paths, found.labels, strict=True)
    }


def classes(*folders, names=("cat", "dog"), n=2):
    return [f"{f}/{c}/{i}.png" for f in folders for c in names for i in range(n)]


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize(
    "held_out", ["val", "valid", "Validation", "test", "TESTING", "Valid"]
)
def test_folders_of_splits_are_known_by_their_usual_names(tmp_path, train, held_out):
    touch(tmp_path, classes(train, held_out))
    for split, folder_name in (("train", train), ("test", held_out)):
        found = read(tmp_path, split)
        assert [*found] == classes(folder_name)
        assert [*found.values()] == ["cat", "cat", "dog", "dog"]


def test_of_three_splits_validation_is_neither_trained_on_nor_tested(tmp_path):
    touch(tmp_path, classes("train", "val", "test"))
    assert [*read(tmp_path, "train")] == classes("train")
    assert [*read(tmp_path, "test")] == classes("test")
    assert [*read(tmp_path, "all")] == classes("train", "val", "test")


def test_classes_have_one_number_in_all_splits(tmp_path):
    touch(tmp_path, ["train/cat/0.png", "train/dog/0.png", "test/dog/0.png"])
    for split in ("train", "test", "all"):
        found = folder.read_folder(split, tmp_path, 8)
        assert found.class_names == ("cat", "dog") and found.num_classes == 2
    assert read(tmp_path, "test") == {"test/dog/0.png": "dog"}


@pytest.mark.parametrize(
    "names",
    [
        classes("dataset"),
        classes("archive/dataset"),
        classes("train"),
        classes("data/Training"),
        classes("data/train/images"),
        classes("train/images", "valid/images"),
        classes("data/train", "data/test"),
        ["__MACOSX/data/._x.png", "data/notes.txt", *classes("data")],
    ],
)
def test_folders_that_only_wrap_others_are_looked_through(tmp_path, names):
    touch(tmp_path, names)
    images = [name for name in names if "__MACOSX" not in name and "txt" not in name]
    found = read(tmp_path, "all")
    assert sorted(found) == sorted(images)
    assert all(re.search(rf"/{name}/\d", path) for path, name in found.items())


def test_numbered_classes_are_sorted_as_numbers(tmp_path):
    names = [*map(str, range(12)), "other"]
    touch(tmp_path, [f"{name}/0.png" for name in names])
    found = folder.read_folder("all", tmp_path, 8)
    assert found.class_names == tuple(names)
    assert found.old_class_names == tuple(sorted(names))
    by_path = {found.paths[i]: int(found.labels[i]) for i in range(13)}
    assert by_path[str(tmp_path / "10/0.png")] == 10


def test_what_is_hidden_or_no_image_is_left_out_and_counted(tmp_path):
    names = ["a.txt", "b.TXT", ".c.png", "__MACOSX/d.png", ".git/e.png", "none"]
    touch(tmp_path, [*names, "0.png", "1.png"])
    found = folder.read_folder("all", tmp_path, 8)
    assert len(found) == 2 and not found.labeled
    assert re.search(r"2 \.txt", found.left_out)
    assert re.search(r"[34] hidden", found.left_out)


@pytest.mark.parametrize("wrap", ["train", "test", "data/Training", "train/train"])
def test_splits_are_found_in_a_folder_that_is_called_like_a_split(tmp_path, wrap):
    touch(tmp_path, classes(f"{wrap}/train", f"{wrap}/test"))
    for split in ("train", "test"):
        found = read(tmp_path, split)
        assert [*found] == classes(f"{wrap}/{split}")
        assert [*found.values()] == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize(
    "names",
    [
        [f"images/{i}.png" for i in range(3)],
        [f"IMG_{i:04d}.png" for i in range(3)],
        [f"images/IMG_{i:04d}.png" for i in range(3)],
        [f"{split}/images/{i}.png" for split in ("train", "test") for i in range(3)],
        [f"{split}/IMG_{i}.png" for split in ("train", "test") for i in range(3)],
    ],
)
def test_one_class_is_as_good_as_no_labels(tmp_path, names):
    touch(tmp_path, names)
    found = folder.read_folder("all", tmp_path, 8)
    assert len(found) == len(names) and not found.labeled


@pytest.mark.parametrize("top", ["", "images/", "train/", "data/images/"])
def test_prefixes_are_classes_also_in_a_lone_folder(tmp_path, top):
    names = [f"{top}{name}_{i}.png" for name in ("cat", "dog") for i in range(2)]
    told = ["cat", "cat", "dog", "dog"]
    touch(tmp_path, names)
    assert read(tmp_path, "all") == dict(zip(names, told, strict=True))
    touch(tmp_path / "split", [f"{s}/{n}" for s in ("train", "test") for n in names])
    assert [*read(tmp_path / "split", "test").values()] == told


REFUSED = {
    "loose images beside classes": (
        [*classes("."), "overview.png"],
        r"must all lie in folders of classes.* 1 \(overview\.png\) .*cat, dog\.$",
    ),
    "loose images beside one folder": (
        ["a_1.png", "b_2.png", "c/d_1.png"],
        r"got 2 \(a_1\.png, b_2\.png\) beside the folders c\.$",
    ),
    "loose images within a split": (
        [*classes("train", "test"), "test/x.png"],
        r"test must all lie in folders of classes.*x\.png",
    ),
    "a split without classes": (
        [*classes("train"), "test/0.png", "test/1.png"],
        r"splits of .*train with cat, dog, test with none\.$",
    ),
    "a split with prefixes only": (
        [*classes("train"), "test/img_0.png", "test/img_1.png"],
        r"splits of .*train with cat, dog, test with img\.$",
    ),
    "one split twice": (
        classes("train", "val", "valid"),
        r"must be splits or classes, got a split twice: train, val, valid\.$",
    ),
    "a split beside classes": (
        [*classes("."), "test/0.png"],
        r"splits or classes, got the splits test beside cat, dog\.$",
    ),
    "splits beside another folder": (
        [*classes("train", "test"), "extra/0.png"],
        r"got the splits test, train beside extra\.$",
    ),
    "splits beside loose images": (
        [*classes("train", "test"), "readme.png"],
        r"got the splits test, train beside loose images\.$",
    ),
    "a folder that is a class in one split and wraps classes in the other": (
        ["train/images/0.png", *classes("test/images")],
        r"test/images must be a class that other splits have",
    ),
    "a split that is wrapped, and one that is not": (
        [*classes("train/images"), *classes("test")],
        r"train/images must be a class that other splits have",
    ),
    "splits in classes": (
        classes("cat", "dog", names=("train", "test")),
        r"must be splits, called train, val or test, .*got test in .*may be splits",
    ),
    "splits in classes of a split": (
        [*classes("train"), "train/cat/old/val/0.png", *classes("test")],
        r"got val in .*train, which may be splits",
    ),
    "a split by another name beside one": (
        [f"{split}/{i}.png" for split in ("train", "dev") for i in range(2)],
        r"got the splits train beside dev\.$",
    ),
    "classes of a split by another name beside one": (
        classes("train", "dev"),
        r"got the splits train beside dev\.$",
    ),
    "a split by another name, alone": (
        classes("holdout"),
        r"got holdout in .*may be splits",
    ),
    "train and the year of a validation": (
        [f"{split}/{i}.png" for split in ("train", "val2017") for i in range(2)],
        r"got the splits train beside val2017\.$",
    ),
    "splits with years": (
        [f"{split}/{i}.png" for split in ("train2017", "val2017") for i in range(2)],
        r"got train2017, val2017 in .*may be splits",
    ),
    "splits with letters": (
        [f"{split}/0.png" for split in ("trainA", "testA", "trainB", "testB")],
        r"got testA, testB, trainA, trainB in .*may be splits",
    ),
    "splits at the end of names": (
        [f"images_{split}/0.png" for split in ("train", "test")],
        r"got images_test, images_train in .*may be splits",
    ),
}


@pytest.mark.parametrize(
    "names", [("train", "bus"), ("train_station", "bus", "test_tube"), ("valley", "x")]
)
def test_classes_may_be_called_a_little_like_splits(tmp_path, names):
    touch(tmp_path, classes(".", names=names))
    assert {*read(tmp_path, "all").values()} == {*names}


@pytest.mark.parametrize("what", REFUSED)
def test_layouts_that_could_mean_two_things_are_refused(tmp_path, what):
    names, words = REFUSED[what]
    touch(tmp_path, names)
    for split in data.SPLITS:
        with pytest.raises(ValueError, match=words):
            read(tmp_path, split)


@pytest.mark.parametrize("name", ["test", "Validation"])
def test_nothing_is_trained_on_where_only_held_out_images_are(tmp_path, name):
    touch(tmp_path, classes(name))
    assert [*read(tmp_path, "test")] == [*read(tmp_path, "all")] == classes(name)
    with pytest.raises(ValueError, match=r"'train' must have a folder of its own"):
        read(tmp_path, "train")


def test_a_lone_image_is_a_source_without_label(tmp_path):
    touch(tmp_path, ["dog_1.png"])
    assert data.parse_source(str(tmp_path / "dog_1.png"))[0] == "folder"
    found = folder.read_folder("all", tmp_path / "dog_1.png", None)
    assert len(found) == 1 and not found.labeled


NAMES = [
    ("cat", "dog", "Owl"),
    ("ünï", "a b", "x.y", "写真"),
    tuple(map(str, range(12))),
    ("1", "02", "30"),
    ("7", "bird", "10"),
]


def random_layout(rng):
    """Files by path: (split, class) of each, and whether the reader must take them.

    Without splits, or with a lone folder for training, the split is "any".
    """
    chosen = {}
    for name in rng.permutation([*SPLITS]):
        chosen.setdefault(SPLITS[name], name)
    wanted = [(), ("train", "test"), ("train", "val"), ("train", "val", "test")]
    wanted += [("train",), ("test",)]
    roles = wanted[rng.integers(len(wanted))]
    names, kind = NAMES[rng.integers(len(NAMES))], rng.choice(["folders", "none"])
    truth, clean = {}, True
    for role in roles or ("any",):
        top = f"{chosen[role]}/" if roles else ""
        kind_here = kind
        if rng.random() < 0.1:
            kind_here = "folders" if kind == "none" else "none"
            clean = clean and len(roles) < 2
        if rng.random() < 0.1:
            top += "images/"
            clean = clean and len(roles) < 2
        some = [name for name in names if rng.random() < 0.8] or [names[0]]
        for i, name in itertools.product(range(rng.integers(1, 4)), some):
            nested = "deep/" * int(rng.integers(2))
            # A single class of nested images only looks like a wrapping folder.
            clean = clean and not (nested and len(some) == 1)
            inside = f"{name}/{nested}{i}.png" if kind_here == "folders" else None
            path = top + (inside or f"{name}{i}.png")
            split = "any" if roles in ((), ("train",)) else role
            truth[path] = split, name if kind_here == "folders" else None
        if rng.random() < 0.1:
            truth[f"{top}stray.png"] = ("any" if not roles else role), None
            clean = clean and kind_here == "none"
    wrap = rng.choice(["", "", "data/", "a/b/"])
    # Images side by side in a lone folder: its name could be that of a class.
    clean = clean and not (kind == "none" and (wrap or not roles))
    return {wrap + path: told for path, told in truth.items()}, clean


@pytest.mark.parametrize("seed", range(8))
def test_no_label_is_silently_wrong_in_random_layouts(tmp_path, seed):
    rng, taken = np.random.default_rng(seed), 0
    for i in range(25):
        truth, clean = random_layout(rng)
        root = tmp_path / str(i)
        touch(root, [*truth, ".hidden/x.png", "__MACOSX/y.png", "z.txt"])
        splits = {split for split, _ in truth.values()}
        for split in data.SPLITS:
            try:
                found = read(root, split)
            except ValueError:
                few = splits == {"any"} and len(truth) < 10
                assert not clean or few or {"train", "any"}.isdisjoint(splits), truth
                continue
            taken += 1
            for path, name in found.items():
                said, told = truth[path]
                # Of the folders around one class, or around images without labels, any
                # may give the name.
                alone = told is None or len({*found.values()}) == 1
                alone = alone and f"/{name}/" in f"/{path}"
                assert name == told or alone, (path, name, told)
                assert (
                    split == "all"
                    or said in ("any", split)
                    or ((split, said) == ("test", "val") and "test" not in splits)
                ), (split, path)
            if split == "all":
                assert found.keys() == truth.keys()
    assert taken > 25
