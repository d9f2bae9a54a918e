"""Steps recorded on a GPU, and tensors on their way there, as far as they can be tried without."""

import itertools

import pytest
import torch
from conftest import config_of, random_weights, with_biases
from program import SUM, run_main
from torch.utils._python_dispatch import TorchDispatchMode

import cli.model
import llama3
from cli import capture
from formats import placing
from formats.blocks import BYTES, DEQUANTIZE, SIZES, Blocks

CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """The operations of a function, with their inputs, to do them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.operations.append((function, arguments, options or {}, result))
        return result

    def play(self):
        for function, arguments, options, result in self.operations:
            new = function(*arguments, **options)
            if isinstance(new, torch.Tensor) and new.data_ptr() != result.data_ptr():
                result.copy_(new)


class Recorder:
    """In the place of `record`: replays operations, not Python, as a graph does."""

    def __init__(self):
        self.recorded, self.replayed, self.pools = 0, 0, []

    def __call__(self, function, stream, pool):
        self.recorded += 1
        self.pools.append(pool)
        function()
        with Tape() as tape:
            result = function()

        def again():
            self.replayed += 1
            tape.play()
            return result

        return again


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(capture, "record", recorder)
    return recorder


@pytest.fixture
def model(tmp_path):
    config = config_of(tmp_path)
    return random_weights(config), config


def new_tokens(model, session, prompt, n):
    weights, config = model
    return [*llama3.generate(prompt, weights, config, max_new_tokens=n, session=session)]


def test_it_generates_what_is_generated_without_over_several_lengths_of_the_cache(recorder, model):
    prompt, n = [*range(230)], 60
    session = capture.CapturedSession(*model)
    assert new_tokens(model, session, prompt, n) == new_tokens(model, None, prompt, n)
    assert recorder.recorded == 2  # up to 256 positions, and up to 512
    assert recorder.replayed == n - 1 + 2  # each is tried once before it is used
    assert session.cache.shape[-2] % capture.LENGTHS == 0


def test_logits_of_an_earlier_step_are_not_overwritten(recorder, model):
    session = capture.CapturedSession(*model)
    session.reserve(8)
    first = session.read(torch.tensor([[5]]))
    kept = first.clone()
    session.read(torch.tensor([[6]]))
    assert torch.equal(first, kept)


def test_after_going_back_it_reads_what_is_new(recorder, model):
    session = capture.CapturedSession(*model)
    new_tokens(model, session, [1, 2, 3, 4], 5)
    again = new_tokens(model, session, [1, 2, 9, 9], 5)
    assert again == new_tokens(model, None, [1, 2, 9, 9], 5)


def test_a_cache_that_moved_is_recorded_again(recorder, model):
    session = capture.CapturedSession(*model)
    session.reserve(10)
    session.read(torch.tensor([[1]]))
    session.reserve(300)
    session.read(torch.tensor([[2]]))
    assert recorder.recorded == 2
    weights, config = model
    expected = llama3.forward(torch.tensor([1, 2, 3]), weights, config)[-1]
    assert torch.allclose(session.read(torch.tensor([[3]]))[0, -1], expected, atol=1e-4)


def test_where_recording_fails_it_says_so_once_and_goes_on(monkeypatch, model, capsys):
    def fails(function, stream, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "record", fails)
    session = capture.CapturedSession(*model)
    assert new_tokens(model, session, [1, 2, 3], 6) == new_tokens(model, None, [1, 2, 3], 6)
    err = capsys.readouterr().err
    assert err.count("a step cannot be captured, which is slower: CUDA error") == 1


def test_a_recorded_step_that_says_something_else_is_not_used(monkeypatch, model, capsys):
    monkeypatch.setattr(capture, "record", lambda function, *_: lambda: function() + 1)
    session = capture.CapturedSession(*model)
    assert new_tokens(model, session, [1, 2, 3], 6) == new_tokens(model, None, [1, 2, 3], 6)
    assert "its logits differ by 1" in capsys.readouterr().err


def test_a_step_that_knows_its_position_when_it_is_recorded_is_not_used(
    monkeypatch, recorder, model, capsys
):
    forward = llama3.forward

    def baked(tokens, weights, config, *, positions, **options):
        known = torch.tensor(positions.tolist()) if tokens.shape == (1, 1) else positions
        return forward(tokens, weights, config, positions=known, **options)

    monkeypatch.setattr(llama3, "forward", baked)
    session = capture.CapturedSession(*model)
    assert new_tokens(model, session, [1, 2, 3], 6) == new_tokens(model, None, [1, 2, 3], 6)
    assert "its logits differ" in capsys.readouterr().err


def test_a_padded_batch_of_one_is_read_as_it_is(recorder, model):
    session = capture.CapturedSession(*model)
    session.reserve(8)
    session.read(torch.tensor([[3]]), starts=torch.tensor([0]))
    assert recorder.recorded == 0


class OneDevice(TorchDispatchMode):
    """Refuses what a graph cannot hold: other devices, and looks at numbers."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.__name__.split(".")[0] not in ("_local_scalar_dense", "nonzero", "item")
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", function
        return result


@pytest.mark.parametrize("kind", ["plain", "scaled", "biases", "norms of heads", *DEQUANTIZE])
def test_a_step_stays_on_its_device(tmp_path, kind):
    config = config_of(tmp_path, dim=256, use_scaled_rope=kind == "scaled")
    weights = random_weights(config)
    weights = with_biases(weights) if kind == "biases" else weights
    if kind == "norms of heads":
        for name in ("q_norm", "k_norm"):
            weights |= {
                f"layers.{i}.attention.{name}.weight": torch.ones(config.head_dim)
                for i in range(config.n_layers)
            }
    weights = {name: w.to("meta") for name, w in weights.items()}
    if kind in DEQUANTIZE:
        for name, w in weights.items():
            if w.dim() == 2 and "embed" not in name and w.shape[1] % SIZES[kind] == 0:
                row = w.shape[1] // SIZES[kind] * BYTES[kind]
                raw = torch.empty(len(w), row, dtype=torch.uint8, device="meta")
                weights[name] = Blocks(raw, kind)
    cache = llama3.new_cache(weights, config, length=256, batch=[1])
    token, position = (torch.zeros(n, dtype=torch.int64, device="meta") for n in ((1, 1), (1,)))
    with OneDevice():
        logits = llama3.forward(token, weights, config, positions=position, cache=cache)
    assert logits.shape == (1, 1, config.vocab_size)


def test_the_command_uses_it_on_a_gpu_and_not_with_no_compile(monkeypatch, recorder, capsys):
    monkeypatch.setattr(cli.model.Model, "session", session_as_on_a_gpu)
    assert run_main(capsys, *SUM)[0] == "25."
    assert recorder.recorded == 1
    assert run_main(capsys, *SUM, "--no-compile")[0] == "25."
    assert recorder.recorded == 1


right_session = cli.model.Model.session


def session_as_on_a_gpu(model, weights):
    return right_session(model._replace(device=torch.device("cuda")), weights)


# --- loading --------------------------------------------------------------------------------------


class Lazy:
    """Buffers and events of a device that copies only when somebody waits for it."""

    def __init__(self, monkeypatch):
        self.waiting = []
        copy = lambda target, *source, **options: self.copy(target, *source, **options)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        buffers = [torch.empty(16, dtype=torch.uint8) for _ in range(2)]
        self.buffers = itertools.cycle([(buffer, LazyEvent(self)) for buffer in buffers])

    def copy(self, target, source, non_blocking=False):
        if non_blocking:
            self.waiting.append((target, source))
        else:
            target[...] = source
        return target

    def finish(self, copies):
        for target, source in copies:
            target[...] = source


class LazyEvent:
    def __init__(self, device):
        self.device, self.copies = device, []

    def record(self):
        self.copies, self.device.waiting = self.device.waiting, []

    def synchronize(self):
        self.device.finish(self.copies)
        self.copies = []


@pytest.mark.parametrize("sizes", [[0], [1], [16, 17], [100, 5, 40]])
def test_bytes_are_copied_in_pieces_through_two_buffers_in_turns(monkeypatch, sizes):
    monkeypatch.setattr(placing, "CHUNK", 16)
    sources = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in sizes]
    targets = [torch.full_like(source, 255) for source in sources]
    with monkeypatch.context() as patch:
        device = Lazy(patch)
        for source, target in zip(sources, targets, strict=True):
            placing.copy_through(source, target, device.buffers)
        for _ in range(2):
            next(device.buffers)[1].synchronize()
    assert all(map(torch.equal, sources, targets))


def test_other_devices_get_tensors_as_before():
    w = torch.randn(3, 4)
    assert placing.to_device(w, CPU) is w
    assert placing.to_device(w, torch.device("meta")).shape == (3, 4)
