"""Several real JAX processes on this machine train a head whose classes are split over them: as one process does.

Each process is this very file, run as a program; they find each other on a free port and exchange by gloo.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

N, D, K, STEPS = 24, 8, 12 * 7, 5
TIMEOUT = 180  # seconds, of a whole run
HEARTBEAT = 10  # seconds after which a process that is gone is missed


def train(devices: int, die_at: int | None = None) -> None:
    """Prints the losses, then the sums of |x| and of |w|, both learned, of a head split over these devices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxce

    assert len(jax.devices()) >= devices
    mesh = jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(K, size=N), jnp.int32)
    specs = (P(), P(None, "model"))
    values = (rng.standard_normal((N, D)).astype("float32"), rng.standard_normal((D, K)).astype("float32") / 3)
    x, w = (
        jax.make_array_from_callback(v.shape, NamedSharding(mesh, s), lambda index, v=v: v[index])
        for v, s in zip(values, specs, strict=True)
    )

    def loss(x, w, labels):
        return jaxce.linear_cross_entropy(x, w, labels, z_loss=0.01, block_size=8, axis_name="model")

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(*specs, P()), out_specs=P(), check_vma=True)

    @jax.jit
    def step(x, w):
        value, gradients = jax.value_and_grad(mapped, (0, 1))(x, w, labels)
        x, w = (a - 0.5 * g for a, g in zip((x, w), gradients, strict=True))
        return value, x, w

    for i in range(STEPS if die_at is None else 10**6):
        if i == die_at and jax.process_index() == devices - 1:
            os._exit(7)
        value, x, w = step(x, w)
        print("trained:", float(value), flush=True)
    for total in jax.jit(lambda x, w: (jnp.abs(x).sum(), jnp.abs(w).sum()))(x, w):
        print("trained:", float(total), flush=True)


def join(address: str, processes: int, process: int, die_at: int | None) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, processes, process, initialization_timeout=TIMEOUT, heartbeat_timeout_seconds=HEARTBEAT
    )
    train(processes, die_at)


def start(processes: int, die_at: int | None = None) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.sharding.test_processes", f"127.0.0.1:{port}", str(processes)]
    return [
        subprocess.Popen(
            [*command, str(i), json.dumps(die_at)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def outputs_of(running: list[subprocess.Popen]) -> list[str]:
    """What each printed, when all have ended; none outlives this."""
    deadline = time.monotonic() + TIMEOUT
    try:
        return [process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def numbers_in(output: str) -> list[float]:
    return [float(line.removeprefix("trained:")) for line in output.splitlines() if line.startswith("trained:")]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one_does(processes, capsys):
    train(1)
    wanted = numbers_in(capsys.readouterr().out)
    assert len(wanted) == STEPS + 2 and wanted[STEPS - 1] < wanted[0]
    running = start(processes)
    for process, output in zip(running, outputs_of(running), strict=True):
        assert process.returncode == 0, output
        np.testing.assert_allclose(numbers_in(output), wanted, rtol=2e-6)


def test_a_killed_process_ends_the_others_with_an_error():
    began = time.monotonic()
    running = start(2, die_at=3)
    survivor, killed = outputs_of(running)
    assert running[1].returncode == 7, killed
    assert running[0].returncode not in (0, None), survivor
    assert numbers_in(survivor) and "rror" in survivor, survivor
    assert time.monotonic() - began < TIMEOUT


if __name__ == "__main__":
    join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
