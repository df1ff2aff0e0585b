"""`python -m jaxce` passes here, and fails when the loss is wrong."""

import json

import jax
import pytest

import jaxce
from jaxce import __main__ as command


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(command, "TIMED_SHAPE", (8, 128))


def test_verifies_this_install_and_prints_tables(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "all checks passed" in printed
    assert "confident, against float64" in printed


def test_json_has_errors_times_and_memory(capsys):
    assert command.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["jax"] == jax.__version__
    assert all(row["ok"] for row in report["accuracy"])
    assert {row["function"] for row in report["cost"]} >= {"jaxce"}
    assert all(row["milliseconds"] > 0 for row in report["cost"])


@pytest.mark.parametrize("wrong", [lambda loss: -loss, lambda loss: 0 * loss, lambda loss: loss * (1 + 1e-5)])
def test_fails_on_a_wrong_loss(monkeypatch, capsys, wrong):
    right = jaxce.softmax_cross_entropy_with_integer_labels
    monkeypatch.setattr(jaxce, "softmax_cross_entropy_with_integer_labels", lambda z, y: wrong(right(z, y)))
    assert command.main([]) == 1
    assert "WRONG" in capsys.readouterr().out
