"""Labels are matched by name, from every source, in every program.

The classes of the run are called ant, cat, dog and owl. Its networks are random: what
counts is which label they are told, and what is refused.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image
from support.programs import evaluate, sample
from support.tiny_runs import ENCODER, LABELS, UNET, make_run, write_images

import jax_diffusion as jd
from jax_diffusion import data, pipeline

NAMES = ("ant", "cat", "dog", "owl")
LOW_RES = UNET | dict(num_classes=3, low_res=True)


def write_classes(root, names, n=12, size=8, value=None):
    """A folder of classes; each image has the color of its class, by name."""
    for name, i in itertools.product(names, range(n)):
        color = value if value is not None else 20 * (1 + [*names].index(name))
        (root / name).mkdir(parents=True, exist_ok=True)
        image = np.full((size, size, 3), color, np.uint8)
        Image.fromarray(image).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name: named, numbers, plain, numbered, upsample, classifier."""
    root = tmp_path_factory.mktemp("labels")
    write_images(root / "images.npz")
    source = dict(name="folder", path=str(root / "own"), image_size=8, batch_size=1)
    write_classes(root / "own", NAMES)
    made = {
        "named": dict(class_names=NAMES, data=source, **LABELS),
        "numbers": LABELS,
        "plain": {},
        "numbered": dict(class_names=("1", "2", "10"), **LABELS),
        "upsample": dict(class_names=("dog", "cat", "bee"), model=LOW_RES),
        "classifier": dict(
            class_names=("owl", "dog", "cat"), model=ENCODER, objective=None
        ),
    }
    return {
        name: jd.load_run(make_run(root / name, **changes))
        for name, changes in made.items()
    }


def labels_of(run, *, upsample=None, guide=None, task="generate", **fields):
    """The labels that the networks are told: of the run, the guide, the second."""
    names = {f.name for f in dataclasses.fields(pipeline.TaskOptions)}
    of_task = {k: v for k, v in fields.items() if k in names}
    rest = {k: v for k, v in fields.items() if k not in names}
    inputs = pipeline.read_inputs(
        run,
        pipeline.SamplingOptions(**rest),
        pipeline.TaskOptions(task=task, **of_task),
        guide,
        upsample,
    )
    label = inputs.rows["label"]
    tables = inputs.guide_labels, inputs.upsample_labels
    return [label.tolist(), *(t if t is None else t[label].tolist() for t in tables)]


# Names and numbers that are asked for


@pytest.mark.parametrize(
    "label, found",
    [
        ("dog,cat", [2, 1]),
        (("dog", "cat"), [2, 1]),
        (["dog", 0], [2, 0]),
        ("owl, 1", [3, 1]),
        ("3", [3]),
        (2, [2]),
        (np.array([1, 3]), [1, 3]),
    ],
)
def test_labels_are_names_or_numbers(runs, label, found):
    assert labels_of(runs["named"], label=label)[0] == found


@pytest.mark.parametrize("label", [True, 1.0, 1.5, [{}], [True], [None], np.ones(2)])
def test_labels_that_are_neither_names_nor_integers_are_refused(label):
    words = "^label must be an integer, a string, or a list of them, got"
    with pytest.raises(ValueError, match=words):
        pipeline.SamplingOptions(label=label)


@pytest.mark.parametrize("label", ["bee", "Dog", "", "4", -1, ["dog", 4], "1.5"])
def test_labels_that_the_run_does_not_know_are_refused_with_its_names(runs, label):
    words = r"^label must be of the classes ant, cat, dog, owl, or from 0 to 3, got"
    with pytest.raises(ValueError, match=words):
        labels_of(runs["named"], label=label)


@pytest.mark.parametrize(
    ("label", "end"),
    [
        ("Dog", "got 'Dog'; did you mean 'dog'?"),
        ("DOG", "got 'DOG'; did you mean 'dog'?"),
        ("cat,dgo", "got 'cat,dgo', where 'dgo' is none; did you mean 'dog'?"),
        ("cat,zzz", "got 'cat,zzz', where 'zzz' is none."),
        (["cat", 9], "got ['cat', 9], where 9 is none."),
    ],
)
def test_the_label_that_is_wrong_is_named(runs, label, end):
    with pytest.raises(ValueError) as info:
        labels_of(runs["named"], label=label)
    assert str(info.value).endswith(end)


def test_where_classes_are_called_by_numbers_a_number_is_a_name(runs):
    assert labels_of(runs["numbered"], label="10,1")[0] == [2, 0]
    assert labels_of(runs["numbered"], label=[2, 10])[0] == [1, 2]
    with pytest.raises(ValueError, match=r"must be of the classes 1, 2, 10, got '0'"):
        labels_of(runs["numbered"], label="0")


# Images that bring labels: sources, and what must come of them

SOURCES = {
    "all classes": (dict(names=NAMES), [0, 1, 2, 3]),
    "one class": (dict(names=("dog",)), [2]),
    "two classes, of other numbers": (dict(names=("cat", "owl")), [1, 3]),
    "an unknown class": (dict(names=("cat", "bee")), r"of the classes ant.*got bee\."),
    "no classes": (dict(names=(".",)), r"must have labels .* without labels"),
    "numbers": (dict(labels=[0, 3]), [0, 3]),
    "text": (dict(labels=["owl", "cat"]), [1, 3]),
    "a lone class of another name": (dict(names=("pic",)), r"got images without label"),
    "unknown text": (dict(labels=["owl", "bee"]), r"got bee\."),
    "too large": (dict(labels=[0, 4]), r"must be below 4, got 4"),
    "no labels": (dict(labels=None), r"must have labels .* without labels"),
}


def make_source(root, *, names=None, labels=None, size=8):
    if names is not None:
        return write_classes(root / "images", names, n=2, size=size)
    images = np.zeros((2, size, size, 3), np.uint8)
    named = {} if labels is None else {"labels": np.array(labels)}
    np.savez(root / "x.npz", images=images, **named)
    return root / "x.npz"


@pytest.mark.parametrize("what", SOURCES)
def test_labels_of_images_are_matched_by_name_or_refused(runs, tmp_path, what):
    source, expected = SOURCES[what]
    path = make_source(tmp_path, **source)

    def edit():
        return labels_of(runs["named"], task="edit", images=path)[0]

    def bits():  # of evaluate, which is told them batch by batch
        batches = pipeline.open_images(runs["named"], path, "all", batch_size=99)
        return batches.batch(0)["label"].tolist()

    def scores():
        return jd.evaluate(
            runs["named"], metrics="bpd", data=str(path), split="all", bpd_steps=1
        )

    for read in (edit, bits):
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                read()
        else:
            assert sorted({*read()}) == expected
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            scores()
    else:
        assert np.isfinite([score.value for score in scores()]).all()


@pytest.mark.parametrize("what", SOURCES)
def test_labels_of_small_images_are_matched_by_name_or_refused(runs, tmp_path, what):
    source, expected = SOURCES[what]
    run = dataclasses.replace(runs["upsample"], class_names=("owl", "dog", "cat"))
    path = make_source(tmp_path, size=4, **source)
    if what in ("all classes", "numbers"):
        expected = r"got ant\.|below 3, got 3"
    elif what == "too large":
        expected = r"below 3, got 4"
    elif not isinstance(expected, str):
        expected = sorted(run.class_names.index(NAMES[i]) for i in expected)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected.replace("ant.*", "owl.*")):
            labels_of(run, low_res=path)
    else:
        assert sorted({*labels_of(run, low_res=path)[0]}) == expected


@pytest.mark.parametrize("field", ["images", "low_res"])
def test_unlabeled_arrays_need_a_label_for_a_network_that_takes_labels(runs, field):
    array = np.zeros((2, 8, 8, 3), np.uint8)
    run = runs["named" if field == "images" else "upsample"]
    how = dict(task="edit", images=array) if field == "images" else dict(low_res=array)
    with pytest.raises(ValueError, match=r"^label must be given"):
        labels_of(run, **how)
    assert labels_of(run, label="dog", **how)[0] == [run.class_names.index("dog")]
    if field == "images":
        assert labels_of(runs["plain"], **how)[0] == [0]


def test_named_classes_mean_nothing_to_a_network_whose_classes_have_numbers(
    runs, tmp_path
):
    named = write_classes(tmp_path / "named", ("cat", "dog"), n=1)
    with pytest.raises(ValueError, match=r"cat, dog for a network .* numbers only"):
        labels_of(runs["numbers"], task="edit", images=named)
    numbered = write_classes(tmp_path / "numbered", ("1", "3"), n=1)
    assert labels_of(runs["numbers"], task="edit", images=numbered)[0] == [1, 3]
    large = write_classes(tmp_path / "large", ("1", "10"), n=1)
    with pytest.raises(ValueError, match=r"must be below 4, got 10"):
        labels_of(runs["numbers"], task="edit", images=large)


# Second networks


def test_a_second_stage_and_a_classifier_are_told_the_label_of_the_same_name(runs):
    named, second, guide = (runs[k] for k in ("named", "upsample", "classifier"))
    assert labels_of(named, label="cat,dog", upsample=second) == [[1, 2], None, [1, 0]]
    assert labels_of(named, guide=guide) == [[1, 2, 3], [2, 1, 0], None]
    with pytest.raises(ValueError, match=r"^upsample must know .* know ant, owl\.$"):
        labels_of(named, upsample=second)
    with pytest.raises(ValueError, match=r"^classifier must know .* not know ant\.$"):
        labels_of(named, label="ant,cat", guide=guide)


def test_labels_are_called_as_by_the_network_that_they_are_of(runs):
    plain = dataclasses.replace(runs["plain"], class_names=("5", "6"))  # of its data
    guided = pipeline.SamplingOptions(classifier=runs["classifier"].workdir)
    assert pipeline.bind_sampler(plain).class_names is None
    assert pipeline.bind_sampler(plain, guided).class_names == ("owl", "dog", "cat")
    some = pipeline.SamplingOptions(label="bee")
    bound = pipeline.bind_sampler(plain, some, upsample=runs["upsample"])
    assert bound.class_names == ("dog", "cat", "bee")


def test_a_second_stage_that_takes_labels_is_told_some(runs):
    with pytest.raises(ValueError, match=r"^label must be given"):
        labels_of(runs["plain"], upsample=runs["upsample"])
    found = labels_of(runs["plain"], label="bee", upsample=runs["upsample"])
    assert found[0] == [2]


@pytest.mark.slow
def test_images_of_a_second_network_are_those_of_its_own_label(runs):
    """The label of a name draws what the same number draws from the network alone."""
    named, second = runs["named"], runs["upsample"]
    some = dict(n=2, steps=2, seed=3)
    small = jd.sample_images(named, label="dog", **some)
    whole = jd.sample_images(named, label="dog", upsample=second, **some)
    alone = jd.sample_images(second, label="dog", low_res=small, **some)
    other = jd.sample_images(second, label="bee", low_res=small, **some)
    np.testing.assert_array_equal(whole, alone)
    assert (whole != other).any()


# What is taken where nothing is said


def test_given_images_are_all_of_them_and_the_runs_own_are_its_test_split(
    runs, tmp_path
):
    path = write_classes(tmp_path / "images", NAMES, n=5)
    for how, n in (
        (dict(images=path), 20),
        (dict(images=path, split="test"), 2),
        (dict(), 4),
    ):
        assert len(labels_of(runs["named"], task="edit", **how)[0]) == n


def test_small_images_are_a_folder_or_one_picture(runs, tmp_path):
    path = write_classes(tmp_path / "images", ("cat",), n=3, size=4)
    assert len(labels_of(runs["upsample"], low_res=path)[0]) == 3
    inputs = labels_of(runs["upsample"], low_res=f"folder:{path}", label="cat")
    assert inputs[0] == [1]
    picture = path / "cat/0.png"
    assert labels_of(runs["upsample"], low_res=picture, label="bee")[0] == [2]
    assert labels_of(runs["plain"], task="edit", images=tmp_path / "images")[0] == [0]


@pytest.mark.slow
def test_evaluate_draws_as_many_as_a_given_reference_has_without_the_runs_data(
    runs, tmp_path
):
    run = runs["named"]
    lost = dataclasses.replace(run, config=run.config.copy_and_resolve_references())
    lost.config.data.path = str(tmp_path / "nowhere")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    how = dict(metrics="pixel_distance", reference=images, steps=1)
    with pytest.warns(UserWarning, match="more than 192 images"):
        scores = jd.evaluate(lost, **how)
    assert scores[0].images == 5
    with pytest.raises(ValueError, match=r"config\.data\.path must be a folder"):
        jd.evaluate(lost, metrics="pixel_distance", n=2, steps=1)


# Runs of version 0.1, which have no names


def test_runs_of_version_0_1_number_the_classes_of_folders_as_it_did(tmp_path):
    names = [str(i) for i in range(12)]
    write_classes(tmp_path / "own", names, n=1)
    source = dict(name="folder", path=str(tmp_path / "own"), image_size=8, batch_size=1)
    model = UNET | dict(num_classes=12)
    run = jd.load_run(make_run(tmp_path / "run", data=source, model=model))
    batches = pipeline.open_images(run, None, "all", batch_size=12)
    by_name = dict(zip(sorted(names), batches.labels, strict=True))  # by path
    assert batches.class_names == tuple(sorted(names))
    assert by_name == {name: sorted(names).index(name) for name in names}


def test_what_version_0_1_read_otherwise_is_refused(tmp_path):
    write_classes(tmp_path / "own/train", ("cat", "dog"))
    write_classes(tmp_path / "own/valid", ("cat", "dog"))
    source = dict(name="folder", path=str(tmp_path / "own"), image_size=8, batch_size=1)
    model = UNET | dict(num_classes=2)
    run = jd.load_run(make_run(tmp_path / "run", data=source, model=model))
    with pytest.raises(ValueError, match=r"which version 0\.1 read otherwise"):
        pipeline.open_images(run, None, "test", batch_size=1)


def old_run(root, names, **changes):
    """A run of version 0.1 on a folder of these classes."""
    write_classes(root / "own", names, n=1)
    source = dict(name="folder", path=str(root / "own"), image_size=8, batch_size=1)
    model = UNET | dict(num_classes=len(names))
    return jd.load_run(make_run(root / "run", data=source, model=model, **changes))


def test_classes_of_version_0_1_are_called_as_in_its_own_folder(tmp_path):
    names = [str(i) for i in range(12)]
    run = old_run(tmp_path, names)
    then = sorted(names)
    some = write_classes(tmp_path / "some", ("2", "3", "10"), n=1)
    alone = write_classes(tmp_path / "alone", ("2",), n=1)
    other = write_classes(tmp_path / "other", [f"c{i}" for i in range(12)], n=1)

    def labels(path):
        return sorted({*labels_of(run, task="edit", images=path)[0]})

    known = [then.index(name) for name in ("2", "3", "10")]
    assert labels(some) == sorted(known) and labels(alone) == known[:1]
    with pytest.raises(ValueError, match=r"must be of the classes .*, got c0, c1"):
        labels(other)
    lone_numbers = make_source(tmp_path, labels=[2, 3])  # numbers stay what they are
    assert labels(lone_numbers) == [2, 3]
    (tmp_path / "own").rename(tmp_path / "gone")
    for path in (some, alone, other):
        with pytest.raises(ValueError, match=r"by number only.*; give `label` instead"):
            labels(path)
    assert labels(lone_numbers) == [2, 3]
    assert labels_of(run, task="edit", images=some, label=3)[0] == [3]


def test_a_folder_of_one_class_brings_no_labels_to_a_run_of_version_0_1(tmp_path):
    write_classes(tmp_path / "own", ("images",))
    source = dict(name="folder", path=str(tmp_path / "own"), image_size=8, batch_size=1)
    run = jd.load_run(make_run(tmp_path / "run", data=source, **LABELS))
    with pytest.raises(ValueError, match=r"without labels; give `label` instead\.$"):
        labels_of(run, task="edit")
    assert labels_of(run, task="edit", label=2)[0] == [2]


# Numbers beside names that are numbers


@pytest.mark.parametrize(
    "names, expected",
    [
        (("1", "2", "10"), {1: 0, 2: 1, 10: 2}),
        (("0", "1", "2"), {0: 0, 1: 1, 2: 2}),
        (("02", "5"), {2: 0, 5: 1}),
        (("1", "cat"), {0: 0, 1: 1}),
        (("1", "01"), {0: 0, 1: 1}),  # which one is meant?
    ],
)
def test_a_number_is_a_name_where_all_classes_are_called_by_numbers(names, expected):
    labels = np.array([*expected], np.int32)
    images = np.zeros((len(labels), 8, 8, 1), np.uint8)
    found = data.fit_labels(data.InMemory(images, labels), names, len(names), "data")
    assert found.labels.tolist() == [*expected.values()]
    for unknown in (9, 11):
        wrong = data.InMemory(images[:1], np.array([unknown], np.int32))
        with pytest.raises(ValueError, match=r"^(data must be of|labels of the data)"):
            data.fit_labels(wrong, names, len(names), "data")


def test_second_networks_and_files_of_samples_know_numbers_by_name(
    runs, tmp_path, monkeypatch
):
    numbered = runs["numbered"]  # of the classes 1, 2, 10
    guide = dataclasses.replace(runs["classifier"], class_names=None)  # 0, 1, 2
    assert labels_of(numbered, label="1,2", guide=guide)[1] == [1, 2]
    with pytest.raises(ValueError, match=r"^classifier must know .* not know 10\.$"):
        labels_of(numbered, label="10", guide=guide)
    argv = ["sample", "--workdir", str(numbered.workdir), "--n", "2", "--steps", "1"]
    argv += ["--label", "10,2", "--out", str(tmp_path / "a.npz")]
    monkeypatch.setattr("sys.argv", argv)
    sample.main()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_1"], [10, 2])
    again = labels_of(numbered, task="edit", images=tmp_path / "a.npz")[0]
    assert again == labels_of(numbered, label="10,2")[0]


def test_renumbered_classes_are_counted_alike_in_memory_or_not(tmp_path):
    path, counts = write_classes(tmp_path / "images", ("cat", "dog"), n=2), []
    of_all: dict = dict(path=path, image_size=8, batch_size=1, train=False)
    for in_memory in (True, False):
        found = data.load("folder", "all", in_memory=in_memory, **of_all).examples
        found = data.match(found, ("ant", "cat", "dog", "owl"), "images")
        counts.append(found.counts())
    np.testing.assert_array_equal(counts, [[0, 2, 2, 0]] * 2)


# The programs


@pytest.mark.slow
def test_the_first_lines_of_programs_say_what_was_read(
    runs, tmp_path, capsys, monkeypatch
):
    path = write_classes(tmp_path / "images", ("cat", "dog"), n=2)
    (path / "notes.txt").touch()
    (path / ".hidden").touch()
    argv = ["sample", "--workdir", str(runs["named"].workdir), "--n", "2"]
    argv += ["--steps", "1", "--out", str(tmp_path / "a.npz"), "--task", "edit"]
    monkeypatch.setattr("sys.argv", [*argv, "--images", str(path)])
    sample.main()
    out, err = capsys.readouterr()
    assert "images of" not in err  # each line once
    run, images, *_ = out.splitlines()
    assert run.endswith("images of 8 x 8 x 3, 4 classes (ant, cat, dog, owl)")
    assert images.endswith(
        "all: 4 images of 8 x 8 x 3, 2 classes (cat 2, dog 2); left out: 1 .txt, "
        "1 hidden"
    )
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_1"], [1, 1])
    argv = ["evaluate", "--workdir", str(runs["named"].workdir), "--metrics", "bpd"]
    monkeypatch.setattr("sys.argv", [*argv, "--bpd-steps", "1"])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == run
    assert lines[1].endswith(
        "test: 4 images of 8 x 8 x 3, 4 classes (ant 1, cat 1, dog 1, owl 1)"
    )


def test_a_line_about_data_says_what_they_have(tmp_path):
    images = np.zeros((30, 2, 3, 1), np.uint8)
    many = data.from_arrays(images, np.arange(30) % 15, batch_size=1).examples
    line = data.describe(many)
    assert line.startswith("30 images of 2 x 3 x 1, 15 classes (0 2, 1 2, ")
    assert line.endswith("9 2, ...)")
    none = data.from_arrays(images[:1], batch_size=1).examples
    assert data.describe(none) == "1 image of 2 x 3 x 1, no labels"


def test_a_run_is_continued_with_its_own_classes_only():
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 2, 0])
    found = data.InMemory(images, labels, class_names=("cat", "dog", "10"))
    found = dataclasses.replace(found, old_class_names=("10", "cat", "dog"))
    batches = data.from_arrays(images, labels, batch_size=1)
    batches = dataclasses.replace(batches, examples=found)
    for saved, expected in (
        ({"class_names": ["cat", "dog", "10"]}, [0, 1, 2, 0]),
        ({"class_names": ["dog", "10", "cat"]}, [2, 0, 1, 2]),
        ({}, [1, 2, 0, 1]),  # of version 0.1
    ):
        assert pipeline.match_classes(batches, saved).labels.tolist() == expected
    for names in (["cat", "dog"], ["cat", "dog", "owl"], None):
        with pytest.raises(ValueError, match=r"^classes of the data must be those of"):
            pipeline.match_classes(batches, {"class_names": names})
