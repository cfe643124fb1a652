"""`tests.benchmarks.accelerator` at toy sizes: every row works, and what it says."""

import importlib
import math
import re
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.peers import peer

from jax_diffusion.runtime import device_peaks
from tests.benchmarks import accelerator, accelerator_checks, accelerator_speed
from tests.benchmarks.accelerator_speed import Found, Row, Unsupported

TOLD = {  # rows, how many of them, and what they tell
    r"golden U-Net diffusers_d": (1, r"off by \S+, tolerance 1e-04"),
    r"(train step|DDIM) beside the CPU": (2, r"\w+ \w*\s?by \S+, tolerance 1e-0[34]"),
    r"cuDNN attention beside XLA's, bfloat16": (1, r"not run: cuDNN is for CUDA"),
    r"resumed training": (1, r"the same bit for bit"),
    r"CIFAR-10 step, (bfloat16|TF32|float32), batch 2": (3, r"[\d,]+ images/s"),
    r"CIFAR-10 step, bfloat16, batch 2, remat": (1, r"[\d,]+ images/s"),
    r"CIFAR-10 DDIM, (bfloat16|float32)": (2, r"[\d,]+ image-steps/s"),
    r"ImageNet-64 step, bfloat16": (1, r"[\d,]+ images/s, batch 2"),
    r"attention of 2 x 2, xla": (1, r"[\d.]+ ms"),
    r"attention of 2 x 2, cudnn": (1, r"not run: cuDNN is for CUDA"),
    r"3 x 3 convolution, (NHWC|NCHW)": (2, r"[\d.]+ ms"),
    r"PyTorch: CIFAR-10 step, [\w, -]+, batch 2": (5, r"not run: .*PyTorch.*"),
}


def table_of(text):
    """The cells of a table, by the first one."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert rows[0] == list(accelerator.HEADS)
    assert all(len(row) == len(rows[0]) for row in rows)
    found = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert len(found) == len(rows) - 2
    return found


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU says")
def test_all_rows_of_the_accelerator_benchmark_run_at_toy_sizes(capsys):
    assert accelerator.main(["--toy"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cpu, cpu, jax ") and "(toy sizes)" in printed
    table = table_of(printed)
    for names, (count, result) in TOLD.items():
        found = [row for name, row in table.items() if re.fullmatch(names, name)]
        assert len(found) == count, names
        for row in found:
            assert re.fullmatch(result, row["result"]), row
            ran = not row["result"].startswith("not run") and "resumed" not in names
            assert row["peak GiB"] == ("unknown" if ran else "")
    assert len(table) == sum(count for count, _ in TOLD.values())
    step = table["CIFAR-10 step, bfloat16, batch 2"]
    assert float(step["program GiB"]) > 0 and float(step["compile s"]) > 0
    assert step["share"] == "unknown" and "2,688" in step["published"]


def test_a_check_that_misses_its_tolerance_makes_the_status_nonzero(
    monkeypatch, capsys
):
    name = "golden U-Net ermongroup_e"
    rows = accelerator_checks.rows(["ermongroup_e"], math.inf)
    (row,) = (row for row in rows if row.name == name)
    monkeypatch.setattr(accelerator, "all_rows", lambda *_: [row])
    assert accelerator.main(["--toy"]) == 0
    monkeypatch.setattr(accelerator_checks, "OUTPUT", 1e-9)
    assert accelerator.main(["--toy"]) == 1
    result = table_of(capsys.readouterr().out.split("\n\n")[-1])[name]["result"]
    assert re.match(r"failed: AssertionError: off by \S+, tolerance 1e-09", result)


def test_nan_and_wrong_updates_are_no_pass():
    for error in (math.nan, 2e-4):
        with pytest.raises(AssertionError, match="off by"):
            accelerator_checks.within("off by", error, 1e-4)
    tree = {"a": np.ones(3), "b": np.full(1, 1.0)}
    assert accelerator_checks.distance(tree, tree) == 0
    doubled = jax.tree.map(lambda a: 2 * a, tree)
    assert accelerator_checks.distance(doubled, tree) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.05, 1)])
def test_attention_of_cudnn_is_compared_where_there_is_cuda(
    factor, status, monkeypatch
):
    class Device:
        class client:
            platform_version = "PJRT C API\ncuda 12090"

    attend = jax.nn.dot_product_attention

    def stand_in(q, k, v, mask=None, *, implementation=None):
        if implementation != "cudnn":
            return attend(q, k, v, mask=mask)
        bias = None  # in place of a mask: gradients pass where all keys are masked
        if mask is not None:
            bias = jnp.where(mask, 0, 0.7 * jnp.finfo(q.dtype).min).astype(q.dtype)
        return factor * attend(q, k, v, bias=bias)

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    row = Row("cuDNN", "check", accelerator_checks.cudnn_attention, is_check=True)
    found, ran, failed = accelerator.run_row(row)
    assert (
        failed == status
        and ran != failed
        and re.search(r"off by \S+, tolerance 2e-02", found.result)
    )


def fail(error):
    def run():
        raise error

    return run


def test_rows_are_independent_and_only_failed_checks_count(capsys):
    far = time.monotonic() + 100
    rows = [
        Row("memory", "step", fail(MemoryError("RESOURCE_EXHAUSTED: 3 GiB\nat ..."))),
        Row("cannot", "check", fail(Unsupported("no such thing")), is_check=True),
        Row("works", "step", lambda: Found("1 image/s", "50%", "3", "1.00")),
    ]
    table, wrong = accelerator.run_all(rows, far)
    assert [cells[1] for cells in table] == [
        "failed: MemoryError: RESOURCE_EXHAUSTED: 3 GiB",
        "not run: no such thing",
        "1 image/s",
    ]
    assert not wrong and table[2][1:5] == ["1 image/s", "50%", "3", "1.00"]
    assert [bool(cells[5]) for cells in table] == [False, False, True]  # the peak
    apart = rows[2]._replace(is_elsewhere=True)
    assert accelerator.run_all([apart], far)[0][0][5] == ""
    wrong_row = Row("wrong", "check", fail(AssertionError("off")), is_check=True)
    table, wrong = accelerator.run_all([wrong_row, *rows], far)
    assert wrong and len(table) == 4 and table[3][1] == "1 image/s"


NONE = "no time left"


@pytest.mark.parametrize(
    ("seconds", "results"),
    [
        (65.0, ["done", NONE, NONE, NONE, NONE]),
        (130.0, ["done", "done", "done", NONE, NONE]),  # 69, then 9 seconds are left
        (145.0, ["done", "done", "done", NONE, "done"]),  # 24 are left
        (185.0, ["done", "done", "done", "done", "done"]),
    ],
)
def test_rows_that_would_not_end_in_time_are_skipped(seconds, results, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes(seconds):
        def run():
            now[0] += seconds
            return Found("done")

        return run

    rows = [
        Row("a", "step", takes(60.0)),
        Row("b", "quick", takes(1.0)),  # which might take as long as any row before
        Row("c", "step", takes(60.0)),
        Row("d", "other", takes(1.0)),
        Row("e", "quick", takes(20.0)),
    ]
    table, wrong = accelerator.run_all(rows, seconds)
    assert [cells[1] for cells in table] == results and not wrong


@pytest.mark.parametrize("first", [fail(MemoryError("3 GiB")), fail(Unsupported("no"))])
def test_rows_that_failed_or_were_skipped_do_not_count_as_quick(first, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 60.0
        return Found("done")

    rows = [Row("a", "step", slow), Row("b", "large", first)]
    rows += [Row(name, "large", slow) for name in "cd"]  # 40 seconds are left
    table, _ = accelerator.run_all(rows, 100.0)
    assert [cells[1] for cells in table[2:]] == [NONE, NONE]


def test_a_large_batch_that_does_not_fit_leaves_time_for_a_smaller_one(monkeypatch):
    now, tried = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def too_large(found, size, *_):
        now[0] += 40.0
        tried.append(size)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(accelerator_speed, "train_step", too_large)
    monkeypatch.setattr(accelerator_speed, "parts", lambda *_: None)
    rows = accelerator_speed.rows(accelerator_speed.FULL, accelerator.PUBLISHED, 100.0)
    (row,) = (row for row in rows if row.name.startswith("ImageNet-64"))
    assert accelerator.run_row(row) == (Found(NONE), False, False)
    assert tried == [64, 32]  # 20 seconds are left


def test_a_process_that_takes_too_long_has_no_time_left():
    def run():
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        subprocess.run(command, timeout=0.1)

    row = Row("slow", "check", run, is_check=True)
    assert accelerator.run_row(row) == (Found(NONE), False, False)
    (*_, late) = accelerator_checks.rows([], time.monotonic())
    assert late.name == "resumed training"
    if jax.default_backend() != "tpu":
        assert accelerator.run_row(late) == (Found(NONE), False, False)


def test_an_error_of_the_resumed_process_is_told(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ended = subprocess.CompletedProcess([], 1, "a log\n", "Traceback\nError: why\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(AssertionError, match=r"^Error: why$"):
        accelerator_checks.resumed_in_a_process(time.monotonic() + 100)


def without_cpu(platform=None):
    if platform == "cpu":
        raise RuntimeError("Unknown backend cpu")
    return DEVICES


DEVICES = jax.devices()


def test_without_jaxs_cpu_nothing_is_compared_with_it_or_counted(monkeypatch):
    monkeypatch.setattr(jax, "devices", without_cpu)
    with pytest.raises(Unsupported, match="JAX_PLATFORMS leaves out the CPU"):
        accelerator_checks.beside_cpu()
    a = jax.ShapeDtypeStruct((4, 4), np.float32)
    assert math.isnan(accelerator_speed.operations(jnp.dot, a, a, platform="cuda"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs no accelerator")
def test_without_an_accelerator_the_benchmark_says_so_and_the_status_is_2(capsys):
    assert accelerator.main([]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err == (
        "There is no accelerator that JAX can use; --toy runs without one.\n"
    )


def test_the_share_is_the_roofline_over_the_time(monkeypatch):
    class Compiled:  # as of a GPU: the product is a call of cuBLAS, and not counted
        def cost_analysis(self):
            return {"flops": 7.0, "bytes accessed": moved}

        def as_text(self):
            return ""

    args = [jax.ShapeDtypeStruct((64, 64), np.float32)] * 2
    kind = jax.devices()[0].device_kind
    flops, moved = 2.0 * 64**3, 3.0 * 4 * 64**2  # of the least time of one second
    for rate, memory in ((flops, math.inf), (math.inf, moved)):
        peak = device_peaks.Peak(math.inf, rate, memory, 1.0, 1, 1.0)
        monkeypatch.setitem(device_peaks.PEAKS, kind, peak)
        share = accelerator_speed.share(jnp.dot, args, Compiled(), "float32", 4.0)
        assert share == "25%"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_operations_are_counted_for_platforms_that_are_not_here(platform):
    a = jax.ShapeDtypeStruct((8, 16), np.float32)
    b = jax.ShapeDtypeStruct((16, 4), np.float32)
    count = accelerator_speed.operations(jnp.dot, a, b, platform=platform)
    assert count == 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("stats", "before", "cell"),
    [
        (None, None, "unknown"),
        ({"bytes_in_use": 3}, None, "unknown"),
        ({"peak_bytes_in_use": 3 * 2**30}, None, "3.00"),
        ({"peak_bytes_in_use": 3 * 2**30}, 2**30, "3.00"),
        ({"peak_bytes_in_use": 3 * 2**30}, 3 * 2**30, "<= 3.00"),
    ],
)
def test_a_peak_is_a_rows_own_where_it_rose(stats, before, cell, monkeypatch):
    class Device:
        def memory_stats(self):
            return stats

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert accelerator.peak_gib(before)[0] == cell


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of PyTorch's own
def test_pytorchs_side_trains_the_network_of_the_config(monkeypatch):
    torch = pytest.importorskip("torch")
    diffusers = peer("diffusers")
    monkeypatch.syspath_prepend(accelerator.PYTORCH.parent)  # as for a script
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = importlib.import_module("accelerator_pytorch")
    assert tuple(theirs.MODES) == accelerator.MODES
    with torch.device("meta"):
        network = diffusers.UNet2DModel(**theirs.CIFAR10)
    ours = accelerator_speed.parts("cifar10", 32, ()).params
    count = sum(p.numel() for p in network.parameters())
    assert count == theirs.COUNT == sum(a.size for a in jax.tree.leaves(ours))
    small = theirs.CIFAR10 | dict(sample_size=8, norm_num_groups=4, layers_per_block=1)
    small |= {name: theirs.CIFAR10[name][:2] for name in ("down_block_types",)}
    small |= dict(up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    small |= dict(block_out_channels=(8, 8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait in loops for each other
    try:
        for mode in ("eager", "channels-last", "autocast"):
            assert theirs.images_per_second(small, mode, 2, 0.0, "cpu") > 0
    finally:
        torch.set_num_threads(threads)
