"""Devices to compile for. None is needed: XLA's compilers for them run on any CPU."""

import functools
import os
from collections.abc import Callable
from typing import Any

# Read when jax and libtpu are loaded: what they would otherwise ask of the machine they are on.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # none of the devices is here

import jax
from jax.experimental import topologies

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # for where jax was imported before

TPUS = {"TPU v5e": "v5e:2x2", "TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2"}
TARGETS = ("H100", *TPUS)

# Public facts of an H100 SXM, as XLA's GpuTargetConfigProto has them.
H100 = """
platform_name: "CUDA"
dnn_version_info { major: 8 minor: 9 patch: 4 }
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
"""


@functools.cache
def devices(target: str) -> Any:
    """One H100, or four TPUs."""
    if target == "H100":
        topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology="1x1x1")
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    return topology.devices


def compiled(f: Callable, arguments: Any, target: str) -> Any:
    """`f`, compiled for one device; `arguments` are `jax.ShapeDtypeStruct`s."""
    return lowered(f, arguments, target).compile()


def lowered(f: Callable, arguments: Any, target: str) -> Any:
    """What `compiled` compiles: two functions are the same program if the `as_text()` of this is the same."""
    sharding = jax.sharding.SingleDeviceSharding(devices(target)[0])
    there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    return jax.jit(f).lower(*there)


def temp_mib_of(program: Any) -> float:
    """What a compiled program needs beside its inputs and outputs, in MiB."""
    return program.memory_analysis().temp_size_in_bytes / 2**20


def temp_mib(f: Callable, arguments: Any, target: str) -> float:
    return temp_mib_of(compiled(f, arguments, target))
