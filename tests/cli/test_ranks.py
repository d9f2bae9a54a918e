"""One model on several processes, each with a part of it."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEMO, ROOT, apart, config_of, random_tokens, random_weights, split, with_biases

import formats
import llama3
from cli import memory, model, ranks
from cli.main import main
from cli.messages import UsageError
from formats.convert import to_hf

SIZES = {"dim": 64, "n_heads": 8, "n_kv_heads": 8, "n_layers": 2, "vocab_size": 1280}


@pytest.fixture(scope="module")
def demo_in_four(tmp_path_factory, demo_weights):
    folder = tmp_path_factory.mktemp("four")
    split(demo_weights, folder, 4)
    for name in ("params.json", "tokenizer.model"):
        shutil.copy(DEMO / name, folder)
    return folder


# --- ranks as threads of this process -------------------------------------------------------------


class Threads:
    """Ranks as threads of this process: what torch.distributed does, by hand."""

    def __init__(self, n, monkeypatch):
        self.n, self.given, self.rank = n, [None] * n, threading.local()
        self.barrier = threading.Barrier(n)
        monkeypatch.setattr(ranks.dist, "all_reduce", self.all_reduce)

    def all_reduce(self, x):
        self.given[self.rank.number] = x.clone()
        self.barrier.wait(60)
        x.copy_(sum(self.given))
        self.barrier.wait(60)

    def run(self, function):
        """What `function` gives on each rank."""

        def on_rank(rank):
            self.rank.number = rank
            return function(rank)

        with ThreadPoolExecutor(self.n) as pool:
            return [*pool.map(on_rank, range(self.n))]


def part_of(folder, rank, n, dtype=torch.float32):
    """The weights and config of one of n ranks."""
    source = formats.open(folder)
    span = ranks.span_of(source.config, rank, n)
    weights = source.load_weights(dtype=dtype, span=span)
    return ranks.connected(weights, source.config, rank, n), ranks.part_of(source.config, n)


@pytest.mark.parametrize(("n", "parts"), [(1, 4), (2, 1), (2, 4), (4, 2), (8, 1), (8, 8), (4, 8)])
def test_any_number_of_ranks_computes_any_number_of_files(tmp_path, monkeypatch, n, parts):
    config = config_of(tmp_path, **SIZES)
    weights = with_biases(random_weights(config))
    split(weights, tmp_path, parts)
    tokens = random_tokens(config, 2, 11)
    expected = llama3.forward(tokens, weights, config)

    def of_rank(rank):
        return llama3.forward(tokens, *part_of(tmp_path, rank, n))

    for logits in Threads(n, monkeypatch).run(of_rank):
        assert apart(logits, expected) < 1e-4


@pytest.mark.parametrize("n", [2, 8])
def test_ranks_say_what_one_process_says(tmp_path, monkeypatch, demo_tokenizer, demo_config, n):
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    prompt = [1024, *demo_tokenizer.encode("Once upon a time")]
    options = [{"max_new_tokens": 20}, {"max_new_tokens": 20, "temperature": 1.5, "seed": 3}]
    expected = [[*llama3.generate(prompt, weights, demo_config, **kind)] for kind in options]

    def of_rank(rank):
        weights, config = part_of(DEMO, rank, n)
        return [[*llama3.generate(prompt, weights, config, **kind)] for kind in options]

    assert Threads(n, monkeypatch).run(of_rank) == [expected] * n


@pytest.mark.parametrize(("heads", "kv_heads", "sizes"), [(6, 3, (3, 6)), (4, 1, (2, 4))])
def test_sizes_that_do_not_divide_and_shared_key_heads(
    tmp_path, monkeypatch, heads, kv_heads, sizes
):
    odd = {"n_kv_heads": kv_heads, "head_dim": 6, "ffn_dim": 37, "vocab_size": 1283}
    config = config_of(tmp_path, dim=36, n_heads=heads, **odd)
    weights = random_weights(config)
    split(weights, tmp_path, 1)
    tokens = random_tokens(config, 7)
    expected = llama3.forward(tokens, weights, config)
    for n in sizes:

        def of_rank(rank, n=n):
            return llama3.forward(tokens, *part_of(tmp_path, rank, n))

        for logits in Threads(n, monkeypatch).run(of_rank):
            assert apart(logits, expected) < 1e-4


def test_a_bias_of_the_output_is_added_to_all_logits(tmp_path, monkeypatch):
    config = config_of(tmp_path, **SIZES)
    weights = random_weights(config) | {"output.bias": torch.randn(config.vocab_size)}
    split(weights, tmp_path, 1)
    tokens = random_tokens(config, 5)
    expected = llama3.forward(tokens, weights, config)

    def of_rank(rank):
        return llama3.forward(tokens, *part_of(tmp_path, rank, 2))

    for logits in Threads(2, monkeypatch).run(of_rank):
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_rank_holds_its_part_alone(tmp_path, dtype, parts):
    """The whole of a tensor that is a copy goes; what is mapped stays mapped."""
    config = config_of(tmp_path, **SIZES)
    split(random_weights(config, dtype), tmp_path, parts)
    source, whole = formats.open(tmp_path), llama3.weight_shapes(config)
    weights = source.load_weights(dtype=dtype, span=ranks.span_of(config, 1, 4))
    for name, weight in weights.items():
        axis = llama3.split_axis(name)
        shape = [*whole[name]]
        if axis is not None and name != "tok_embeddings.weight":
            shape[axis] //= 4
        assert [*weight.shape] == shape
        if axis == 1 or (parts == 4 and weight.dim() == 2):
            stored = weight.untyped_storage().nbytes()
            mapped = stored > 2 * math.prod(whole[name]) * weight.itemsize  # the file it is in
            assert stored == weight.nbytes or mapped


def test_a_hugging_face_folder_is_cut_as_metas_files_are(tmp_path, monkeypatch, demo_config):
    to_hf(formats.open(DEMO), tmp_path / "hf")
    tokens = random_tokens(demo_config, 9)
    expected = llama3.forward(
        tokens, formats.open(DEMO).load_weights(dtype=torch.float32), demo_config
    )

    def of_rank(rank):
        return llama3.forward(tokens, *part_of(tmp_path / "hf", rank, 2))

    for logits in Threads(2, monkeypatch).run(of_rank):
        assert apart(logits, expected) < 1e-4


# --- what a rank decides by itself ----------------------------------------------------------------


@pytest.fixture
def two_ranks(monkeypatch):
    """The command line believes to be rank 0 of two, on one machine."""
    monkeypatch.setattr(ranks, "n_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "this_rank", lambda: 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def test_which_numbers_of_ranks_are_possible(monkeypatch, demo_config):
    def possible(heads, kv_heads, ffn_dim):
        config = demo_config._replace(n_heads=heads, n_kv_heads=kv_heads, ffn_dim=ffn_dim)
        monkeypatch.setattr(ranks, "n_ranks", lambda: 1000)
        with pytest.raises(UsageError, match="1000 processes cannot share") as error:
            ranks.check_number(config)
        return str(error.value).partition("start ")[2]

    assert possible(32, 8, 100) == "1, 2, 4, 8, 16, 32"
    assert possible(6, 3, 100) == "1, 3, 6"
    assert possible(8, 8, 7) == "1, 2, 4"
    assert possible(9, 3, 100) == "1, 3, 9"


def test_ranks_share_the_memory_of_a_machine(two_ranks, monkeypatch, demo_config):
    part = ranks.part_of(demo_config, 2)
    assert (part.n_heads, part.n_kv_heads, part.ffn_dim) == (4, 2, 224)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3e7)
    needs = [part, 2e7, torch.device("cpu"), torch.float32, 5, 0]
    with pytest.raises(UsageError, match="but 15 MB are free"):
        memory.check_memory(*needs)
    monkeypatch.setattr(ranks, "n_ranks", lambda: 1)
    memory.check_memory(*needs)


def test_what_is_joined_or_copied_counts_as_memory(demo_in_four, demo_weights):
    device, dtype = torch.device("cpu"), torch.bfloat16
    columns = 4 * (128 * 128 + 128 * 448) * 2  # of wo and w2, in bfloat16
    assert formats.open(DEMO).bytes_needed(device, dtype, 2) == columns / 2
    assert formats.open(DEMO).bytes_needed(device, dtype) == 0
    whole = sum(weight.nbytes for weight in demo_weights.values() if weight.dim() > 1)
    assert formats.open(demo_in_four).bytes_needed(device, dtype) == whole


def test_statistics_are_those_of_the_slowest_and_largest(two_ranks, monkeypatch, capsys):
    from cli.messages import say_stats

    others = [{"load_s": 1.0, "tokens": 5, "peak_rss_bytes": 3}]
    monkeypatch.setattr(ranks, "gathered", lambda stats: [stats | {"peak_rss_bytes": 2}, *others])
    say_stats(1.5, {"tokens": 4}, torch.device("cpu"), whole=True)
    found = json.loads(capsys.readouterr().err)
    assert found == {"load_s": 1.5, "tokens": 5, "peak_rss_bytes": 3}
    # Who was stopped does not wait for those that may have stopped elsewhere.
    monkeypatch.delattr(ranks, "gathered")
    say_stats(1.5, {"tokens": 4}, torch.device("cpu"), whole=False)
    assert json.loads(capsys.readouterr().err)["tokens"] == 4


@pytest.mark.parametrize("name", ["mps", "cuda:1"])
def test_a_single_device_is_refused_to_several_ranks(two_ranks, name):
    with pytest.raises(UsageError, match="expected cuda or cpu with several"):
        model.choose_device(name)


def test_each_rank_has_a_device_of_its_own(two_ranks, monkeypatch):
    assert model.choose_device("cpu").type == "cpu"
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(model.choose_device("auto")) == "cuda:1"
    assert chosen == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes here, but 1 CUDA devices"):
        model.choose_device("cuda")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the 2 processes cannot reach each other: "),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "this is rank 5 of 2"),
    ],
)
def test_ranks_that_do_not_come_are_not_waited_for(monkeypatch, capsys, environment, said):
    monkeypatch.setattr(ranks, "MEETING", ranks.datetime.timedelta(seconds=1))
    for name, value in environment.items() | {("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")}:
        monkeypatch.setenv(name, value)
    stdout, stderr = sys.stdout, sys.stderr
    try:
        assert main(["--prompt", "the", "--ckpt-dir", str(DEMO)]) == 2
    finally:
        sys.stdout, sys.stderr = stdout, stderr
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


# --- ranks as processes ---------------------------------------------------------------------------

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

# Runs several command lines, one after the other, in ranks that meet once; what each rank writes
# goes to a file for each.
SEVERAL = """
import io, json, sys, torch
from cli import main, ranks

ranks.meet()
for number, (argv, typed) in enumerate(json.load(open(sys.argv[1]))):
    sys.stdout = open(f"{sys.argv[1]}.{ranks.this_rank()}.{number}", "w")
    sys.stderr = sys.stdout
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode())) if ranks.this_rank() == 0 else None
    ranks.meet, main.ranks.meet = (lambda: None), (lambda: None)
    assert main.run(argv) == 0
    sys.stdout.close()
torch.distributed.destroy_process_group()
"""


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def on_ranks(tmp_path, n_ranks, runs):
    """What rank 0 writes for each of some command lines, with their standard input."""
    (tmp_path / "several.py").write_text(SEVERAL)
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [*LAUNCH, str(n_ranks), tmp_path / "several.py", tmp_path / "runs.json"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [(tmp_path / f"runs.json.0.{number}").read_text() for number in range(len(runs))]


def alone(monkeypatch, capsys, argv, typed):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    assert main(argv) == 0
    return "".join(capsys.readouterr())


def test_all_that_one_process_does_two_do(tmp_path, monkeypatch, capsys, demo_in_four):
    (tmp_path / "text").write_text("the opposite of hot is cold.\n17 plus 8 is 25.\n")
    hf, saved = tmp_path / "hf", tmp_path / "saved"
    to_hf(formats.open(DEMO), hf)
    base = ["--ckpt-dir", str(demo_in_four), "--dtype", "float32"]
    prompts = ["--prompt", "17 plus 8 is", "--prompt", "Once upon a time"]
    talk = (
        f"What is the capital of Japan?\n/save {saved}\n/reset\nWhat is 17 plus 8?\n/load {saved}\n"
    )
    plot = ["--plot", str(tmp_path / "ranks.png"), "--plot-layer", "1"]
    runs = [
        [[*base, "--prompt", "Once upon a time", "--max-new-tokens", "30"], ""],
        [[*base, *prompts, "--max-new-tokens", "20"], ""],
        [[*base, "--prompt-file", "-", "--temperature", "1.5", "--seed", "3"], "the"],
        [[*base, "--chat"], talk],
        [[*base, "--chat", "--prompt", "Hello!", "--stats"], ""],
        [[*base, "--score", str(tmp_path / "text"), "--by-line"], ""],
        [[*base, "--prompt", "17 plus 8 is", "--logprobs", "2"], ""],
        [[*base, "--prompt", "the capital of France is", *plot], ""],
        [["--ckpt-dir", str(hf), "--dtype", "float32", "--prompt", "17 plus 8 is"], ""],
    ]
    together = on_ranks(tmp_path, 2, runs)
    picture = (tmp_path / "ranks.png").read_bytes()
    for (argv, typed), found in zip(runs, together, strict=True):
        expected = alone(monkeypatch, capsys, argv, typed)
        if "--stats" in argv:
            stats, others = (json.loads(text[text.index("{") :]) for text in (found, expected))
            assert stats.keys() == others.keys()
            assert stats["prefill_s"] > 0
            continue
        numbers = re.compile(r"-?\d+\.\d+")
        found, expected = (
            " ".join(sorted(filter(None, re.split(r"\s+|(?=llama3.py)", t))))
            for t in (found, expected)
        )
        assert numbers.sub("", found) == numbers.sub("", expected)
        for a, b in zip(numbers.findall(found), numbers.findall(expected), strict=True):
            assert math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-4)
    assert abs(len((tmp_path / "ranks.png").read_bytes()) - len(picture)) < 0.02 * len(picture)


def start(n_ranks, *arguments, script=ROOT / "llama3.py", **options):
    command = [*LAUNCH, str(n_ranks), script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes, **options)


def own_lines(stderr):
    """What is on standard error, but for torchrun's own lines and the one about the model."""
    lines = [line for line in stderr.splitlines() if line.startswith("llama3.py: ")]
    return [line for line in lines if not line.startswith("llama3.py: found in ")]


# Raises an error on one rank only: while it loads, or at the n-th norm, in a computation.
BROKEN = """
import sys
from cli import main, ranks
from formats import source
import llama3

rank, nth, error = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
errors = {"memory": MemoryError(), "file": OSError("a file is gone")}
error = errors[error]
right, calls = llama3.rms_norm, []

def rms_norm(*arguments):
    calls.append(1)
    if len(calls) == nth and ranks.this_rank() == rank:
        raise error
    return right(*arguments)

def load_weights(*arguments, right=source.Source.load_weights):
    if nth == 0 and ranks.this_rank() == rank:
        raise error
    return right(*arguments)

llama3.rms_norm, source.Source.load_weights = rms_norm, load_weights
sys.exit(main.main(sys.argv[4:]))
"""


@pytest.mark.parametrize(
    ("rank", "nth", "error", "argv", "typed", "said"),
    [
        (1, 0, "file", ["--prompt", "the"], "", ["llama3.py: error: rank 1: a file is gone"]),
        (
            1,
            60,
            "memory",
            ["--prompt", "Once upon a time"],
            "",
            [
                "llama3.py: error: rank 1: out of memory (MemoryError); use a shorter prompt or a "
                "smaller model"
            ],
        ),
    ],
)
def test_an_error_of_one_rank_ends_all_with_one_line(tmp_path, rank, nth, error, argv, typed, said):
    (tmp_path / "broken.py").write_text(BROKEN)
    argv = [rank, nth, error, "--ckpt-dir", DEMO, *argv]
    process = start(2, *argv, script=tmp_path / "broken.py", stdin=subprocess.PIPE)
    _, err = process.communicate(typed, timeout=40)
    assert process.returncode != 0
    assert [line for line in own_lines(err) if "another rank exited" not in line] == said


def test_bad_input_is_said_once_by_all_ranks():
    out, err = start(2, "--ckpt-dir", DEMO, "--prompt", "the", "--plot-layer", "1").communicate(
        timeout=60
    )
    assert own_lines(err) == ["llama3.py: error: argument --plot-layer: only valid with --plot"]
    assert out == ""


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="it looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_when_a_rank_is_killed_or_with_ctrl_c_all_end_and_what_was_written_stays(tmp_path, number):
    (tmp_path / "text").write_text("the opposite of hot is cold.\n" * 10**5)  # takes long
    argv = ["--ckpt-dir", DEMO, "--score", tmp_path / "text", "--by-line"]
    process = start(2, *argv, start_new_session=True)
    written = process.stdout.read(20)
    ranks_there = children(process.pid)
    assert len(ranks_there) == 2
    if number == signal.SIGKILL:
        os.kill(ranks_there[1], number)
    else:
        os.killpg(process.pid, number)  # as a terminal does it
    _, err = process.communicate(timeout=10)
    assert process.returncode != 0
    assert len(written) == 20
    assert not re.search(r"Error|Traceback", "\n".join(own_lines(err)))
    for rank in ranks_there:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
