"""The model on the device that --device names: python -m pytest --device cuda

On a GPU, products of float32 are not rounded to TensorFloat-32, neither here nor in the program.
Limits: float32 within 2e-5 of double precision, of the largest logit; bfloat16 and float16 within a
few roundings of 0.4% and 0.05%. On the device "meta" only shapes are looked at.
"""

import gc

import pytest
import torch
from conftest import DEMO, apart, config_of, random_blocks, random_tokens, random_weights
from other_formats import YARN
from references import numpy_float64
from torch.utils._python_dispatch import TorchDispatchMode

import cli.main
import formats
import llama3
import tokenizer_setup
from cli.capture import CapturedSession
from formats.blocks import DEQUANTIZE, SIZES, Blocks

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1280}
PARAMS |= {"multiple_of": 32, "norm_eps": 1e-05, "rope_theta": 500000.0}


@pytest.fixture(autouse=True)
def whole_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def numbers(device):
    if device.type == "meta":
        pytest.skip("the device meta has no numbers")


def on(device, weights):
    return {name: weight.to(device) for name, weight in weights.items()}


def made(tmp_path, device, dtype=torch.float32, **params):
    config = config_of(tmp_path, **params)
    return on(device, random_weights(config, dtype)), config


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_logits_are_those_of_double_precision(tmp_path, device, numbers, dtype, scaled):
    weights, config = made(tmp_path, device, dtype, use_scaled_rope=scaled)
    tokens = random_tokens(config, 40)
    stored = {name: w.cpu() for name, w in weights.items()}
    expected = numpy_float64(tokens, stored, PARAMS | {"use_scaled_rope": scaled})
    found = llama3.forward(tokens.to(device), weights, config)
    assert found.device.type == device.type
    assert apart(found.cpu().double(), torch.as_tensor(expected)) < LIMITS[dtype]


def test_shapes_are_those_that_are_promised(tmp_path, device):
    weights, config = made(tmp_path, device)
    tokens = random_tokens(config, 3, 7).to(device)
    assert llama3.forward(tokens, weights, config).shape == (3, 7, config.vocab_size)
    cache = llama3.new_cache(weights, config, length=9, batch=[3])
    where = {"positions": torch.arange(7, device=device), "cache": cache}
    logits = llama3.forward(tokens, weights, config, last_only=True, **where)
    assert logits.shape == (3, 1, config.vocab_size)
    assert (logits.device.type, logits.dtype) == (device.type, torch.float32)


def test_a_cache_and_a_padded_batch_change_nothing(tmp_path, device, numbers):
    weights, config = made(tmp_path, device)
    tokens = random_tokens(config, 12).to(device)
    whole = llama3.forward(tokens, weights, config)
    session, rows = llama3.Session(weights, config), []
    for part in tokens.split([5, 1, 1, 4, 1]):
        rows.append(session.read(part[None])[0])
    assert apart(torch.cat(rows).cpu(), whole.cpu()) < 2e-5
    padded = torch.cat([tokens.new_zeros(3), tokens])
    both = torch.stack([padded, torch.cat([tokens, tokens[:3]])])
    starts = torch.tensor([3, 0], device=device)
    batch = llama3.forward(both, weights, config, starts=starts)
    assert apart(batch[0, 3:].cpu(), whole.cpu()) < 2e-5


def test_it_learns_there(tmp_path, device, numbers):
    weights, config = made(tmp_path, device)
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    tokens = random_tokens(config, 20).to(device)
    logits = llama3.forward(tokens, weights, config)
    torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    assert all(w.grad.isfinite().all() and w.grad.any() for w in weights.values())


def test_samples_are_drawn_from_what_top_p_keeps(device, numbers):
    p = torch.tensor([0.05, 0.3, 0.4, 0.25], device=device)
    assert llama3.nucleus(p, 0.6).cpu().gt(0).tolist() == [False, True, True, False]
    generator = torch.Generator(device).manual_seed(0)
    drawn = {llama3.sample(p.log(), 1.0, 0.6, generator).item() for _ in range(50)}
    assert drawn == {1, 2}


@pytest.mark.parametrize("kind", DEQUANTIZE)
def test_blocks_stand_for_the_same_numbers_to_the_bit(device, numbers, kind):
    pytest.importorskip("gguf")
    raw, dense = random_blocks(kind, 24, 2 * SIZES[kind])
    blocks = Blocks(raw.to(device), kind)
    assert torch.equal(blocks.to(torch.float32).cpu(), dense)
    x = torch.randn(5, dense.shape[1], generator=torch.Generator().manual_seed(0))
    found = blocks(x.to(device)).cpu().double()
    assert apart(found, x.double() @ dense.double().T) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_answers_there(device, numbers, dtype):
    source = formats.open(DEMO)
    weights = source.load_weights(device, llama3.DTYPES[dtype])
    assert weights["norm.weight"].device.type == device.type
    tokenizer = source.tokenizer()
    prompt = "the answer to the ultimate question of life, the universe, and everything is"
    ids = tokenizer_setup.encode(tokenizer, prompt)
    stop = tokenizer_setup.stop_tokens(tokenizer)
    new = llama3.generate(ids, weights, source.config, max_new_tokens=5, stop_tokens=stop)
    assert "".join(tokenizer_setup.decode_stream(tokenizer, new)).strip() == "42"


@pytest.mark.parametrize(
    "options",
    [
        ["--no-compile"],
        ["--max-new-tokens", "300"],
        ["--dtype", "float32", "--quantize", "Q8_0"],
        ["--temperature", "0.8", "--seed", "1", "--top-k", "40", "--min-p", "0.05"],
    ],
    ids=" ".join,
)
def test_the_command_writes_what_it_writes_on_the_processor(device, numbers, capsys, options):
    command = ["--prompt", "Once upon a time", "--ckpt-dir", str(DEMO), "--max-new-tokens", "40"]
    command += ["--dtype", "float32", *options]
    texts = []
    for name in (str(device), "cpu"):
        assert cli.main.main([*command, "--device", name]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert "cannot be captured" not in err
    assert texts[0].strip()
    if "--temperature" not in options:  # where each device draws its own numbers
        assert texts[0] == texts[1]


def test_recorded_steps_say_what_plain_ones_say_while_the_cache_moves(tmp_path, device, numbers):
    if device.type != "cuda":
        pytest.skip("steps are recorded on CUDA devices alone")
    weights, config = made(tmp_path, device)
    prompt = random_tokens(config, 100).tolist()
    texts, sessions = [], []
    for kind in (llama3.Session, CapturedSession, CapturedSession):
        session = kind(weights, config)
        steps = llama3.generate(prompt, weights, config, max_new_tokens=600, session=session)
        texts.append([*steps])
        sessions.append(session)
    assert texts[0] == texts[1] == texts[2]
    assert all(session.captures for session in sessions[1:])
    del sessions[1], session
    gc.collect()
    torch.cuda.empty_cache()
    again = llama3.generate(prompt, weights, config, max_new_tokens=600, session=sessions[1])
    assert [*again] == texts[0]


class Types(TorchDispatchMode):
    """The types of all tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.seen |= {x.dtype for x in results if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "scaled", "yarn"])
def test_nothing_is_computed_in_double_precision_which_mps_has_not(tmp_path, device, dtype, kind):
    weights, config = made(tmp_path, device, dtype, use_scaled_rope=kind == "scaled")
    if kind == "yarn":
        divisors = tuple(1.0 + i for i in range(config.head_dim // 2))
        config = config._replace(rope_divisors=divisors, rope_attention_factor=YARN["factor"])
    session = llama3.Session(weights, config)
    with Types() as types:
        session.read(torch.zeros(1, 5, dtype=torch.int64, device=device))
        logits = session.read(torch.zeros(1, 1, dtype=torch.int64, device=device))
        if device.type != "meta":
            llama3.sample(logits[:, -1], 0.7, 0.9)
    assert torch.complex64 in types.seen  # RoPE, which MPS has from PyTorch 2.2 on
    assert not types.seen & {torch.float64, torch.complex128}
