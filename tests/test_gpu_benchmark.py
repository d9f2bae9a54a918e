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
    timed = "prefill 8", "decode 8", "Q4_0 decode 128", "decode as generated"
    for row in (*timed, "transformers, eager: decode 8", "transformers, sdpa: prefill 8"):
        assert saved["rows"][f"tiny: {row}"] > 0
    assert "tokens/s" in printed


def test_numbers_are_kept_after_each_step_and_a_recording_that_failed_is_no_number(tmp_path):
    bench = gpu.Bench(gpu.torch.device("cpu"), 1, tmp_path / "gpu.json")
    bench.measure("first", lambda: 1.5)

    class Fallen:
        captures = False

    bench.measure("second", lambda: gpu.recorded(Fallen()))
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved == {
        "rows": {"first": 1.5},
        "failed": {"second": "RuntimeError: no step could be recorded"},
    }


def test_loading_is_measured_from_new_pages():
    config = gpu.llama3.config_from_params(gpu.SIZES["tiny"])
    weights = gpu.random_weights(config, gpu.torch.device("cpu"))
    found = gpu.loading(gpu.Bench(gpu.torch.device("cpu"), 1), weights)
    assert found.keys() == {"pinned", "plain"}
    assert min(found.values()) > 0


def test_where_no_time_is_left_no_step_begins(capsys):
    bench = gpu.main(["--device", "cpu", "--sizes", "tiny", "--minutes", "0"])
    assert {*bench.failed.values()} == {"no time was left"}
    assert [*bench.rows] == ["device"]
