"""`python -m jaxce` passes here, and fails when the loss is wrong."""

import json
import math
from pathlib import Path

import jax
import pytest

import jaxce
from jaxce import __main__ as command


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(command, "TIMED", (8, 4, 128))


@pytest.fixture
def float32_only(monkeypatch):
    monkeypatch.setattr(command, "GRADIENT_LIMIT", {"float32": command.GRADIENT_LIMIT["float32"]})


def test_verifies_this_install_and_prints_each_check(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "all checks passed" in printed and "WRONG" not in printed
    assert "integer_labels, confident" in printed and "MiB" in printed


def test_says_which_jaxce_it_verifies(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--version"])
    assert capsys.readouterr().out.split() == ["jaxce", jaxce.__version__, "in", str(Path(jaxce.__file__).parent)]


def test_json_has_errors_times_and_memory(float32_only, capsys):
    assert command.main(["--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["ok"] and report["versions"]["jax"] == jax.__version__
    assert all(row["ok"] and row["loss_error"] <= row["loss_limit"] for row in report["accuracy"])
    assert {row["function"] for row in report["cost"]} >= {"jaxce", "jaxce, x @ w"}
    assert all(row["milliseconds"] > 0 and row["temp_mib"] >= 0 for row in report["cost"])
    assert "all checks passed" in printed.err


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("softmax_cross_entropy", lambda loss: -loss),
        ("softmax_cross_entropy", lambda loss: loss * (1 + 1e-5)),
        ("softmax_cross_entropy", lambda loss: loss * math.nan),
        ("linear_cross_entropy", lambda loss: 0 * loss),
        ("linear_cross_entropy", lambda loss: loss * (1 + 1e-5)),
    ],
)
def test_exits_with_1_and_says_so_when_a_loss_is_wrong(float32_only, monkeypatch, capsys, name, wrong):
    right = getattr(jaxce, name)
    monkeypatch.setattr(jaxce, name, lambda *args, **options: wrong(right(*args, **options)))
    assert command.main(["--quick", "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out, parse_constant=pytest.fail)
    failed = {row["check"].split(",")[0] for row in report["accuracy"] if not row["ok"]}
    assert failed == {name} and not report["cost"]
    assert "WRONG" in printed.err
