"""The benchmark runs, finds no jaxce function wrong, and would say so if it were."""

import json

import jax.numpy as jnp
import pytest

import jaxce

from ..benchmarks import __main__ as command
from ..benchmarks import contenders, problems
from ..benchmarks.problems import Problem

KINDS = ("LOGITS", "DONATED", "FROM_MATMUL", "LOSS_ONLY", "DENSE", "COMPILING")
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
