"""benchmarks/gpu.py runs through, so that nothing but the card can fail when there is one."""

import json
import sys

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu


def test_each_step_is_a_row_and_one_that_fails_is_only_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PREFILLS", (8,))
    monkeypatch.setattr(gpu, "CONTEXTS", (8,))
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu.Bench, "bandwidth", lambda bench: 10.0)

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "loading", fails)
    out = tmp_path / "gpu.json"
    bench = gpu.main(["--device", "cpu", "--sizes", "tiny", "--out", str(out)])
    saved, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert saved["failed"] == {"tiny: loading GB/s": "RuntimeError: out of memory"}
    assert "| tiny: loading GB/s | failed: RuntimeError: out of memory |" in printed
    assert bench.rows["demo: answer"].strip() == "42"
    assert bench.rows["demo: off from float64"]["float32"] < 1e-5
    for row in ("prefill 8", "decode 8", "Q4_0 decode 128", "transformers decode 8"):
        assert saved["rows"][f"tiny: {row}"] > 0
    assert "tokens/s" in printed


def test_where_no_time_is_left_no_step_begins(capsys):
    bench = gpu.main(["--device", "cpu", "--sizes", "tiny", "--minutes", "0"])
    assert {*bench.failed.values()} == {"no time was left"}
    assert [*bench.rows] == ["device"]
