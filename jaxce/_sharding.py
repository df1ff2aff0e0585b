"""What block loops must know of sharded arrays, so that XLA keeps each block's work where its data is.

Under plain jit XLA decides where every array lives, and a trace sees the mesh of an array, but not which of its axes
are split over which mesh axes. If an axis is split evenly, though, the number of shards divides both its size and the
number of devices. So an axis viewed as gcd(size, devices) equal parts, [parts, size/parts], has the parts sharded and
the rest local, whatever the sharding; blocks that take an equal share of every part then move no data. On an Explicit
mesh the types tell the number of shards. Without a mesh, and inside `jax.shard_map`, there is one part.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def devices(*arrays: Array) -> int:
    """How many devices XLA may split these arrays over."""
    return max(math.prod(_sizes(a, AxisType.Auto, AxisType.Explicit).values()) for a in arrays)


def parts_of(a: Array, axis: int) -> int:
    explicit = _sizes(a, AxisType.Explicit)
    names = jax.typeof(a).sharding.spec[axis] if explicit else None
    shards = math.prod(explicit.get(name, 1) for name in (names if isinstance(names, tuple) else (names,)))
    return shards * math.gcd(a.shape[axis] // shards, math.prod(_sizes(a, AxisType.Auto).values()))


def gathered(a: Array, axis: int) -> Array:
    """`a`, not split along `axis`; other axes stay as they are. Said once before a loop, it is done once."""
    if devices(a) == 1:
        return a
    spec = P(*(None if i == axis % a.ndim else P.UNCONSTRAINED for i in range(a.ndim)))
    return lax.with_sharding_constraint(a, NamedSharding(jax.typeof(a).sharding.mesh, spec))


def in_auto(f: Callable[..., Any], like: Array, axes: Any, *args: Any) -> Any:
    """`f(*args)`, whose results are sharded over their first axes as `like` is over as many: `axes`, a tree of numbers.

    Explicit mesh axes are made Auto for it, so that one formulation serves both. `f` must not close over arrays.
    """
    typed = next((a for a in jax.tree.leaves((like, args)) if _sizes(a, AxisType.Explicit)), None)
    if typed is None:
        return f(*args)
    mesh, spec = jax.typeof(typed).sharding.mesh, jax.typeof(like).sharding.spec
    out = jax.tree.map(lambda n: NamedSharding(mesh, P(*spec[:n])), axes)
    return jax.sharding.auto_axes(f, axes=tuple(_sizes(typed, AxisType.Explicit)), out_sharding=out)(*args)


def _sizes(a: Array, *types: AxisType) -> dict[Any, int]:
    mesh = jax.typeof(a).sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, type_ in axes if type_ in types}
