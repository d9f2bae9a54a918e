"""A model in several files, on one process or on several, each with a part of it."""

import datetime
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
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEMO, ROOT, apart, config_of, peak_of, random_tokens, random_weights, split

import checkpoint_files
import command_line
import convert
import llama3
from checkpoint_files import CheckpointError

SIZES = {"dim": 64, "n_heads": 8, "n_kv_heads": 8, "n_layers": 2, "vocab_size": 1280}
PARTS = [1, 2, 4, 8]


def with_biases(weights):
    """The same with a bias beside each matrix of a layer."""
    biases = {
        name.replace("weight", "bias"): 0.1 * torch.randn(len(weight)).to(weight.dtype)
        for name, weight in weights.items()
        if name.startswith("layers.") and weight.dim() == 2
    }
    return weights | biases


@pytest.fixture(scope="module")
def demo_in_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    split(dict(llama3.map_weights(DEMO, llama3.load_config(DEMO))), folder, 4)
    for name in ("params.json", "tokenizer.model"):
        shutil.copy(DEMO / name, folder)
    return folder


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", PARTS)
def test_files_are_joined_to_the_same_bits(tmp_path, dtype, parts):
    config = config_of(tmp_path, **SIZES)
    weights = with_biases(random_weights(config, dtype))
    split(weights, tmp_path, parts)
    loaded = llama3.load_weights(tmp_path, config, dtype=dtype)
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].dtype == weight.dtype
        assert torch.equal(loaded[name], weight)
    tokens = random_tokens(config, 11)
    expected = llama3.forward(tokens, weights, config)
    assert torch.equal(llama3.forward(tokens, loaded, config), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_over_the_pieces_are_those_with_the_whole(tmp_path, dtype):
    config = config_of(tmp_path, **SIZES)
    weights = with_biases(random_weights(config, dtype))
    split(weights, tmp_path, 4)
    mapped = llama3.map_weights(tmp_path, config)
    pieces = llama3.place_weights(mapped, torch.device("cpu"), torch.float32, join=False)
    assert isinstance(pieces["tok_embeddings.weight"], list)
    assert isinstance(pieces["layers.0.attention.wo.weight"], list)
    whole = {name: weight.float() for name, weight in weights.items()}
    tokens = random_tokens(config, 11)
    expected = llama3.forward(tokens, whole, config)
    assert apart(llama3.forward(tokens, pieces, config), expected) < 1e-5
    options = {"max_new_tokens": 9}
    expected = [*llama3.generate(tokens.tolist(), whole, config, **options)]
    assert [*llama3.generate(tokens.tolist(), pieces, config, **options)] == expected


def test_norms_and_single_files_are_not_copied_and_joining_takes_no_more_than_one_tensor(tmp_path):
    config = config_of(tmp_path, **SIZES | {"dim": 1024, "n_layers": 4, "ffn_dim": 4096})
    weights = random_weights(config, torch.float32)
    split(weights, tmp_path, 4)
    size = sum(weight.nbytes for weight in weights.values())
    largest = max(weight.nbytes for weight in weights.values())
    del weights
    mapped = llama3.map_weights(tmp_path, config)
    norms = {name: weight.data_ptr() for name, weight in mapped.items() if "norm" in name}
    loaded = {}

    def place():
        device = torch.device("cpu")
        loaded.update(llama3.place_weights(mapped, device, torch.float32))

    peak = peak_of(place)
    assert all(loaded[name].data_ptr() == address for name, address in norms.items())
    assert peak < size + 1.5 * largest + 2**24


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_files_for_more_ranks_than_heads_of_keys_may_hold_the_same_head(tmp_path, n_kv_heads):
    config = config_of(tmp_path, **SIZES | {"n_kv_heads": n_kv_heads})
    weights = random_weights(config, torch.float32)
    split(weights, tmp_path, 8)
    for part in range(8):
        path = tmp_path / f"consolidated.{part:02}.pth"
        file = torch.load(path)
        for name, weight in weights.items():
            if name.endswith(("wk.weight", "wv.weight")):
                file[name] = weight.chunk(n_kv_heads)[part * n_kv_heads // 8].clone()
        torch.save(file, path)
    loaded = llama3.load_weights(tmp_path, config)
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_several_files_become_a_hugging_face_folder(tmp_path, demo_in_four):
    convert.to_hf(demo_in_four, tmp_path / "four")
    convert.to_hf(DEMO, tmp_path / "one")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "four" / path.name).read_bytes() == path.read_bytes()


def test_a_vocabulary_of_minus_one_is_that_of_all_files(tmp_path):
    config = config_of(tmp_path, **SIZES)
    split(random_weights(config, torch.float32), tmp_path, 4)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert llama3.load_config(tmp_path).vocab_size == 1280


@pytest.fixture
def four_files(tmp_path):
    config = config_of(tmp_path, **SIZES)
    weights = random_weights(config, torch.float32)
    split(weights, tmp_path, 4)
    return tmp_path, config, weights


def changed(path, **entries):
    file = torch.load(path)
    file.update({name.replace("__", "."): value for name, value in entries.items()})
    torch.save({name: value for name, value in file.items() if value is not None}, path)


def refusal(folder, config):
    with pytest.raises(CheckpointError) as error:
        llama3.load_weights(folder, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_is_named(four_files):
    folder, config, _ = four_files
    (folder / "consolidated.02.pth").unlink()
    assert "consolidated.02.pth is missing, but there is consolidated.03.pth" in refusal(
        folder, config
    )
    (folder / "consolidated.03.pth").unlink()  # and so it is one for two
    assert "has shape [320, 64], expected [640, 64] from params.json for one of 2" in refusal(
        folder, config
    )


def test_a_file_of_another_model_is_refused(four_files):
    folder, config, weights = four_files
    path = folder / "consolidated.02.pth"
    changed(path, norm__weight=weights["norm.weight"] + 1e-3)
    found = refusal(folder, config)
    assert "consolidated.02.pth: its norm.weight is another one than that of" in found
    changed(path, norm__weight=weights["norm.weight"], output__weight=torch.zeros(320, 64).half())
    assert "consolidated.02.pth: its output.weight is another" in refusal(folder, config)
    changed(
        path, output__weight=torch.zeros(320, 64), layers__0__attention__wq__bias=torch.zeros(16)
    )
    assert "02.pth: one of it and consolidated.00.pth has layers.0.attention.wq.bias" in refusal(
        folder, config
    )


def test_a_file_whose_shapes_do_not_fit_its_place_is_refused(four_files):
    folder, config, weights = four_files
    changed(folder / "consolidated.03.pth", output__weight=weights["output.weight"])
    assert "03.pth: output.weight has shape [1280, 64], expected [320, 64] from" in refusal(
        folder, config
    )


def test_forgotten_pages_come_back_and_other_memory_stays(tmp_path):
    config = config_of(tmp_path, **SIZES)
    weights = random_weights(config, torch.float32)
    split(weights, tmp_path, 1)
    mapped = llama3.map_weights(tmp_path, config)
    own = torch.ones(2**16)
    checkpoint_files.forget([*mapped.tensors(), own, own[::2]])
    assert all(torch.equal(mapped[name], weight) for name, weight in weights.items())
    assert own.sum() == 2**16


# --- ranks, as threads ----------------------------------------------------------------------------


class Threads:
    """Ranks as threads of this process: what torch.distributed does, by hand."""

    def __init__(self, n, monkeypatch):
        self.n, self.given = n, [None] * n
        self.barrier = threading.Barrier(n)
        monkeypatch.setattr(llama3, "sum_over_ranks", self.sum_over_ranks)

    def sum_over_ranks(self, x, weights):
        if getattr(weights, "n_ranks", 1) == 1:
            return x
        self.given[weights.rank] = x
        self.barrier.wait(60)
        total = sum(self.given)
        self.barrier.wait(60)
        return total

    def run(self, function):
        """What `function` gives on each rank."""
        with ThreadPoolExecutor(self.n) as pool:
            return [*pool.map(function, range(self.n))]


@pytest.mark.parametrize("n_ranks", PARTS)
@pytest.mark.parametrize("parts", PARTS)
def test_any_number_of_ranks_computes_any_number_of_files(tmp_path, monkeypatch, parts, n_ranks):
    config = config_of(tmp_path, **SIZES)
    weights = with_biases(random_weights(config, torch.float32))
    split(weights, tmp_path, parts)
    tokens = random_tokens(config, 2, 11)
    expected = llama3.forward(tokens, weights, config)

    def of_rank(rank):
        part = llama3.map_weights(tmp_path, config, rank, n_ranks)
        part = llama3.place_weights(part, torch.device("cpu"), torch.float32)
        for name, shape in checkpoint_files.shapes_of_part(
            llama3.weight_shapes(config), config.head_dim, rank, n_ranks
        ).items():
            assert part[name].shape == shape
        return llama3.forward(tokens, part, config)

    for logits in Threads(n_ranks, monkeypatch).run(of_rank):
        assert apart(logits, expected) < 1e-4


@pytest.mark.parametrize("n_ranks", [2, 4, 8])
def test_ranks_say_what_one_process_says(
    tmp_path, monkeypatch, demo_config, demo_tokenizer, n_ranks
):
    weights = llama3.load_weights(DEMO, demo_config, dtype=torch.float32)
    split(weights, tmp_path, 2)
    shutil.copy(DEMO / "params.json", tmp_path)
    prompt = [1024, *demo_tokenizer.encode("Once upon a time")]
    options = {"max_new_tokens": 50}
    expected = [*llama3.generate(prompt, weights, demo_config, **options)]
    assert len(expected) == 50

    def of_rank(rank):
        part = llama3.map_weights(tmp_path, demo_config, rank, n_ranks)
        part = llama3.place_weights(part, torch.device("cpu"), torch.float32)
        return [*llama3.generate(prompt, part, demo_config, **options)]

    assert Threads(n_ranks, monkeypatch).run(of_rank) == [expected] * n_ranks


def test_ranks_draw_the_same_tokens_without_a_seed(tmp_path, monkeypatch, demo_config):
    sampling = llama3.Sampling(temperature=2.0)

    def of_rank(rank):
        part = llama3.map_weights(DEMO, demo_config, rank, 4)
        part = llama3.place_weights(part, torch.device("cpu"), torch.float32)
        options = {"max_new_tokens": 20, "sampling": sampling}
        return [*llama3.generate([1024], part, demo_config, **options)]

    first, *others = Threads(4, monkeypatch).run(of_rank)
    assert others == [first] * 3


@pytest.mark.parametrize(("heads", "kv_heads", "sizes"), [(6, 3, (2, 3, 6)), (4, 1, (2, 4))])
def test_sizes_that_do_not_divide_and_shared_heads_of_keys(
    tmp_path, monkeypatch, heads, kv_heads, sizes
):
    config = config_of(
        tmp_path,
        dim=36,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=6,
        ffn_dim=37,
        vocab_size=1283,
    )
    weights = random_weights(config, torch.float32)
    split(weights, tmp_path, 1)
    tokens = random_tokens(config, 7)
    expected = llama3.forward(tokens, weights, config)
    for n_ranks in sizes:
        if n_ranks not in checkpoint_files.possible_parts(heads, kv_heads, 37):
            continue

        def of_rank(rank, n_ranks=n_ranks):
            part = llama3.map_weights(tmp_path, config, rank, n_ranks)
            return llama3.forward(tokens, part, config)

        for logits in Threads(n_ranks, monkeypatch).run(of_rank):
            assert apart(logits, expected) < 1e-4


@pytest.mark.parametrize("n_ranks", [1, 2, 4, 8])
def test_the_memory_of_a_rank_is_what_the_loader_takes(tmp_path, n_ranks):
    config = config_of(tmp_path, **SIZES | {"n_kv_heads": 4, "ffn_dim": 203, "vocab_size": 1283})
    weights = random_weights(config, torch.bfloat16)
    split(weights, tmp_path, 1)
    for rank in range(n_ranks):
        part = llama3.map_weights(tmp_path, config, rank, n_ranks)
        part = llama3.place_weights(part, torch.device("cpu"), torch.bfloat16)
        cache = llama3.new_cache(part, config, 100)
        found = sum(weight.nbytes for weight in part.values()), cache.nbytes
        assert command_line.memory_of_rank(config, rank, n_ranks, 2, 100) == found


def test_the_readmes_table_is_what_the_benchmark_computes():
    table = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "ranks.py", "--table"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert table.stdout in (ROOT / "README.md").read_text()


def test_without_memory_to_join_them_the_pieces_are_used(
    tmp_path, monkeypatch, capsys, demo_in_four
):
    argv = ["--ckpt-dir", str(demo_in_four), "--dtype", "float32", "--prompt", "17 plus 8 is"]
    needed = 2.4e6  # of weights
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 2e6)
    placed = []
    place = llama3.place_weights

    def watched(*arguments):
        placed.append(place(*arguments))
        return placed[-1]

    monkeypatch.setattr(llama3, "place_weights", watched)
    assert command_line.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == " 25."
    assert f"memory does not suffice to join the weights, {needed / 1e6:.0f} MB: products" in err
    assert isinstance(placed[0]["output.weight"], list)


def test_tensors_that_are_stored_apart_are_loaded_as_ever(tmp_path):
    config = config_of(tmp_path, **SIZES)
    weights = random_weights(config, torch.float32)
    stored = dict(weights)
    stored["norm.weight"] = torch.stack([weights["norm.weight"]] * 2, dim=1)[:, 0]
    stored["output.weight"] = weights["output.weight"].T.contiguous().T
    torch.save(stored, tmp_path / "consolidated.00.pth")
    loaded = llama3.load_weights(tmp_path, config)
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert not loaded["output.weight"].is_contiguous()  # and it is no copy


def test_what_was_written_to_mapped_weights_is_joined(tmp_path):
    config = config_of(tmp_path, **SIZES)
    split(random_weights(config, torch.float32), tmp_path, 2)
    mapped = llama3.map_weights(tmp_path, config)
    for tensor in mapped.tensors():
        tensor.fill_(7)
    placed = llama3.place_weights(mapped, torch.device("cpu"), torch.float32)
    assert all((weight == 7).all() for weight in placed.values())


def test_a_copy_of_another_file_is_refused(four_files):
    folder, config, _ = four_files
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.02.pth")
    assert "02.pth: it holds the same as consolidated.01.pth; expected the next" in refusal(
        folder, config
    )


def test_files_without_the_first_and_others_beside_them(four_files):
    folder, config, weights = four_files
    (folder / "consolidated.backup.pth").write_bytes(b"what is this")
    (folder / "consolidated.00 (1).pth").write_bytes(b"what is this")
    assert torch.equal(llama3.load_weights(folder, config)["norm.weight"], weights["norm.weight"])
    (folder / "consolidated.00.pth").unlink()
    assert "consolidated.00.pth is missing, but there is consolidated.03.pth" in refusal(
        folder, config
    )


@pytest.fixture
def two_ranks(monkeypatch):
    """The command line believes to be rank 0 of two, on one machine."""
    monkeypatch.setattr(command_line, "n_ranks", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def test_statistics_are_those_of_the_slowest_and_largest(two_ranks, monkeypatch):
    others = [{"load_s": 1.0, "peak": 5}, {"load_s": 2.0, "peak": 3}]
    monkeypatch.setattr(command_line, "tell", lambda message: None)
    monkeypatch.setattr(command_line, "gathered", lambda stats: [stats, *others])
    assert command_line.slowest({"load_s": 1.5, "peak": 4}) == {"load_s": 2.0, "peak": 5}


def test_of_reasons_that_which_names_a_weight_is_told():
    reasons = ["it overflowed", "layers.0 holds NaN", "it overflowed"]
    assert command_line.best_reason(reasons) == "layers.0 holds NaN"
    assert command_line.best_reason(["it overflowed"] * 2) == "it overflowed"


def test_ranks_share_the_memory_of_a_machine(two_ranks, monkeypatch, demo_config):
    part = command_line.part_of_config(demo_config)
    assert (part.n_heads, part.n_kv_heads, part.ffn_dim) == (4, 2, 224)
    monkeypatch.setattr(command_line, "free_bytes", lambda device: 3e7)
    needs = [part, 2 * 10**7, torch.device("cpu"), torch.float32, 5, 5]
    with pytest.raises(command_line.UsageError, match="but 15 MB are free"):
        command_line.check_memory(*needs)
    monkeypatch.setattr(command_line, "n_ranks", lambda: 1)
    command_line.check_memory(*needs)


def test_what_is_joined_or_copied_counts_as_memory(two_ranks, demo_in_four, demo_config):
    device = torch.device("cpu")

    def size(folder, rank, n_ranks):
        mapped = llama3.map_weights(folder, demo_config, rank, n_ranks)
        return command_line.bytes_of_weights(mapped, device, torch.bfloat16)

    columns = 4 * (128 * 128 + 128 * 448) * 2  # of wo and w2, in bfloat16
    assert size(DEMO, 0, 2) == columns // 2
    assert size(demo_in_four, 0, 4) == 0
    whole = sum(
        w.nbytes for name, w in llama3.map_weights(DEMO, demo_config).items() if w.dim() > 1
    )
    assert size(demo_in_four, 0, 1) == whole


@pytest.mark.parametrize("name", ["mps", "cuda:1"])
def test_a_single_device_is_refused_to_several_ranks(two_ranks, name):
    with pytest.raises(command_line.UsageError, match="expected cuda or cpu where several"):
        command_line.choose_device(name)


def test_each_rank_has_a_device_of_its_own(two_ranks, monkeypatch):
    assert command_line.choose_device("cpu").type == "cpu"
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(command_line.choose_device("auto")) == "cuda:1"
    assert chosen == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(command_line.UsageError, match="2 processes here, but 1 CUDA devices"):
        command_line.choose_device("cuda")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "cannot reach each other"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK is 5, expected less than WORLD_SIZE, which is 2"),
    ],
)
def test_ranks_that_do_not_come_are_not_waited_for(monkeypatch, capsys, environment, said):
    monkeypatch.setattr(command_line, "MEETING", datetime.timedelta(seconds=1))
    for name, value in environment.items() | {("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")}:
        monkeypatch.setenv(name, value)
    stderr = sys.stderr
    try:
        assert command_line.main(["--prompt", "the", "--ckpt-dir", str(DEMO)]) == 2
    finally:
        sys.stderr = stderr
    out, err = capsys.readouterr()
    assert out == ""
    assert environment["RANK"] == "5" or said in err


def test_which_numbers_of_ranks_are_possible():
    assert checkpoint_files.possible_parts(32, 8, 100) == [1, 2, 4, 8, 16, 32]
    assert checkpoint_files.possible_parts(6, 3, 100) == [1, 3, 6]
    assert checkpoint_files.possible_parts(8, 8, 7) == [1, 2, 4]
    assert checkpoint_files.possible_parts(9, 3, 100) == [1, 3, 9]


# --- ranks, as processes --------------------------------------------------------------------------

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

# Runs several command lines, one after the other, in ranks that meet once; what rank 0 writes goes
# to a file for each.
SEVERAL = """
import io, json, sys, torch
import command_line

command_line.meet()
rank = command_line.this_rank()
for number, (argv, typed) in enumerate(json.load(open(sys.argv[1]))):
    sys.stdout = sys.stderr = open(f"{sys.argv[1]}.{rank}.{number}", "w")  # main has them muted
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()))
    args = command_line.parse_arguments(argv)
    if rank > 0:
        command_line.follow(args)
    else:
        assert command_line.lead(args) == 0
        command_line.tell(None)
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
    assert command_line.main(argv) == 0
    return "".join(capsys.readouterr())


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_all_that_one_process_does_several_do(tmp_path, monkeypatch, capsys, demo_in_four, n_ranks):
    (tmp_path / "text").write_text("the opposite of hot is cold.\n17 plus 8 is 25.\n")
    hf = tmp_path / "hf"
    convert.to_hf(DEMO, hf)
    model = ["--ckpt-dir", str(demo_in_four), "--dtype", "float32"]
    prompts = ["--prompt", "17 plus 8 is", "--prompt", "Once upon a time"]
    talk = "What is the capital of Japan?\n/reset\nWhat is 17 plus 8?\n"
    plot = ["--plot", str(tmp_path / "ranks.png"), "--plot-layer", "1"]
    runs = [
        [[*model, "--prompt", "Once upon a time", "--max-new-tokens", "50"], ""],
        [[*model, *prompts, "--max-new-tokens", "20"], ""],
        [[*model, "--prompt", "the", "--temperature", "1.5", "--seed", "3"], ""],
        [[*model, "--chat"], talk],
        [[*model, "--chat", "--prompt", "Hello!", "--stats"], ""],
        [[*model, "--score", str(tmp_path / "text"), "--by-line"], ""],
        [[*model, "--prompt", "17 plus 8 is", "--logprobs", "2"], ""],
        [[*model, "--prompt", "the capital of France is", *plot], ""],
        [["--ckpt-dir", str(hf), "--dtype", "float32", "--prompt", "17 plus 8 is"], ""],
    ]
    if n_ranks > 2:  # slow where there are fewer processors
        runs = [runs[3], runs[7]]
    together = on_ranks(tmp_path, n_ranks, runs)
    shares = (tmp_path / "ranks.png").read_bytes()
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
    assert (tmp_path / "ranks.png").read_bytes()[:8] == shares[:8]


def start(n_ranks, *arguments, script=ROOT / "llama3.py", **options):
    command = [*LAUNCH, str(n_ranks), script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes, **options)


def own_lines(stderr):
    """What is on standard error, but for what torchrun has to say."""
    return [line for line in stderr.splitlines() if line.startswith("llama3.py: ")]


def test_an_impossible_number_of_ranks_is_refused_with_the_possible_ones():
    out, err = start(3, "--ckpt-dir", DEMO, "--prompt", "the").communicate(timeout=60)
    problem = "3 processes cannot share 8 heads of queries and 4 of keys; start 1, 2, 4, 8"
    assert own_lines(err) == [f"llama3.py: error: {problem}"]
    assert out == ""


def test_a_rank_that_cannot_load_ends_all_with_one_line(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys, command_line, llama3, checkpoint_files\n"
        "def fail(folder, config, rank, n_ranks):\n"
        "    if rank == 1:\n"
        "        raise checkpoint_files.CheckpointError(folder, 'is not here')\n"
        "    return right(folder, config, rank, n_ranks)\n"
        "right, llama3.map_weights = llama3.map_weights, fail\n"
        "sys.exit(command_line.main())\n"
    )
    begin = time.monotonic()
    process = start(2, "--ckpt-dir", DEMO, "--prompt", "the", script=script)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert own_lines(err) == [f"llama3.py: error: rank 1: {DEMO}: is not here"]
    assert out == ""
    assert time.monotonic() - begin < 40


# Raises an error at the n-th norm on one rank only, in the middle of a computation.
BROKEN = """
import sys, command_line, llama3

rank, nth, error = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
right, calls = llama3.rms_norm, []

def rms_norm(*arguments):
    calls.append(1)
    if len(calls) == nth and command_line.this_rank() == rank:
        raise {"memory": MemoryError(), "bug": ValueError("a bug")}[error]
    return right(*arguments)

llama3.rms_norm = rms_norm
sys.exit(command_line.main(sys.argv[4:]))
"""


@pytest.mark.parametrize(
    ("rank", "nth", "error", "argv", "typed", "said"),
    [
        (0, 60, "memory", ["--prompt", "Once upon a time"], "", "error: rank 0: memory ran out"),
        (1, 60, "memory", ["--prompt", "Once upon a time"], "", "error: rank 1: memory ran out"),
        (0, 60, "bug", ["--chat"], "Hello!\nHello!\n", "ValueError: a bug"),
        (0, 2, "memory", ["--score", str(ROOT / "LICENSE")], "", "error: rank 0: memory ran out"),
    ],
)
def test_an_error_of_one_rank_in_a_computation_ends_all(
    tmp_path, rank, nth, error, argv, typed, said
):
    (tmp_path / "broken.py").write_text(BROKEN)
    argv = [rank, nth, error, "--ckpt-dir", DEMO, *argv]
    process = start(2, *argv, script=tmp_path / "broken.py", stdin=subprocess.PIPE)
    _, err = process.communicate(typed, timeout=40)
    assert process.returncode != 0
    assert said in err
    assert sum(line.startswith("llama3.py: error") for line in err.splitlines()) <= 1


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="it looks into /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_all_end_and_what_was_written_stays(victim):
    prompt = ["--prompt", "Once upon a time", "--max-new-tokens", "8000", "--temperature", "1.5"]
    process = start(2, "--ckpt-dir", DEMO, *prompt)
    written = process.stdout.read(20)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[victim], signal.SIGKILL)
    begin = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert process.returncode != 0
    assert len(written) == 20
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
