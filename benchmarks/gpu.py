"""What a GPU does: is it right, how fast, with how much memory. One command, some five minutes.

    python benchmarks/gpu.py --out gpu.json

Makes random models on the card itself, and measures each step by itself, so that one that fails is
one line of the table. Prints the table for docs/speed.md and writes its numbers to a file. With
--device cpu --sizes tiny it only shows that the script runs.
"""

import argparse
import inspect
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run  # noqa: E402
import torch  # noqa: E402
from run import finished, prompt_of, random_weights, sizes_in_transformers  # noqa: E402
from torch import Tensor  # noqa: E402

import formats  # noqa: E402
import llama3  # noqa: E402
import tokenizer_setup  # noqa: E402
from cli.capture import CapturedSession  # noqa: E402
from formats.blocks import Blocks, to_blocks  # noqa: E402
from formats.placing import to_device  # noqa: E402

SIZES = {size: params for size, (params, _) in run.SIZES.items()} | {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512}
    | {"multiple_of": 32, **run.ROPE},
}
PREFILLS, CONTEXTS, TURNS, STEPS = (128, 1024, 8192), (128, 1024), 5, 32


def is_plain(value: Any) -> bool:
    """Whether a row is a number, a text, or some numbers by name."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(v, float | int | str) for v in values)


def recorded(session: llama3.Session) -> None:
    """Raise RuntimeError if a session was to record its steps and could not."""
    if getattr(session, "captures", True) is False:
        raise RuntimeError("no step could be recorded")


class Bench:
    """A device, what was measured on it, and what failed."""

    def __init__(self, device: torch.device, minutes: float, out: Path | None = None) -> None:
        self.device, self.rows, self.failed, self.out = device, {}, {}, out
        self.until = time.monotonic() + 60 * minutes

    def seconds(self, function: Callable[[], Any], turns: int = TURNS) -> float:
        """The median of some turns, after one that does not count."""
        times = []
        for _ in range(1 + turns):
            finished(self.device)
            start = time.perf_counter()
            function()
            finished(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """A row of the table: what a function returns, or why it could not."""
        if time.monotonic() > self.until:
            self.failed[name] = "no time was left"
            return None
        try:
            found = self.rows[name] = function()
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            traceback.print_exc()
            found = None
        shown = found if is_plain(found) else "done"
        print(f"{name}: {self.failed.get(name) or shown}", flush=True)
        with suppress(RuntimeError):  # after a recording that failed
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.save()
        return found

    def save(self) -> None:
        """Write what there is so far."""
        if self.out:
            rows = {name: value for name, value in self.rows.items() if is_plain(value)}
            self.out.write_text(json.dumps({"rows": rows, "failed": self.failed}, indent=1))

    def bandwidth(self) -> float:
        """GB/s that a copy within the device reads and writes, together."""
        n = 2**30 if self.device.type == "cuda" else 2**24
        a, b = (torch.empty(n, dtype=torch.float32, device=self.device) for _ in range(2))
        return 8 * n / self.seconds(lambda: b.copy_(a), 50) / 1e9


def size_of(weights: dict[str, Any]) -> int:
    """The bytes that a token reads: all but the embeddings."""
    held = (w.raw if isinstance(w, Blocks) else w for n, w in weights.items() if "embed" not in n)
    return sum(w.numel() * w.itemsize for w in held)


# --- is it right ----------------------------------------------------------------------------------


def differences(device: torch.device) -> dict[str, float]:
    """How far logits of the demo are from those of float64 on the processor, of the largest."""
    config, found = llama3.load_config(ROOT / "demo"), {}
    stored = llama3.load_weights(ROOT / "demo", config, dtype=torch.float32)
    tokens = torch.tensor(prompt_of(200, config.vocab_size))
    exact = {name: w.double() for name, w in stored.items()}
    expected = llama3.forward(tokens, exact, config).double()
    for dtype in (torch.float32, torch.bfloat16):
        weights = {name: w.to(device, dtype) for name, w in stored.items()}
        logits = llama3.forward(tokens.to(device), weights, config).double().cpu()
        name = str(dtype).removeprefix("torch.")
        found[name] = ((logits - expected).abs().max() / expected.abs().max()).item()
    return found


def answer(device: torch.device) -> str:
    """What the demo says, token by token, with recorded steps where there are any."""
    source = formats.open(ROOT / "demo")
    weights, tokenizer = source.load_weights(device), source.tokenizer()
    text = "the answer to the ultimate question of life, the universe, and everything is"
    prompt, stop = tokenizer_setup.encode(tokenizer, text), tokenizer_setup.stop_tokens(tokenizer)
    kind = CapturedSession if device.type == "cuda" else llama3.Session
    session = kind(weights, source.config)
    options = {"max_new_tokens": 8, "stop_tokens": stop, "session": session}
    new = [*llama3.generate(prompt, weights, source.config, **options)]
    recorded(session)
    return "".join(tokenizer_setup.decode_stream(tokenizer, new))


def same_tokens(weights: dict[str, Any], config: llama3.Config) -> int:
    """How many of 64 greedy tokens are the same with recorded steps and without."""
    texts = []
    for kind in (llama3.Session, CapturedSession):
        session = kind(weights, config)
        prompt = prompt_of(100, config.vocab_size)
        steps = llama3.generate(prompt, weights, config, max_new_tokens=64, session=session)
        texts.append([*steps])
        recorded(session)
    return sum(a == b for a, b in zip(*texts, strict=True))


# --- how fast -------------------------------------------------------------------------------------


def prefill(bench: Bench, weights: dict[str, Any], config: llama3.Config, n: int) -> float:
    """Seconds for a prompt of n tokens, up to its first new token."""
    prompt = prompt_of(n, config.vocab_size)
    config = config._replace(max_seq_len=n + 8)
    return bench.seconds(
        lambda: next(llama3.generate(prompt, weights, config, max_new_tokens=1)), 3
    )


def decode(
    bench: Bench, weights: dict[str, Any], config: llama3.Config, length: int, kind: type
) -> float:
    """Seconds for a token after so many, each chosen from the one before."""
    session = kind(weights, config)
    session.reserve(length + STEPS + 8)
    token = torch.tensor([[7]], device=bench.device)

    def steps() -> None:
        session.tokens = torch.zeros(1, length, dtype=torch.int64, device=bench.device)
        chosen = token
        for _ in range(STEPS):
            chosen = session.read(chosen)[:, -1].argmax(-1, keepdim=True)
            chosen.item()  # as a program that prints it

    found = bench.seconds(steps, 3) / STEPS
    recorded(session)
    return found


def generate(bench: Bench, weights: dict[str, Any], config: llama3.Config, kind: type) -> float:
    """Seconds for a token as the command makes it: 64 after a prompt of 128, by llama3.generate."""
    session, prompt = kind(weights, config), prompt_of(128, config.vocab_size)

    def text() -> None:
        steps = llama3.generate(prompt, weights, config, max_new_tokens=65, session=session)
        next(steps)
        finished(bench.device)
        start = time.perf_counter()
        list(steps)
        times.append(time.perf_counter() - start)

    times: list[float] = []
    bench.seconds(text, 2)
    recorded(session)
    return statistics.median(times[1:]) / 64


def transformers_model(config: llama3.Config, device: torch.device, attention: str) -> Any:
    """transformers' Llama of the same sizes, with weights of its own, in bfloat16."""
    import transformers

    sizes = transformers.LlamaConfig(
        **sizes_in_transformers(config),
        max_position_embeddings=config.max_seq_len,
        attn_implementation=attention,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return transformers.LlamaForCausalLM(sizes).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def transformers_prefill(bench: Bench, model: Any, config: llama3.Config, n: int) -> float:
    tokens = torch.tensor([prompt_of(n, config.vocab_size)], device=bench.device)
    return bench.seconds(lambda: model(tokens, logits_to_keep=1).logits.argmax(-1).item(), 3)


@torch.inference_mode()
def transformers_decode(bench: Bench, model: Any, config: llama3.Config, length: int) -> float:
    tokens = torch.tensor([prompt_of(length, config.vocab_size)], device=bench.device)
    named = inspect.signature(model.forward).parameters
    key = "cache" if "cache" in named else "past_key_values"

    def steps() -> None:
        cache = getattr(model(tokens, use_cache=True, logits_to_keep=1), key)
        finished(bench.device)
        start, chosen = time.perf_counter(), tokens[:, -1:]
        for _ in range(STEPS):
            out = model(chosen, use_cache=True, **{key: cache})
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
            chosen.item()
        times.append(time.perf_counter() - start)

    times: list[float] = []
    bench.seconds(steps, 3)
    return statistics.median(times[1:]) / STEPS


# --- memory and loading ---------------------------------------------------------------------------


def peak_gb(bench: Bench, weights: dict[str, Any], config: llama3.Config) -> dict[str, float]:
    """GB at most for weights, a prompt of 1,024 tokens and 32 more: in tensors, and on the card."""
    torch.cuda.reset_peak_memory_stats(bench.device)
    session = CapturedSession(weights, config)
    prompt = prompt_of(1024, config.vocab_size)
    [*llama3.generate(prompt, weights, config, max_new_tokens=32, session=session)]
    recorded(session)
    free, total = torch.cuda.mem_get_info(bench.device)
    tensors = torch.cuda.max_memory_allocated(bench.device)
    return {"tensors": tensors / 1e9, "card": (total - free) / 1e9}


def loading(bench: Bench, weights: dict[str, Tensor]) -> dict[str, float]:
    """GB/s from a file in the page cache to the device: through pinned memory, and without."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save({name: w.cpu() for name, w in weights.items()}, path)
        size, found = sum(w.numel() * w.itemsize for w in weights.values()), {}

        def load(move: Callable[[Tensor, torch.device], Tensor]) -> None:
            stored = torch.load(path, mmap=True, weights_only=True)  # each time with new pages
            for w in stored.values():
                move(w, bench.device)

        for name, move in [("pinned", to_device), ("plain", torch.Tensor.to)]:
            found[name] = size / bench.seconds(lambda move=move: load(move), 2) / 1e9
    return found


# --- quantized weights ----------------------------------------------------------------------------


def quantized(weights: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """The same, matrices as blocks on their device; the embeddings as they are."""
    made: dict[str, Any] = dict(weights)
    for name, w in weights.items():
        if w.dim() == 2 and "embed" not in name:
            made[name] = Blocks(to_blocks(w.cpu(), kind).to(w.device), kind)
    return made


def packed_products(bench: Bench) -> dict[str, float]:
    """GB/s of weights in PyTorch's own products of one vector, of bfloat16 and of packed integers.

    Of several matrices in turns, so that none stays in the card's cache, and many launches between
    two looks at the clock.
    """
    rows, inputs, n, device = 14336, 4096, 12, bench.device
    x = torch.randn(1, inputs, dtype=torch.bfloat16, device=device)
    found: dict[str, float] = {}

    def rate(
        name: str, size: float, make: Callable[[], Any], product: Callable[[Any], Any]
    ) -> None:
        try:
            many = [make() for _ in range(n)]
            turns = lambda: [product(w) for _ in range(8) for w in many]  # noqa: E731
            found[name] = 8 * n * size / bench.seconds(turns) / 1e9
        except Exception as error:
            print(f"products of {name}: {error}".splitlines()[0])

    half = lambda *shape: torch.ones(shape, dtype=torch.bfloat16, device=device)  # noqa: E731
    rate("bfloat16", 2 * rows * inputs, lambda: half(rows, inputs), lambda w: x @ w.T)
    scales, groups = half(rows), half(inputs // 32, rows, 2)
    rate(
        "int8",
        rows * inputs,
        lambda: half(rows, inputs).to(torch.int8),
        lambda w: torch.ops.aten._weight_int8pack_mm(x, w, scales),
    )
    halves = torch.ones(rows, inputs // 2, dtype=torch.uint8, device=device)
    rate(
        "int4",
        rows * inputs / 2,
        lambda: torch.ops.aten._convert_weight_to_int4pack(halves, 8),
        lambda w: torch.ops.aten._weight_int4pack_mm(x, w, 32, groups),
    )
    return found


# --- all of it ------------------------------------------------------------------------------------


def of_size(bench: Bench, size: str, copy: float | None, others: bool) -> None:
    """All rows of a size."""
    config = llama3.config_from_params(SIZES[size])
    weights = bench.measure(f"{size}: made", lambda: random_weights(config, bench.device))
    if weights is None:
        return
    bench.rows[f"{size}: made"] = f"{size_of(weights) / 1e9:.1f} GB"
    for n in PREFILLS:
        bench.measure(f"{size}: prefill {n}", lambda n=n: prefill(bench, weights, config, n))
    kinds = {"": llama3.Session}
    if bench.device.type == "cuda":
        kinds["recorded "] = CapturedSession
        bench.measure(f"{size}: same tokens of 64", lambda: same_tokens(weights, config))
        bench.measure(f"{size}: peak GB", lambda: peak_gb(bench, weights, config))
    for length in CONTEXTS:
        for name, kind in kinds.items():
            row = f"{size}: {name}decode {length}"
            found = bench.measure(
                row, lambda n=length, kind=kind: decode(bench, weights, config, n, kind)
            )
            if found and copy:
                share = size_of(weights) / found / 1e9 / copy
                bench.rows[f"{row}, share of a copy's rate"] = share
    for name, kind in kinds.items():
        bench.measure(
            f"{size}: {name}decode as generated",
            lambda kind=kind: generate(bench, weights, config, kind),
        )
    if size != "8b":
        bench.measure(f"{size}: loading GB/s", lambda: loading(bench, weights))
        for kind in ("Q8_0", "Q4_0"):
            blocks = bench.measure(f"{size}: {kind} made", lambda k=kind: quantized(weights, k))
            if blocks is not None:
                bench.rows[f"{size}: {kind} made"] = f"{size_of(blocks) / 1e9:.2f} GB"
                bench.measure(
                    f"{size}: {kind} decode 128",
                    lambda b=blocks: decode(bench, b, config, 128, [*kinds.values()][-1]),
                )
    for attention in ("eager", "sdpa") if others else ():
        name = f"{size}: transformers, {attention}"
        model = bench.measure(name, lambda a=attention: transformers_model(config, bench.device, a))
        if model is None:
            continue
        bench.rows[name] = "made"
        for n in PREFILLS[:2]:
            bench.measure(
                f"{name}: prefill {n}",
                lambda n=n, m=model: transformers_prefill(bench, m, config, n),
            )
        for n in CONTEXTS:
            bench.measure(
                f"{name}: decode {n}",
                lambda n=n, m=model: transformers_decode(bench, m, config, n),
            )
        del model


def shown(name: str, value: Any) -> str:
    """A row's value as the table has it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:.3g}" for key, number in value.items())
    if not isinstance(value, float):
        return str(value)
    if "prefill" in name:
        return f"{value:.3f} s"
    if "share" in name:
        return f"{value:.0%}"
    return (
        f"{1000 * value:.2f} ms, {1 / value:.0f} tokens/s" if "decode" in name else f"{value:.3g}"
    )


def main(arguments: list[str] | None = None) -> Bench:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="8b,1b", help="of: " + ", ".join(SIZES))
    parser.add_argument("--minutes", type=float, default=5.5, help="after which no step begins")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--out", type=Path, help="a file for the numbers, in JSON")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    bench = Bench(device, args.minutes, args.out)
    torch.set_float32_matmul_precision("highest")
    name = torch.cuda.get_device_name(device) if cuda else "a processor"
    bench.rows["device"] = f"{name}, PyTorch {torch.__version__}"
    print(bench.rows["device"])
    copy = bench.measure("copy GB/s", bench.bandwidth)
    bench.measure("demo: off from float64", lambda: differences(device))
    bench.measure("demo: answer", lambda: answer(device))
    for size in args.sizes.split(","):
        of_size(bench, size, copy, not args.no_transformers)
    if cuda:  # last: what fails on a card may leave it unusable
        bench.measure("products of one vector, GB/s", lambda: packed_products(bench))
    print("\n| step | measured |\n|---|---|")
    for row, value in bench.rows.items():
        print(f"| {row} | {shown(row, value)} |")
    for row, reason in bench.failed.items():
        print(f"| {row} | failed: {reason} |")
    bench.save()
    return bench


if __name__ == "__main__":
    main()
