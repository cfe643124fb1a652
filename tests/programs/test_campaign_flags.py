"""Flags that are misused: each is one sentence that names the flag, and nothing else.

All command lines run in one process, which starts as the programs do.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import ENCODER, LABELS, make_run, write_images

from jax_diffusion.runtime import locks
from jax_diffusion.runtime.resumable_npz import ResumableNpz

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.py")
MOST_SECONDS, MOST_MEBIBYTES = 30.0, 1024  # more is a hang
LONG = "x" * 300

# What the folder holds: runs labelled, plain and classifier; images.npz; a file and a
# folder; busy, a folder that another process writes to, and busy.npz.

# No path of an output: what the sentence must say.
OUTPUTS = {
    "": "must be the path",
    " ": "must be the path",
    "file/below": "must not lie below a file",
    "file/below/far": "must not lie below a file",
    LONG: "must be a path that can be written",
    "x" * 253 + ".npz": "must be a path that can be written",
    "a\0b": "NUL",
    "/proc/x": "that may be written to, got '/proc'",
}
TRAIN = ["--config", SMOKE, "--workdir"]
SAMPLE = ["--workdir", "labelled", "--n", "2", "--steps", "2"]
FOLDER = [*SAMPLE, "--out", "new"]
FILE = [*SAMPLE, "--out", "new.npz"]
EXPORT = ["--workdir", "labelled", "--export", "new.jaxexport"]
EVALUATE = ["--workdir", "labelled"]
IMAGES = ["--images", "few.npz", "--reference", "images.npz"]
HOSTS = [
    (["--num-processes", "2"], "coordinator"),
    (["--process-id", "0"], "coordinator"),
    (["--coordinator", "localhost:1"], "coordinator"),
    (["--coordinator", "x", "--num-processes", "2", "--process-id", "0"], "HOST:PORT"),
    (
        ["--coordinator", "x:1", "--num-processes", "2", "--process-id", "2"],
        "process_id",
    ),
]
EDIT = ["--task", "edit"]
INPAINT = ["--task", "inpaint"]

# Flags of `sample` without effect, by the command line in which they have none.
USELESS = {
    "generate": (
        FOLDER,
        {
            **{"--mask": "left", "--block": "2", "--level": "0.2", "--group": "4"},
            **{"--resamples": "2", "--jump": "3", "--images": "few.npz"},
            **{"--split": "train", "--classifier-scale": "2"},
            **{"--no-reclip": None, "--guidance-rescale": "0.5"},
            **{"--guidance-interval": "0,1", "--weights-beside": None},
        },
    ),
    "default": (FOLDER, {"--mask": "top", "--block": "2", "--classifier-scale": "1"}),
    "file": (FILE, {"--frames": "5"}),
    "edit": ([*FOLDER, *EDIT], {"--mask": "left", "--frames": "3", "--jump": "2"}),
    "inpaint": (
        [*FOLDER, *INPAINT],
        {"--jump": "3", "--level": "0.1", "--frames": "3", "--block": "2"},
    ),
    "slerp": (
        [*FOLDER, "--task", "slerp"],
        {"--level": "0.1", "--images": "few.npz", "--group": "3"},
    ),
    "export": (
        EXPORT,
        {
            **{"--n": "2", "--batch-size": "2", "--label": "1", "--frames": "5"},
            **{"--upsample": "plain", "--low-res": "few.npz"},
        },
    ),
}
RANGES = {  # of `sample`
    "--n": ["0", "-1", "1.5", "nan", "x", "", "99999999999999", "9" * 5000],
    "--seed": ["-1", "99999999999", "4294967296", "1.5", "x"],
    "--batch-size": ["0", "-5", "x"],
    "--steps": ["0", "-1", "9", "99999999999999", "2.5"],
    "--spacing": ["x", ""],
    "--sampler": ["x", "", "a.b:c"],
    "--eta": ["-1", "2", "nan", "inf"],
    "--churn": ["-1", "1", "nan", "inf", "x"],
    "--churn-interval": ["2,1", "1", "x", "0,1"],
    "--churn-noise": ["-1", "2", "nan", "x"],
    "--threshold": ["0", "2", "nan"],
    "--rounding": ["x", ""],
    "--label": ["4", "-1", "x", "", "nan", "1,,2", "1.5"],
    "--guidance": ["nan", "inf", "x"],
    "--classifier": ["nowhere", "plain", "file", ""],
    "--task": ["x", ""],
    "--frames": ["0", "2000000000"],
    "--ema": ["0.5", "x", "", "width=", "width=0.1", "width=nan"],
    "--ema-width": ["0.1", "0", "nan", "x", ""],
    "--upsample": ["nowhere", "plain"],
    "--low-res": ["few.npz", "nowhere"],
}


def cases():
    """Yields program, flags, and a word of the sentence."""
    for path, words in OUTPUTS.items():
        yield "train", [*TRAIN, path], words
        yield "sample", [*SAMPLE, "--out", path], words
        yield "sample", [*EXPORT[:2], "--export", path], words
        yield "evaluate", [*EVALUATE, "--metrics", "bpd", "--out", path], words
        to = ["--workdir", "labelled", "--to", "safetensors", "--out", path]
        yield "convert", to, words
    yield "train", [*TRAIN, "file"], "must be a folder"
    yield "train", [*TRAIN, "busy"], "must not be in use"
    yield "train", [*TRAIN, "labelled"], "another config"
    yield "sample", [*SAMPLE, "--out", "file"], "must be a folder"
    for name in ("grid.png", "frames.gif", "images.npy"):
        yield "sample", [*SAMPLE, "--out", name], "must be a folder or FILE.npz"
    yield "sample", [*SAMPLE, "--out", "folder.npz"], "must be a file"
    yield "sample", [*SAMPLE, "--out", "busy"], "must not be in use"
    yield "sample", [*SAMPLE, "--out", "busy.npz"], "must not be in use"
    yield "sample", [*SAMPLE, "--out", "others.npz"], "parts of other settings"
    yield "sample", [*SAMPLE, "--out", "bare.npz"], "record.json must be there"
    yield "sample", [*EXPORT[:2], "--export", "folder"], "must be a file"
    yield "evaluate", [*EVALUATE, "--out", "file"], "must be a folder"
    yield "evaluate", [*EVALUATE, "--out", "busy"], "must not be in use"
    for flags, words in HOSTS:
        yield "train", [*TRAIN, "new", *flags], words
        yield "sample", [*FOLDER, *flags], words
        yield "evaluate", [*EVALUATE, *flags], words
    for flags, useless in USELESS.values():
        for flag, value in useless.items():
            yield "sample", [*flags, flag, *([] if value is None else [value])], flag
    for flag, values in RANGES.items():
        for value in values:
            yield "sample", [*FOLDER, f"{flag}={value}"], ""
    for flag, value in {"--mask": "nowhere.png", "--resamples": "0"}.items():
        yield "sample", [*FOLDER, *INPAINT, flag, value], flag
    for flag, value in {"--images": "nowhere", "--split": "x", "--level": "2"}.items():
        yield "sample", [*FOLDER, *EDIT, flag, value], flag.strip("-")
    jump = [*FOLDER, *INPAINT, "--resamples", "2", "--jump", "2000000000"]
    yield "sample", jump, "jump must be at most"
    yield "sample", [*FOLDER, *INPAINT, "--resamples", "2000000000"], "resamples"
    yield "sample", [*FOLDER, "--task", "slerp", "--frames", "2000000000"], "frames"
    yield "sample", [*FOLDER, "--task", "enlarge", "--block", "2000000000"], "block"
    yield "sample", [*FILE, "--task", "sequence"], "must be a folder"
    yield "sample", ["--out", "new"], "--workdir"
    yield "sample", ["--workdir", "labelled"], "--out"
    yield "sample", [*FOLDER, "--export", "e"], "--out"
    yield "sample", [*FOLDER, "--nonsense"], "--nonsense"
    yield "sample", ["--workdir", "nowhere", "--out", "new"], "nowhere"
    yield "sample", ["--workdir", "", "--out", "new"], "workdir"
    yield "train", ["--config", SMOKE], "--workdir"
    yield "train", ["--workdir", "new"], "--config"
    yield "train", ["--config", "nowhere.py", "--workdir", "new"], "nowhere.py"
    yield "train", ["--config", "folder", "--workdir", "new"], "folder"
    yield "train", ["--config", "", "--workdir", "new"], ""
    yield "train", [*TRAIN, "new", "--nonsense"], "nonsense"
    yield "train", [*TRAIN, "new", "stray"], "stray"
    given = ["--reference", "few.npz", "--images", "few.npz"]
    for flags, word in [
        (["--workdir", "nowhere"], "nowhere"),
        ([], "--workdir"),
        (["--images", "few.npz"], "--workdir"),
        ([*IMAGES, "--ema", "0.9"], "--ema"),
        ([*IMAGES, "--metrics", "bpd"], "metrics"),
        ([*IMAGES, "--metrics", "x"], "metrics"),
        ([*IMAGES, "--metrics", ""], "metrics"),
        ([*IMAGES, "--metrics", "pixel_distance", "--steps", "5"], "steps"),
        ([*IMAGES, "--metrics", "pixel_distance", "--n", "99999"], "99999"),
        ([*IMAGES, "--metrics", "pixel_distance", "--n", "1"], "n must be >= 2"),
        ([*IMAGES, "--data", "images.npz"], "data"),
        ([*IMAGES, "--train-feature-classifier"], "train"),
        ([*IMAGES, "--metrics", "pixel_distance", "--inception", "x"], "inception"),
        ([*IMAGES, "--metrics", "pixel_distance", "--inception-url", "x"], "inception"),
        ([*IMAGES, "--metrics", "pixel_distance", "--ode-steps", "5"], "--ode-steps"),
        ([*IMAGES, "--metrics", "pixel_distance", "--save-moments", "m"], "moments"),
        ([*EVALUATE, "--ema", "0.5"], "--ema"),
        ([*EVALUATE, "--ema-width", "0.1,0.2"], "--ema-width"),
        ([*EVALUATE, "--ema-width", "0.1,,0.2"], "--ema-width"),
        ([*IMAGES, "--ema-width", "0.1"], "--ema-width"),
        ([*EVALUATE, "--seed", "99999999999"], "--seed"),
        ([*EVALUATE, "--seed", "-1"], "--seed"),
        ([*EVALUATE, "--n", "0"], "--n"),
        ([*EVALUATE, "--metrics", "bpd", "--n", "5"], "--n"),
        ([*EVALUATE, "--metrics", "bpd", "--ode-probes", "3"], "--ode-probes"),
        ([*EVALUATE, "--metrics", "bpd", "--bpd-steps", "9"], "--bpd-steps"),
        ([*EVALUATE, "--metrics", "bpd", "--reference", "few.npz"], "reference"),
        ([*EVALUATE, "--metrics", "nll_ode", "--bpd-steps", "2"], "--bpd-steps"),
        ([*EVALUATE, "--metrics", "accuracy"], "accuracy"),
        ([*EVALUATE, "--metrics", "cnn_fd"], "--feature-classifier"),
        ([*EVALUATE, "--feature-classifier", "file"], "--feature-classifier"),
        ([*EVALUATE, "--classifier-scale", "2"], "--classifier-scale"),
        ([*EVALUATE, "--split", "x"], "--split"),
        ([*EVALUATE, "--compare", "paper"], "--compare"),
        (
            [*EVALUATE, *given, "--metrics", "pixel_distance", "--data", "images.npz"],
            "data",
        ),
    ]:
        yield "evaluate", flags, word
    for path in ("", "folder", "file/below", LONG):
        flags = [*EVALUATE, "--metrics", "fid", "--save-moments", path]
        yield "evaluate", flags, "moments"
    convert = ["--workdir", "labelled"]
    openai = [*convert, "--to", "openai", "--out", "new.pt"]
    for flags, word in [
        (convert, "--checkpoint"),
        ([*convert, "--checkpoint", "file", "--to", "openai"], "both"),
        ([*convert, "--to", "openai"], "--out"),
        ([*convert, "--to", "x", "--out", "new"], "to must be"),
        ([*convert, "--to", "openai", "--out", "new.txt"], "out"),
        ([*convert, "--to", "safetensors", "--out", "file"], "out"),
        ([*openai, "--name", "x"], "--name"),
        ([*openai, "--image-size", "8"], "--image-size is for --checkpoint"),
        ([*openai, "--ignore-objects"], "--ignore-objects is for --checkpoint"),
        ([*openai, "--allow-nonfinite"], "--allow-nonfinite is for --checkpoint"),
        ([*openai, "--ema", "0.5"], "--ema"),
        ([*openai, "--ema-width", "0.1"], "--ema-width"),
        (["--workdir", "new", "--checkpoint", "few.npz", "--out", "x"], "--out"),
        (["--workdir", "new", "--checkpoint", "few.npz", "--ema", "0.9"], "--ema"),
        (
            ["--workdir", "new", "--checkpoint", "few.npz", "--drop-variance"],
            "--drop-variance is for --to",
        ),
        (["--workdir", "new", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--workdir", "file", "--checkpoint", "few.npz"], "workdir"),
        (["--workdir", "nowhere", "--to", "openai", "--out", "new.pt"], "nowhere"),
    ]:
        yield "convert", flags, word


CASES = [(program, flags, word) for program, flags, word in cases()]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every case did."""
    folder = tmp_path_factory.mktemp("misuses")
    write_images(folder / "images.npz")
    with np.load(folder / "images.npz") as arrays:
        np.savez(folder / "few.npz", arrays["arr_0"][:8], arrays["arr_1"][:8])
    make_run(folder / "labelled", **LABELS)
    make_run(folder / "plain")
    make_run(folder / "classifier", model=ENCODER, objective=None)
    for name in ("folder", "folder.npz", "busy"):
        (folder / name).mkdir()
    (folder / "file").write_text("text")
    Image.new("L", (8, 8)).save(folder / "mask.png")
    for name in ("others", "bare"):
        writer = ResumableNpz(folder / f"{name}.npz", {"seed": 5})
        writer.add({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)})
    (folder / "bare.parts" / "record.json").unlink()
    with contextlib.ExitStack() as stack:  # this process has them
        for name, kind in (("busy", "folder"), ("busy.npz", "file")):
            stack.enter_context(locks.hold("out", folder / name, kind))
        return run_cases(folder, CASES)


def run_cases(folder, cases):
    """Runs cases as support/misuses.py does, after one of every program."""
    warm = [
        ["train", [*TRAIN, "new", "--config.data.name=x"]],
        ["sample", [*FOLDER, "--ema", "x"]],
        ["evaluate", [*EVALUATE, "--ema", "x"]],
        ["convert", ["--workdir", "labelled", "--to", "x", "--out", "y"]],
    ]
    job = {"folder": str(folder), "cases": warm + [[p, f] for p, f, _ in cases]}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "misuses.py")],
        cwd=ROOT,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])[len(warm) :]


def test_every_misuse_is_one_sentence_and_status_2_and_nothing_is_written(found):
    assert len(CASES) >= 100 and len(found) == len(CASES)
    wrong = []
    for (program, flags, word), result in zip(CASES, found, strict=True):
        error = result["err"]
        good = result["status"] == 2 and not result["changed"]
        good &= error.startswith("error: ") and error.count("\n") == 1
        good &= error.endswith((".\n", "?\n")) and word in error
        if not good:
            flags = [flag[:40] for flag in flags]
            wrong.append((program, flags, word, result | {"err": error[-600:]}))
    assert not wrong, "\n\n".join(map(str, [len(wrong), *wrong]))


def test_no_misuse_hangs_or_takes_much_memory(found):
    slow = [
        (case[0], case[1], result["seconds"], result["mebibytes"])
        for case, result in zip(CASES, found, strict=True)
        if result["seconds"] > MOST_SECONDS or result["mebibytes"] > MOST_MEBIBYTES
    ]
    assert not slow
