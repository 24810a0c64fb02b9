"""`pymllm verify`: what it prints, and its exit code."""

from __future__ import annotations

import json

from pymllm.checking import verify as verification
from pymllm.cli import main


def test_verify_passes_and_prints_the_worst_first(awq, capsys):
    assert main(["verify", str(awq), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8  # titles, a rule, three layers, two lines on the titles, the verdict
    assert main(["verify", str(awq), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["layers"][0]["prefix"] in lines[2]
    assert all(f"{title}:" in " ".join(lines[5:7]) for title in ("error", "large", "allowed", "by rule"))
    assert [layer["worst"] for layer in report["layers"]] == sorted(
        (layer["worst"] for layer in report["layers"]), reverse=True
    )


def test_verify_fails_with_1_and_strict_json(monkeypatch, capsys):
    bad = verification.LayerCheck(
        prefix="model.layers.0.mlp.up_proj",
        kind="linear",
        method="fp8",
        kernel="broken",
        numerics="none",
        errors={"ordinary": float("nan"), "large": 3.0},
        tolerance=1e-5,
        packed_exact=True,
        quantisation_error=0.0,
    )
    monkeypatch.setattr(
        "pymllm.checking.verify.verify", lambda *a, **k: verification.Verification("m", [bad])
    )
    assert main(["verify"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["verify", "--json"]) == 1
    text = capsys.readouterr().out
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["layers"][0]["worst"] is None
