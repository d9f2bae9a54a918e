"""Steps recorded on a GPU, and tensors on their way there, as far as they can be tried without."""

import pytest
import torch
from conftest import config_of, random_weights
from program import SUM, run_main

import cli.model
import llama3
from cli import capture
from formats import placing

CPU = torch.device("cpu")


class Recorder:
    """In the place of `record`: replays by calling again, into the same tensor, as a graph does."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, function, pool=None):
        self.recorded += 1
        result = function().clone()

        def again():
            self.replayed += 1
            return result.copy_(function())

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
    def fails(function, pool=None):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "record", fails)
    session = capture.CapturedSession(*model)
    assert new_tokens(model, session, [1, 2, 3], 6) == new_tokens(model, None, [1, 2, 3], 6)
    err = capsys.readouterr().err
    assert err.count("a step cannot be captured, which is slower: CUDA error") == 1


def test_a_recorded_step_that_says_something_else_is_not_used(monkeypatch, model, capsys):
    monkeypatch.setattr(capture, "record", lambda function, pool: lambda: function() + 1)
    session = capture.CapturedSession(*model)
    assert new_tokens(model, session, [1, 2, 3], 6) == new_tokens(model, None, [1, 2, 3], 6)
    assert "its logits differ by 1" in capsys.readouterr().err


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


class Done:
    """In the place of an event: that a buffer is only filled again after its copy is through."""

    def __init__(self):
        self.pending = False

    def synchronize(self):
        self.pending = False

    def record(self):
        assert not self.pending
        self.pending = True


@pytest.mark.parametrize("n", [0, 1, 16, 17, 100])
def test_bytes_are_copied_in_pieces_through_two_buffers(monkeypatch, n):
    monkeypatch.setattr(placing, "CHUNK", 16)
    source = torch.arange(n, dtype=torch.uint8)
    target = torch.full_like(source, 255)
    buffers = [(torch.empty(16, dtype=torch.uint8), Done()) for _ in range(2)]
    placing.copy_through(source, target, buffers)
    assert torch.equal(source, target)


def test_other_devices_get_tensors_as_before():
    w = torch.randn(3, 4)
    assert placing.to_device(w, CPU) is w
    assert placing.to_device(w, torch.device("meta")).shape == (3, 4)
