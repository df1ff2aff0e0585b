"""A pod on paper: the training step of a large head, compiled ahead of time for 256 chips, of which none is needed.

    python -m pip install "jax[tpu]" tqdm && python -m tests.pod

writes tests/pod.json, and prints it: for each mesh (data, model), what a chip holds beside its arguments and results,
and what it exchanges in a step, as read from the compiled program and as predicted. With n = N/data rows and
k = K/model classes on each chip, bfloat16 operands and float32 sums:

    memory    = max(4·D·k + 2·n·D, 10·D·k): the sum of dw and a chip's dx; later that sum and three such in bfloat16
    exchanged = 2·n·D (dx, over model) + 2·D·k (dw, over data)

An axis of one chip has nothing to exchange. A ring of chips moves each of these bytes twice.
"""

import json
from pathlib import Path

MESHES = [(256, 1), (64, 4), (16, 16), (8, 32), (4, 64)]
SIZES = {"tokens": [2**18, 2**19], "classes": [2**16, 2**17]}  # at 16 × 16, beside the whole problem
N, D, K = 2**20, 4096, 2**18
RESULTS = Path(__file__).with_suffix(".json")


def compiled(topology, world: str, data: int, model: int, rows: int, classes: int):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxce

    devices = np.array(topology.devices).reshape(data, model)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    specs = (P("data", None), P(None, "model"), P("data"))

    def on_shard(x, w, labels):
        loss = jaxce.linear_cross_entropy(x, w, labels, normalizer=rows, axis_name="model")
        return lax.psum(loss, "data")

    def step(x, w, labels):
        loss = jaxce.linear_cross_entropy
        if world == "shard_map":
            loss = jax.shard_map(on_shard, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)
        value, (dx, dw) = jax.value_and_grad(loss, (0, 1))(x, w, labels)
        return value, dx, w - jnp.bfloat16(0.1) * dw

    shapes = ((rows, D), (D, classes), (rows,))
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32)
    placements = [NamedSharding(mesh, spec) for spec in specs]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype, sharding in zip(shapes, dtypes, placements, strict=True)
    ]
    outputs = (NamedSharding(mesh, P()), *placements[:2])
    return jax.jit(step, out_shardings=outputs, donate_argnums=1).lower(*arguments).compile()


def row_of(topology, world: str, data: int, model: int, rows: int, classes: int) -> dict:
    from .collectives import collectives

    n, k = rows // data, classes // model
    summed = k if world == "shard_map" else classes  # plain jit keeps a sum of dw for each chip, here spread over 16
    row = {
        "world": world,
        "data": data,
        "model": model,
        "tokens": rows,
        "classes": classes,
        "predicted": {
            "memory": max(4 * D * summed + (model > 1) * 2 * n * D, 10 * D * k),
            "exchanged": (model > 1) * 2 * n * D + (data > 1) * 2 * D * k,
        },
    }
    try:
        executable = compiled(topology, world, data, model, rows, classes)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"error": "more than a chip's 16 GB"}
    memory = executable.memory_analysis()
    assert memory is not None
    exchanges = collectives(executable.as_text() or "")
    counts: dict[str, int] = {}
    for c in exchanges:
        counts[c.operation] = counts.get(c.operation, 0) + c.times
    return row | {
        "memory": memory.temp_size_in_bytes,
        "exchanged": sum(c.bytes for c in exchanges),
        "collectives": counts,
    }


def main() -> None:
    import jax
    from tqdm import tqdm

    from .aot.targets import topologies  # which sets what libtpu reads when it is loaded

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16")
    problems = [("shard_map", *mesh, N, K) for mesh in MESHES]
    problems += [("shard_map", 16, 16, rows, K) for rows in SIZES["tokens"]]
    problems += [("shard_map", 16, 16, N, classes) for classes in SIZES["classes"]]
    problems += [("jit", 16, 16, N, K)]
    rows = [row_of(topology, *problem) for problem in tqdm(problems)]
    print(f"{'world':10} {'mesh':>8} {'tokens':>8} {'classes':>8}   MiB: held  predicted exchanged  predicted")
    for row in rows:
        measured = [f"{row[key] / 2**20:.0f}" if key in row else "-" for key in ("memory", "exchanged")]
        predicted = [f"{row['predicted'][key] / 2**20:.0f}" for key in ("memory", "exchanged")]
        mesh = f"{row['data']}×{row['model']}"
        print(
            f"{row['world']:10} {mesh:>8} {row['tokens']:8} {row['classes']:8} {measured[0]:>11} {predicted[0]:>10} "
            f"{measured[1]:>9} {predicted[1]:>10}  {row.get('collectives', row.get('error'))}"
        )
    about = {"chips": "TPU v5e, 16 × 16", "jax": jax.__version__, "features": D, "rows": rows}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
