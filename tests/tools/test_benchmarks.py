"""The benchmark runs, finds no jaxce function wrong, and would say so if it were."""

import json

import jax.numpy as jnp
import pytest

import jaxce

from ..benchmarks import __main__ as command
from ..benchmarks import contenders, gpu, problems
from ..benchmarks.problems import Problem

KINDS = ("LOGITS", "DONATED", "FROM_MATMUL", "LOSS_ONLY", "TOP_K", "DENSE", "COMPILING")
KEPT = (problems.DONATED, problems.DENSE)
TINY = [
    Problem(problems.LINEAR, (8, 4, 130), "float32"),
    *(Problem(getattr(problems, kind), (8, 130), "float32") for kind in KINDS),
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is a test dependency")
    monkeypatch.setattr(problems, "QUICK", TINY)
    monkeypatch.setattr(contenders, "installed", lambda module: False)  # peers are for those who install them


def test_measures_time_memory_and_error_of_every_problem(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert command.main(["--quick", "--repeats", "2", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert {row["problem"] for row in rows} == {problem.name for problem in TINY}
    ours = [row for row in rows if row["contender"].startswith("jaxce")]
    assert len(ours) == len(TINY) + 1 and not any("failed" in row for row in rows)
    assert all(row["error"] < 2e-6 and row["ms"] > 0 and row["temp MiB"] >= 0 for row in ours)
    assert "jaxce, recompute" in capsys.readouterr().out
    floors = [row for row in rows if row["contender"].startswith("floor")]
    assert len(floors) == len(TINY) + 1 and not any("error" in row for row in floors)


def test_json_keeps_other_problems(tmp_path):
    report = tmp_path / "report.json"
    for kind in ("dense", "donated", "dense"):
        assert command.main(["--quick", "--repeats", "1", "--only", kind, "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert [(row["problem"], row["contender"]) for row in result["rows"]] == [
        (problem.name, name) for problem in TINY for name in ("floor", "jaxce", "naive") if problem.kind in KEPT
    ]
    report.write_text(json.dumps({**result, "machine": {"device": "another"}}))
    assert command.main(["--quick", "--repeats", "1", "--only", "dense", "--json", str(report)]) == 0
    assert {row["problem"] for row in json.loads(report.read_text())["rows"]} == {TINY[-2].name}


def test_says_who_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(jaxce, "linear_cross_entropy", lambda x, w, labels, **_: jnp.mean(x @ w))
    assert command.main(["--quick", "--repeats", "1", "--only", "linear"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.fixture
def few(monkeypatch):
    """One loss of logits, and of a head what is measured first."""
    monkeypatch.setattr(gpu.problems, "LOGITS_DTYPES", {"logits": jnp.float32})
    monkeypatch.setattr(gpu.problems, "peers_of_a_head", lambda: {"optax": lambda x, w, y: reference_of(x @ w, y)})
    monkeypatch.setattr(gpu, "QUICK_CLASSES", ())
    every = gpu.problems.cases_of_logits
    monkeypatch.setattr(gpu.problems, "cases_of_logits", lambda *args: every(*args)[:1])


def reference_of(logits, labels):
    logits = logits.astype(jnp.float32)
    return jaxce.reference.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_the_benchmark_for_gpus_measures_tiny_shapes_on_a_cpu(few, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert gpu.main(["--quick", "--cpu", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert {"date", "device", "versions", "seconds"} <= set(result["machine"]) and result["left_out"] == []
    heads = {row["contender"]: row for row in result["rows"] if row["problem"] == "tiny"}
    assert list(heads) == ["three matmuls", "optax", *gpu.WITHOUT_SIZES, "jaxce, 16 rows"]
    assert all(row["ms"] > 0 and row["of matmuls"] > 0 and row["TFLOP/s"] > 0 for row in heads.values())
    assert all(heads[name]["difference"] < 0.02 for name in gpu.WITHOUT_SIZES)
    logits = {row["contender"]: row for row in result["rows"] if row["problem"] == "logits"}
    assert list(logits) == ["copy", "jaxce"] and all(row["GB/s"] > 0 for row in logits.values())
    assert "jaxce, 16 rows" in capsys.readouterr().out


def test_the_benchmark_for_gpus_keeps_its_time_and_says_what_it_left_out(few, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert gpu.main(["--quick", "--cpu", "--seconds", "0", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert result["rows"] == [] and len(result["left_out"]) == 8
    assert "left out, 0 s are over: tiny, jaxce, 16 rows" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "why"), [([], "no GPU: JAX found 'cpu'"), (["--cpu"], "--cpu needs --quick")])
def test_the_benchmark_for_gpus_refuses_a_cpu(options, why, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(options)
    assert why in capsys.readouterr().err
