"""What is measured of a program, and `python -m tests.aot`."""

import json

import jax
import jax.numpy as jnp
import pytest

from . import __main__ as command
from . import problems
from .measure import measure

pytestmark = pytest.mark.aot
targets = pytest.mark.parametrize("target", ["H100", "TPU v5e"])


@targets
def test_a_head_is_measured_in_matmuls(target):
    x, w, _ = problems.head(4096, 16384, tokens=8192)

    def loss(x, w):
        return jnp.square(x @ w).mean(dtype=jnp.float32)

    found = measure(jax.value_and_grad(loss, (0, 1)), (x, w), target)
    assert found.roofline.flops == 3 * 2 * 8192 * 4096 * 16384
    assert 1 <= found.time <= 1.2
    assert 3 <= found.kernels <= 10
    assert found.temp_mib >= 2 * 8192 * 16384 / 2**20  # the logits


@targets
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_loss_of_logits_is_measured_in_passes(target, dtype):
    arguments = (problems.logits(dtype)[0],)
    assert measure(lambda z: jnp.exp(z) + 1, arguments, target).passes == 2
    assert measure(lambda z: z.sum(), arguments, target).passes == pytest.approx(1, rel=0.02)


@pytest.fixture
def tiny(monkeypatch):
    def found(problem):
        if problem not in ("gpt-2", "logits"):
            return []
        x, w, _ = arguments = problems.head(128, 512, tokens=64)
        z = problems.logits(shape=(64, 512))[:1]
        if problem != "gpt-2":
            return [problems.Case(problem, "peer", jnp.exp, z)]
        return [
            problems.Case(problem, "jaxce", lambda x, w, _: x @ w, arguments),
            problems.Case(problem, "does not trace", lambda x, w, _: w @ x, arguments),
            problems.Case(problem, "does not end", forever, (x,)),
        ]

    def forever(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: jnp.sin(x) + x, x)

    monkeypatch.setattr(command, "cases", found)


def test_the_command_reports_every_number_and_why_another_failed(tiny, tmp_path, capsys):
    pytest.importorskip("tqdm", reason="tqdm is a dependency of the extra")
    report = tmp_path / "report.json"
    chosen = ["--target", "H100", "--problem", "gpt-2", "--problem", "logits"]
    assert command.main([*chosen, "--kernels", "1", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert set(result) == {"date", "versions", "tokens", "rows"}
    head, untraceable, endless, peer = result["rows"]
    named = {"problem", "contender", "target"}
    assert set(head) == named | {"temp_mib", "time", "kernels", "seconds", "slowest"}
    assert set(peer) == named | {"temp_mib", "passes", "kernels", "seconds", "slowest"}
    assert set(peer["slowest"][0]) == {"name", "op", "trips", "seconds", "flops", "bytes"}
    assert set(untraceable) == named | {"failed"}
    assert set(endless) == named | {"temp_mib", "failed"}
    assert "trip count" in endless["failed"]
    assert peer["passes"] == 2 and peer["kernels"] == 1
    printed = capsys.readouterr().out
    assert endless["failed"] in printed and untraceable["failed"] in printed


def test_a_report_keeps_other_programs_of_the_same_versions(tiny, tmp_path, monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is a dependency of the extra")
    report = tmp_path / "report.json"
    for problem in ("logits", "gpt-2", "logits"):
        assert command.main(["--target", "H100", "--problem", problem, "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["jaxce", "does not trace", "does not end", "peer"]
    monkeypatch.setattr(command, "versions", lambda: {"jax": "another"})
    assert command.main(["--target", "H100", "--problem", "logits", "--json", str(report)]) == 0
    assert [row["contender"] for row in json.loads(report.read_text())["rows"]] == ["peer"]


def test_a_program_that_two_contenders_share_is_compiled_once(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is a dependency of the extra")
    known: command.Known = {}
    z = problems.logits(shape=(64, 512))[:1]
    shared = [problems.Case("logits", name, lambda z: jnp.exp(z) + 1, z) for name in ("one", "the same")]
    rows = [command.row_of(case, "H100", 0, known) for case in shared]
    assert len(known) == 1 and rows[1] == rows[0] | {"contender": "the same"}


def test_the_command_fails_if_jaxce_does(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is a dependency of the extra")
    broken = problems.Case("logits", "jaxce, broken", lambda z: z @ z, problems.logits(shape=(64, 512))[:1])
    monkeypatch.setattr(command, "cases", lambda problem: [broken])
    assert command.main(["--target", "H100", "--problem", "logits"]) == 1
