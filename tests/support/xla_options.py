"""How XLA compiles in tests.

Tests run for a moment, and so do the programs that they start: better code does not pay
for them. Set XLA_FLAGS, if only to nothing, to have it everywhere.
"""

import jax

QUICK = {"xla_backend_optimization_level": 0}
AS_SHIPPED = {"xla_backend_optimization_level": 3}
"""`compiler_options` of `jax.jit` where the quick code is not exact enough."""

if jax.__version_info__ < (0, 11):  # XLA ends a process whose flags it does not know
    # The older emitters halve the time that is left.
    QUICK |= {"xla_cpu_use_fusion_emitters": False}
    AS_SHIPPED |= {"xla_cpu_use_fusion_emitters": True}
    QUICK |= {"xla_cpu_parallel_codegen_split_count": 1}

FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICK.items())
