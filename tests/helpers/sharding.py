"""Meshes of the eight CPU devices, arrays on them, and functions of shards."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    assert len(jax.devices()) == 8
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=devices)


def placed(mesh: jax.sharding.Mesh, arrays: Any, specs: Any) -> Any:
    """The arrays, each sharded as its `PartitionSpec` says."""
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), arrays, specs)


def on_shards(f: Callable, mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
