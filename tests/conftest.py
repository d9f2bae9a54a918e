"""What several test files need: the demo, Meta's tokenizer, and small random models."""

import contextlib
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

import llama3
from cli import build
from cli.messages import peak_rss_bytes
from tokenizer_setup import load_tokenizer

# How many cases a property-based test tries that says nothing else: those of test_fuzz.py.
with contextlib.suppress(ImportError):  # the others do without
    from hypothesis import settings

    settings.register_profile("short", max_examples=100, derandomize=True, deadline=None)
    settings.register_profile("long", max_examples=10_000, deadline=None)
    settings.load_profile("short")

# The models of the tests are tiny: two threads would spend most of their time waiting.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_addoption(parser):
    text = "where test_device.py computes: cpu, cuda, mps, or meta for shapes alone"
    parser.addoption("--device", default="cpu", help=text)


def pytest_configure(config):
    name = config.getoption("--device")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(f"--device {name}: not on this machine: {reason}") from None


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"

PARAMS_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
SMALL = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 1280,
    "multiple_of": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


def config_of(tmp_path: Path, **params) -> llama3.Config:
    """The Config that load_config reads from a params.json of SMALL with changes."""
    (tmp_path / "params.json").write_text(json.dumps(SMALL | params))
    return llama3.load_config(tmp_path)


def random_weights(config: llama3.Config, dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
    """Weights as wide as in a trained model, so that logits and attention are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in llama3.weight_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = noise if "embed" in name else noise * shape[-1] ** -0.5
    return {name: weight.to(dtype) for name, weight in weights.items()}


def random_blocks(kind, outputs, inputs, seed=0):
    """A matrix of random blocks, uint8 [outputs, bytes], and its numbers by the gguf package.

    All bytes are random but the float16 scales, which are about 0.01.
    """
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (outputs, inputs // block, size), generator=generator).byte()
    pair = kind.endswith("_1") or kind in ("Q4_K", "Q5_K")
    begin, end = (208, 210) if kind == "Q6_K" else (0, 4 if pair else 2)
    scales = 0.01 * torch.randn(*raw.shape[:2], (end - begin) // 2, generator=generator)
    raw[..., begin:end] = scales.half().view(torch.uint8)
    dense = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    return raw.flatten(1), torch.from_numpy(dense).flatten(1)


def split(weights, folder, parts):
    """Write weights as Meta does for so many ranks: fairscale's rule, written down again.

    A ColumnParallelLinear and the VocabParallelEmbedding have a part of the rows, a
    RowParallelLinear (wo and w2) of the columns. Some files have the entry "rope.freqs".
    """
    for part in range(parts):
        file = {"rope.freqs": torch.ones(4)} if part % 2 == 0 else {}
        for name, weight in weights.items():
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            whole = "norm" in name or name.endswith(("wo.bias", "w2.bias"))
            file[name] = weight.clone() if whole else weight.chunk(parts, dim)[part].clone()
        torch.save(file, folder / f"consolidated.{part:02}.pth")


def with_biases(weights):
    """The same with a bias beside each matrix of a layer."""
    generator = torch.Generator().manual_seed(1)
    biases = {
        name.replace("weight", "bias"): (0.1 * torch.randn(len(w), generator=generator)).to(w.dtype)
        for name, w in weights.items()
        if name.startswith("layers.") and w.dim() == 2
    }
    return weights | biases


def random_tokens(config: llama3.Config, *shape: int, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference, relative to the greatest value."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return ((a - b).abs().max() / b.abs().max()).item()


def compressed(path):
    """Write a zip archive anew, compressed."""
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def peak_of(function):
    """The bytes that became resident at most while `function` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_rss_bytes()
    function()
    return peak_rss_bytes() - before


@pytest.fixture(autouse=True, scope="session")
def a_cache_of_their_own(tmp_path_factory):
    """Tests neither use what their user has built nor leave anything there."""
    with pytest.MonkeyPatch.context() as patch:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        if "MPLCONFIGDIR" not in os.environ:  # matplotlib's list of fonts takes long to make
            patch.setenv("MPLCONFIGDIR", str(Path(cache, "matplotlib")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_checkpoint_from_the_environment(monkeypatch):
    """Without --ckpt-dir the tests mean the demo, whatever model their user has at hand."""
    monkeypatch.delenv("LLAMA3_CKPT_DIR", raising=False)


@pytest.fixture(autouse=True)
def on_the_processor(request, monkeypatch):
    """All tests but those of test_device.py, whatever the machine has."""
    if request.module.__name__ != "test_device":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that are started
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def tried(monkeypatch):
    """The parts that are built, in the place of which their functions run as they are."""
    parts = []

    def build_nothing(part):
        parts.append(part)
        return build.check(part, lambda inputs: [part.function(*inputs)])

    monkeypatch.setattr(build, "build", build_nothing)
    return parts


@pytest.fixture(scope="session")
def demo_config() -> llama3.Config:
    return llama3.load_config(DEMO)


@pytest.fixture(scope="session")
def demo_weights(demo_config) -> dict[str, torch.Tensor]:
    return llama3.load_weights(DEMO, demo_config, dtype=torch.bfloat16)  # as they are stored


@pytest.fixture(scope="session")
def demo_tokenizer():
    return load_tokenizer(DEMO / "tokenizer.model")


@pytest.fixture(scope="session")
def meta_tokenizer():
    path = ROOT.parent / "shared" / "llama3" / "tokenizer.model"
    if not path.exists():
        pytest.skip("Meta's tokenizer.model is not at ../shared/llama3/tokenizer.model")
    return load_tokenizer(path)
