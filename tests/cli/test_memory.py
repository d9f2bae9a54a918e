"""Memory: what is needed is compared with what is free, and no more than that is taken."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, SMALL, config_of, peak_of, random_weights, split
from program import SUM, refused, run_main

import formats
import llama3
from cli import memory
from cli.messages import UsageError, peak_rss_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def least_that_suffices(monkeypatch, *arguments):
    """The least free memory with which check_memory takes `arguments`, but for a few bytes."""
    too_little, enough = 0.0, 1e15
    while enough - too_little > 2:
        middle = (too_little + enough) / 2
        monkeypatch.setattr(memory, "free_bytes", lambda device, middle=middle: middle)
        try:
            memory.check_memory(*arguments)
            enough = middle
        except UsageError:
            too_little = middle
    return enough


# --- what is free ---------------------------------------------------------------------------------


def free_of(monkeypatch, **files):
    """What free_bytes finds where these files are all that the system has, or `more` by paths."""
    paths = {"meminfo": "/proc/meminfo"}
    paths |= {n: f"/sys/fs/cgroup/memory.{n}" for n in ("current", "max", "stat")}
    contents = files.pop("more", {})
    contents |= {paths[name]: text for name, text in files.items()}

    def read_text(path, **_):
        if str(path) not in contents:
            raise FileNotFoundError(path)
        return contents[str(path)]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        return memory.free_bytes(CPU)


def test_what_is_free_is_what_the_machine_has_or_the_least_that_a_container_may_use(monkeypatch):
    machine = {"meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:  8000 kB\n"}
    container = {"current": "5000\n", "stat": "anon 1\ninactive_file 3000\nfile 9\n"}
    assert free_of(monkeypatch) == math.inf  # where nothing can be told, nothing is refused
    assert free_of(monkeypatch, **machine) == 8000 * 1024
    assert free_of(monkeypatch, **machine, **container, max="max\n") == 8000 * 1024
    assert free_of(monkeypatch, **machine, **container, max="6000\n") == 6000 - (5000 - 3000)
    assert free_of(monkeypatch, **container, max="10000000\n") == 10000000 - 2000
    assert free_of(monkeypatch, **machine, **container, max="1000\n") == 0

    # Groups in groups: the least of the own one and of those around it.
    stat, own = "inactive_file 100\ntotal_inactive_file 200\n", "/sys/fs/cgroup/a.slice/b"
    groups = {"/proc/self/cgroup": "1:name=x:/y\n0::/a.slice/b\n", f"{own}/memory.max": "max\n"}
    for place, used, limit in ((own, 700, 9000), ("/sys/fs/cgroup/a.slice", 800, 5000)):
        groups |= {f"{place}/memory.current": f"{used}\n", f"{place}/memory.stat": stat}
        groups[f"{place}/memory.max"] = f"{limit}\n"
    assert free_of(monkeypatch, **machine, more=dict(groups)) == 5000 - 800 + 100
    groups[f"{own}/memory.max"] = "1000\n"
    assert free_of(monkeypatch, **machine, more=dict(groups)) == 1000 - 700 + 100
    # Version 1: one of several controllers on its line, and no limit on its top.
    top = "/sys/fs/cgroup/memory"
    groups = {"/proc/self/cgroup": "5:cpu,memory:/docker/x\n3:pids:/\n"}
    for place, limit in ((f"{top}/docker/x", 3000), (top, 2**63 - 4096)):
        groups[f"{place}/memory.usage_in_bytes"] = "1500\n"
        groups |= {f"{place}/memory.stat": stat, f"{place}/memory.limit_in_bytes": f"{limit}\n"}
    assert free_of(monkeypatch, **machine, more=dict(groups)) == 3000 - 1500 + 200
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 80))
    assert memory.free_bytes(CUDA) == 70


# --- what is needed -------------------------------------------------------------------------------


def test_weights_cache_and_work_are_added_up(monkeypatch, demo_config):
    """A token's keys and values are 4 layers x 2 x 4 heads x 16 numbers."""
    at = {"device": CPU, "dtype": torch.bfloat16}
    fixed = 10**9

    def needed(weights, tokens, batch=1, dtype=torch.bfloat16):
        arguments = demo_config, weights, at["device"], dtype, tokens, 0, batch
        return least_that_suffices(monkeypatch, *arguments)

    assert needed(fixed, 3000) - needed(0, 3000) == pytest.approx(fixed, abs=9)
    per_token = 4 * 2 * 4 * 16 * 2
    # New tokens come one at a time: only their keys and values are added.
    for new in (1, 1000, 6000):
        least = least_that_suffices(monkeypatch, demo_config, 0, CPU, torch.bfloat16, 3000, new)
        assert least - needed(0, 3000) == pytest.approx(new * per_token, abs=9)
    # From as many on, the work does not grow: a block of the prompt has its greatest size.
    assert needed(0, 9000) - needed(0, 8000) == pytest.approx(1000 * per_token, abs=9)
    in_float32 = needed(0, 9000, dtype=torch.float32) - needed(0, 8000, dtype=torch.float32)
    assert in_float32 == pytest.approx(2000 * per_token, abs=9)
    assert needed(0, 9000, 3) == pytest.approx(3 * needed(0, 9000), abs=30)
    for tokens in (1, 100, 3000):
        assert needed(0, tokens) > tokens * per_token


def test_what_is_refused_is_told_with_both_numbers_and_a_way_out(capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8_000_000.0)
    arguments = ["--dtype", "bfloat16", "--max-new-tokens"]
    line = refused(capsys, *arguments, 128, "--prompt", "a " * 6000)
    assert line.startswith("this needs ")
    assert "weights 0 MB, cache 6 MB, work " in line  # mapped weights can be dropped
    assert "but 8 MB are free on cpu; use " in line
    assert re.search("fewer tokens|shorter prompt", line.partition("; use ")[2])
    run_main(capsys, *arguments, 5, *SUM)
    line = refused(capsys, *arguments, 500, *["--prompt", "a"] * 20)
    assert "cache 10 MB" in line


def test_what_is_needed_is_compared_before_the_weights_are_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10.0)
    monkeypatch.setattr(formats.Source, "load_weights", None)
    (tmp_path / "text").write_text("a text")
    for arguments in (SUM, ["--score", tmp_path / "text"], ["--chat"], [*SUM, "--chat"]):
        assert "but 0 MB are free on cpu" in refused(capsys, *arguments)


def test_a_model_in_several_files_must_fit_with_its_parts_joined(capsys, monkeypatch, tmp_path):
    """Unlike one file they cannot be mapped as they are."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps(SMALL))
        (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    weights = random_weights(config_of(one))
    split(weights, one, 1)
    split(weights, two, 2)
    size = sum(w.nbytes for w in weights.values() if w.dim() == 2)
    assert formats.open(two).bytes_needed(CPU, torch.float32) == size
    assert formats.open(one).bytes_needed(CPU, torch.float32) == 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0.9 * size)
    arguments = [*SUM, "--max-new-tokens", "3", "--ckpt-dir"]
    expected, _ = run_main(capsys, *arguments, one)
    line = refused(capsys, *arguments, two)
    assert f"weights {size / 1e6:.0f} MB" in line
    assert f"but {0.9 * size / 1e6:.0f} MB are free on cpu; use a smaller model" in line
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3.0 * size)
    assert run_main(capsys, *arguments, two)[0] == expected


def test_a_device_of_its_own_must_hold_the_weights(tmp_path, monkeypatch, demo_weights):
    """In the dtype that is computed in, and tied weights once."""
    tied = {name: w for name, w in demo_weights.items() if name != "output.weight"}
    torch.save(tied, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_bytes((DEMO / "params.json").read_bytes())
    source, size = formats.open(tmp_path), sum(weight.numel() for weight in tied.values())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4.0 * size)

    def check(dtype):
        needed = source.bytes_needed(CUDA, dtype)
        assert needed == size * dtype.itemsize
        memory.check_memory(source.config, needed, CUDA, dtype, 9, 0)

    with pytest.raises(UsageError, match=r"weights 4 MB.* free on cuda; use a smaller model"):
        check(torch.float32)
    check(torch.bfloat16)


# --- what is taken --------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_memory_of_a_prompt_is_bounded_and_counted(tmp_path, monkeypatch):
    """All scores at once would take 16 heads x 4,000^2 x 8 to 10 bytes: 2 GB and more."""
    config = config_of(tmp_path, dim=512, n_heads=16, n_layers=1, multiple_of=2048)
    made = random_weights(config)
    counted = least_that_suffices(monkeypatch, config, 0, CPU, torch.float32, 4000, 0)
    assert 40e6 < counted < 100e6
    prompt = [7] * 4000
    peak = peak_of(lambda: next(llama3.generate(prompt, made, config, max_new_tokens=1)))
    assert peak < counted + 0.25e9  # the allocator keeps parts of several sizes


def test_an_allocation_that_fails_is_told_in_one_line(capsys, monkeypatch):
    def forward(*args, **kwargs):
        torch.empty(2**60)

    monkeypatch.setattr(llama3, "forward", forward)
    line = refused(capsys, *SUM)
    assert line.startswith("out of memory (")
    assert line.endswith("; use a shorter prompt or a smaller model")


# --- the peak that --stats tells ------------------------------------------------------------------


def test_the_peak_of_memory_is_that_of_resident_memory(monkeypatch):
    text = "VmPeak:\t900 kB\nVmSize:\t800 kB\nVmHWM:\t70 kB\nVmRSS:\t60 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert peak_rss_bytes() == 70 * 1024


@pytest.mark.skipif(sys.platform == "win32", reason="nothing tells it there")
def test_the_peak_of_memory_is_told_without_proc_too(monkeypatch):
    known = peak_rss_bytes()
    for text in ("Name: python\n", None):

        def read_text(path, text=text):
            if text is None:
                raise FileNotFoundError
            return text

        monkeypatch.setattr(Path, "read_text", read_text)
        assert known / 2 < peak_rss_bytes() < known * 2
