"""What the losses must know of sharded arrays: how classes are split, and how blocks keep their work with their data.

A trace cannot see how plain jit splits an axis. But if it is split evenly, the number of shards divides both the axis
and the devices, hence their gcd. So an axis is viewed as [gcd, rest], 12 classes on 8 devices as 4 parts of 3: then
`rest` is local, whatever the sharding. Blocks that take an equal share of every part move no data. On an Explicit mesh
the types tell the number of shards. Without a mesh, and inside `jax.shard_map`, there is one part.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ._checks import known
from ._rule import Sums, about


class ClassShards(NamedTuple):
    """The classes of a row: `local` of them here and, with `axis_name`, on each other shard of that mesh axis."""

    local: int
    axis_name: str | None = None

    @property
    def classes(self) -> int:
        return self.local * (1 if self.axis_name is None else lax.axis_size(self.axis_name))

    def offset(self) -> Array | int:
        return 0 if self.axis_name is None else self.local * lax.axis_index(self.axis_name)

    def ids(self) -> Array:
        """The local classes [local], counted over all shards as labels are."""
        return self.offset() + jnp.arange(self.local, dtype=jnp.int32)

    def total(self, partial_sums: Any) -> Any:
        return partial_sums if self.axis_name is None else lax.psum(partial_sums, self.axis_name)

    def cotangents(self, g: Any, like: Array) -> Any:
        """The transpose of `total`: from the cotangent g of a sum over shards, that of this shard's term, `like`.

        In `jax.shard_map(check_vma=True)` types tell that g is equal on all shards: it is copied. Elsewhere each shard
        holds a part of g: the parts are added.
        """
        return varying_as(g, like) if mesh_axes(self.offset()) else self.total(g)

    def joined(self, s: Sums) -> Sums:
        """The `Sums` of all shards. Only numbers per row are communicated."""
        if self.axis_name is None:
            return s
        m = lax.pmax(lax.stop_gradient(s.shift), self.axis_name)
        here, moved = s.shift == m, about(s, m)
        # `about` added 1 to `rest` where the maximum is. Small terms would be lost beside it: their `rest` is restored.
        # All shards together leave out one class. The other maxima count 1 each.
        if s.without_largest:
            moved = moved._replace(rest=jnp.where(here, s.rest, moved.rest))
        moved = self.total(moved._replace(shift=None, argmax=None))
        rest = moved.rest + (self.total(here.astype(m.dtype)) - 1) if s.without_largest else moved.rest
        argmax = s.argmax
        if argmax is not None:
            argmax = lax.pmin(jnp.where(here, argmax, jnp.iinfo(argmax.dtype).max), self.axis_name)
        return moved._replace(shift=m, rest=rest, argmax=argmax)


def mesh_axes(*trees: Any) -> frozenset[Any]:
    """The mesh axes over which any of these arrays varies, in `jax.shard_map(check_vma=True)`; none elsewhere."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(trees)))


def varying_as(tree: Any, *like: Any) -> Any:
    return varying_over(mesh_axes(like), tree)


def varying_over(axes: frozenset[Any], tree: Any) -> Any:
    """The arrays of `tree`, marked as varying over these mesh axes too: each shard has a copy, with its own gradient.

    Autodiff adds the copies' gradients up where the copies were made.
    """
    return jax.tree.map(lambda a: lax.pcast(a, tuple(sorted(axes - mesh_axes(a))), to="varying"), tree)


def reduced_as(a: Array, like: Array, reduce: Callable = lax.psum) -> Array:
    """`a`, reduced over the mesh axes that it varies over and `like` does not, and marked as `like` is."""
    axes = tuple(sorted(mesh_axes(a) - mesh_axes(like)))
    return varying_as(reduce(a, axes) if axes else a, like)


def shared_out(axes: frozenset[Any], a: Array) -> Array:
    """Equal parts of `a`, which varies over these mesh axes then: `reduced_as` adds them up to `a` again."""
    shards = math.prod(map(lax.axis_size, axes - mesh_axes(a)))
    return varying_over(axes, a if shards == 1 else a / shards)


def in_shard_map(a: Array) -> bool:
    return bool(_sizes(a, AxisType.Manual))


def devices(*arrays: Array) -> int:
    """How many devices XLA may split these arrays over."""
    return max(math.prod(_sizes(a, AxisType.Auto, AxisType.Explicit).values()) for a in arrays)


def parts_of(a: Array, axis: int) -> int:
    explicit = _sizes(a, AxisType.Explicit)
    names = jax.typeof(a).sharding.spec[axis] if explicit else None
    shards = math.prod(explicit.get(name, 1) for name in (names if isinstance(names, tuple) else (names,)))
    return shards * math.gcd(known(a.shape[axis] // shards, 1), math.prod(_sizes(a, AxisType.Auto).values()))


def gathered(a: Array, axis: int) -> Array:
    """`a`, not split along `axis`; other axes stay as they are. Said once before a loop, it is done once."""
    if devices(a) == 1:
        return a
    spec = P(*(None if i == axis % a.ndim else P.UNCONSTRAINED for i in range(a.ndim)))
    return lax.with_sharding_constraint(a, NamedSharding(jax.typeof(a).sharding.mesh, spec))


def last_axes_merged(a: Array, count: int) -> Array:
    """`a`, its last axes flattened to one. On an Explicit mesh that is split as its leading axes are.

    A mesh axis that splits an axis after one that is whole would split the product into strided pieces, not blocks:
    that one is gathered.
    """
    rows = a.ndim - count
    shape = (*a.shape[:rows], math.prod(a.shape[rows:]))
    if not _sizes(a, AxisType.Explicit):
        return a.reshape(shape)
    spec = jax.typeof(a).sharding.spec
    leading = itertools.takewhile(lambda names: names is not None, spec[rows:])
    names = tuple(n for names in leading for n in (names if isinstance(names, tuple) else (names,)))
    sharding = NamedSharding(jax.typeof(a).sharding.mesh, P(*spec[:rows], names or None))
    return a.reshape(shape, out_sharding=sharding)


def in_auto(f: Callable[..., Any], like: Array, axes: Any, *args: Any) -> Any:
    """`f(*args)`, run with Explicit mesh axes made Auto, so that one formulation serves both.

    `axes` is a tree of numbers like the results, or a prefix of one: the first n axes of a result are sharded as the
    first n of `like` are.
    `f` must not close over arrays.
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
