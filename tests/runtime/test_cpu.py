"""What the programs set for XLA's CPU backend, and when they leave it alone."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from jax_diffusion.runtime import cpu


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
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu.jaxlib.version, "__version_info__", (0, 12, 0))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    dispatch = jax.config.read("jax_cpu_enable_async_dispatch")
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    yield found
    jax.config.update("jax_cpu_enable_async_dispatch", dispatch)


def test_flags_are_added_once_and_none_that_is_set_already_is_changed(
    libc, monkeypatch
):
    mine = "--xla_dump_to=x --xla_cpu_experimental_onednn_custom_call=false"
    monkeypatch.setenv("XLA_FLAGS", mine)
    cpu.tune()
    cpu.tune()
    assert os.environ["XLA_FLAGS"] == f"{mine} {cpu.ONEDNN_FLAGS[1]}"
    assert {option for option, _ in libc.calls} == {-1, -3}
    # The main thread's heap is the one that can keep a step's memory.
    assert not jax.config.read("jax_cpu_enable_async_dispatch")


@pytest.mark.parametrize("what", ["version", "machine"])
def test_flags_that_need_onednn_are_left_out_without_it(libc, monkeypatch, what):
    if what == "version":
        monkeypatch.setattr(cpu.jaxlib.version, "__version_info__", (0, 10, 2))
    else:
        monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    cpu.tune()
    assert "XLA_FLAGS" not in os.environ and libc.calls


@pytest.mark.parametrize("mine", [None, "--xla_dump_to=x"])
def test_without_onednn_malloc_alone_is_tuned(libc, monkeypatch, mine):
    if mine:
        monkeypatch.setenv("XLA_FLAGS", mine)
    cpu.tune(onednn=False)
    assert os.environ.get("XLA_FLAGS") == mine
    assert {option for option, _ in libc.calls} == {-1, -3}
    assert not jax.config.read("jax_cpu_enable_async_dispatch")


def test_with_an_accelerator_nothing_is_set(libc, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    cpu.tune()
    assert "XLA_FLAGS" not in os.environ and not libc.calls
    assert jax.config.read("jax_cpu_enable_async_dispatch")


@pytest.mark.slow
def test_xla_knows_the_flags_and_computes_with_them():
    code = (
        "from jax_diffusion.runtime import cpu; cpu.tune(); import jax.numpy as jnp;"
        "cpu.release_memory(); print(float(jnp.ones((8, 8)).sum()))"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "64.0", done.stderr


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


def test_programs_of_onednn_are_not_kept(untold):
    first, second = cpu.ONEDNN_FLAGS
    untold.setenv("XLA_FLAGS", f"--xla_dump_to=x {first}")
    assert kept_in() is None
    untold.setenv("XLA_FLAGS", first.replace("true", "false") + " " + second)
    assert kept_in() is not None


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
cpu.tune(onednn=False)
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
