"""What the programs set for XLA's CPU backend, and when they leave it alone."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_diffusion.runtime import cpu

MALLOC = (
    "GLIBC_TUNABLES",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
)


class Libc:
    """Takes down what is asked of malloc."""

    def __init__(self):
        self.calls = []

    def mallopt(self, *call):
        self.calls.append(call)


@pytest.fixture
def libc(monkeypatch):
    found = Libc()
    monkeypatch.setattr(cpu, "_glibc", lambda: found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("XLA_FLAGS", *MALLOC):
        monkeypatch.delenv(name, raising=False)
    dispatch = jax.config.read("jax_cpu_enable_async_dispatch")
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    yield found
    jax.config.update("jax_cpu_enable_async_dispatch", dispatch)


@pytest.mark.parametrize(
    ("mine", "then"),
    [
        (None, " ".join(cpu.XLA_FLAGS)),
        ("--xla_dump_to=x", f"--xla_dump_to=x {' '.join(cpu.XLA_FLAGS)}"),
        (
            "--xla_backend_optimization_level=0",
            f"--xla_backend_optimization_level=0 {cpu.XLA_FLAGS[0]}",
        ),
    ],
)
def test_flags_of_xla_malloc_and_the_thread_are_tuned(libc, monkeypatch, mine, then):
    if mine:
        monkeypatch.setenv("XLA_FLAGS", mine)
    cpu.tune()
    cpu.tune()
    assert os.environ["XLA_FLAGS"] == then
    # The main thread's heap is the one that can keep a step's memory.
    assert {option for option, _ in libc.calls} == {-1, -3}
    assert not jax.config.read("jax_cpu_enable_async_dispatch")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        *((name, "0", True) for name in MALLOC[1:]),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=9", True),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2", False),
        ("MALLOC_ARENA_MAX", "2", False),
    ],
)
def test_what_the_environment_tells_malloc_stays(libc, monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    cpu.tune()
    assert bool(libc.calls) is not told


def test_with_an_accelerator_nothing_is_set(libc, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    cpu.tune()
    assert "XLA_FLAGS" not in os.environ and not libc.calls
    assert jax.config.read("jax_cpu_enable_async_dispatch")


FAULTS = """
import ctypes, importlib.util, resource
from jax_diffusion.runtime import cpu
importlib.util.find_spec = lambda name: None  # as if there were no accelerator
cpu.tune()
libc, size = ctypes.CDLL(None), (1 << 31) - (1 << 26)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = libc.malloc(size)
    ctypes.memset(piece, 1, size)
    libc.free(piece)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(cpu.platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_memory_of_a_step_of_nearly_2_gib_is_kept_for_the_next_step():
    env = {k: v for k, v in os.environ.items() if k not in MALLOC}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    first, second = map(int, done.stdout.split())
    assert second < first / 100


@pytest.mark.slow
def test_a_tuned_process_computes_the_gradient_of_another_one(tmp_path):
    """With other flags, that call oneDNN, jaxlib 0.12 makes it wrong by a fifth."""
    code = """
import sys
if sys.argv[1] == "tuned":
    from jax_diffusion.runtime import cpu
    cpu.tune()
import jax, jax.numpy as jnp, numpy as np
from jax.flatten_util import ravel_pytree
from support.tiny import TinyNet
net, key = TinyNet(2), jax.random.key(0)
x, t = jax.random.normal(key, (16, 8, 8, 1)), jnp.arange(16.0)
label = jnp.arange(16) % 10
params = net.init(key, x, t, label)
def loss(params):
    return jnp.mean(net.apply(params, x, t, label) ** 2)
grad = jax.jit(jax.grad(loss))(params)
np.save(sys.argv[2], ravel_pytree(grad)[0])
"""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env["PYTHONPATH"] = "tests"
    found = []
    for how in ("plain", "tuned"):
        file = tmp_path / f"{how}.npy"
        subprocess.run([sys.executable, "-c", code, how, file], env=env, check=True)
        found.append(np.load(file))
    assert np.linalg.norm(found[0] - found[1]) < 1e-5 * np.linalg.norm(found[0])


# Compiled programs on disk

CPUINFO = """processor : {core}
model name : {model}
cpu MHz : {mhz}
flags : {flags}
"""


def cpuinfo(*, cores=2, model="A", mhz=1000, flags="fpu sse"):
    told = dict(model=model, flags=flags)
    return "\n".join(
        CPUINFO.format(core=core, mhz=mhz + core, **told) for core in range(cores)
    )


@pytest.fixture
def untold(monkeypatch, tmp_path):
    """JAX before anyone has told it to keep anything; its home is `tmp_path`."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def kept_in():
    """Where programs are kept."""
    cpu.keep_compiled()
    return jax.config.jax_compilation_cache_dir


@pytest.mark.parametrize("home", [None, "", "elsewhere"])
def test_programs_are_kept_in_the_users_cache_whatever_they_took(
    untold, tmp_path, home
):
    if home is not None:
        untold.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home else "")
    folder = pathlib.Path(kept_in())
    assert folder.parent == tmp_path / (home or ".cache") / "jax_diffusion"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_folder_that_jax_has_been_told_stays(untold):
    jax.config.update("jax_compilation_cache_dir", "mine")
    assert kept_in() == "mine"


def test_each_kind_of_machine_has_its_own_programs(untold):
    def folder_of(info, machine="x86_64"):
        untold.setattr(cpu.Path, "read_text", lambda self: info)
        untold.setattr(cpu.Path, "is_file", lambda self: info is not None)
        untold.setattr(cpu.platform, "machine", lambda: machine)
        jax.config.update("jax_compilation_cache_dir", None)
        return kept_in()

    one = folder_of(cpuinfo())
    assert folder_of(cpuinfo()) == folder_of(cpuinfo(cores=4, mhz=2000)) == one
    others = [
        folder_of(cpuinfo(flags="fpu sse avx512f")),
        folder_of(cpuinfo(model="B")),
        folder_of("processor : 0\nFeatures : fp asimd\n", "aarch64"),
        folder_of("processor : 0\nFeatures : fp asimd sve\n", "aarch64"),
        folder_of(None),
        folder_of(None, "arm64"),
    ]
    assert len({one, *others}) == 7


@pytest.mark.parametrize("info, name", [(cpuinfo(model="A 7"), "A 7"), ("", "z80")])
def test_model_name_is_that_of_the_cpu_or_its_architecture(monkeypatch, info, name):
    monkeypatch.setattr(cpu.Path, "read_text", lambda self: info)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "z80")
    assert cpu.model_name() == name


PROGRAM = """
import jax, jax.numpy as jnp
from jax_diffusion.runtime import cpu
cpu.tune()
cpu.keep_compiled()
seen = []
jax.monitoring.register_event_listener(lambda name, **kwargs: seen.append(name))
print(float(jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.eye(8))[0, 0]))
print(*(seen.count(f"/jax/compilation_cache/cache_{w}") for w in ("misses", "hits")))
"""


@pytest.mark.slow
def test_a_program_that_is_started_again_compiles_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    (first, counts), (second, again) = said
    assert first == second
    compiled, found = map(int, counts.split())
    assert compiled > 0 and found == 0 and again == f"0 {compiled}"
