"""What the programs set for XLA's CPU backend, and when they leave it alone."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from jax_diffusion import cpu


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


def test_with_an_accelerator_nothing_is_set(libc, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    cpu.tune()
    assert "XLA_FLAGS" not in os.environ and not libc.calls
    assert jax.config.read("jax_cpu_enable_async_dispatch")


def test_xla_knows_the_flags_and_computes_with_them():
    code = (
        "from jax_diffusion import cpu; cpu.tune(); import jax.numpy as jnp;"
        "cpu.release_memory(); print(float(jnp.ones((8, 8)).sum()))"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "64.0", done.stderr
