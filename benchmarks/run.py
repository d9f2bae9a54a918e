"""Load, prefill, decode and memory of a random model of real size, beside what the machine can do.

    python benchmarks/run.py --size small
    python benchmarks/run.py --size 1b --against llama.cpp,transformers
    python benchmarks/run.py --model model.gguf --format BF16 --against llama.cpp

Makes a random checkpoint in Meta's format in a temporary folder and measures it, or a model that is
there, with its weights in another type if --format names one. llama.cpp gets the same weights in a
GGUF file, and makes those of types that quantize. Speeds of one machine drift within minutes, so
whatever is compared takes turns, and a ratio is the median of the ratios of single turns. What
--against needs stands in benchmarks/requirements.txt.
"""

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import formats  # noqa: E402
import llama3  # noqa: E402
from cli.step import with_built_steps  # noqa: E402
from cli.words import expanded  # noqa: E402
from formats.blocks import Blocks  # noqa: E402
from formats.write_gguf import to_gguf  # noqa: E402

ROPE = {"norm_eps": 1e-05, "rope_theta": 500000.0}
SIZES = {  # params.json, and the contexts at which decoding is measured
    "small": (
        {"dim": 1024, "n_layers": 4, "n_heads": 16, "n_kv_heads": 4, "vocab_size": 32768}
        | {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, **ROPE},
        (128, 1024, 4096),
    ),
    "1b": (
        {"dim": 2048, "n_layers": 8, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
        | {"multiple_of": 256, "ffn_dim_multiplier": 1.5, **ROPE},
        (128, 1024),
    ),
    "8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
        | {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, **ROPE},
        (128, 1024),
    ),
}
PREFILLS = (128, 1024)
FORMATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
QUANTIZED = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama.cpp's numbers of them
Contestant = tuple[Callable[[int], None], Callable[[int, int], None]]  # prefill(n), decode(L, n)


# --- the model ------------------------------------------------------------------------------------


def random_weights(
    config: llama3.Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> llama3.Weights:
    """Weights of the size that training gives them, made on the device."""
    generator, weights = torch.Generator(device).manual_seed(0), {}
    for name, shape in llama3.weight_shapes(config).items():
        weights[name] = torch.ones(shape, dtype=dtype, device=device)
        if len(shape) > 1:
            weights[name].normal_(0, shape[1] ** -0.5, generator=generator)
    return weights


def make_checkpoint(folder: Path, params: dict, dtype: torch.dtype = torch.bfloat16) -> None:
    """Random weights in Meta's files."""
    (folder / "params.json").write_text(json.dumps(params))
    weights = random_weights(llama3.load_config(folder), dtype=dtype)
    torch.save(weights, folder / "consolidated.00.pth")


def prompt_of(n: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, vocab_size, (n,), generator=generator).tolist()


def finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- who takes part -------------------------------------------------------------------------------


def ours(weights: llama3.Weights, config: llama3.Config) -> Contestant:
    device = weights["norm.weight"].device
    sessions = {}

    def prefill(n: int) -> None:
        prompt = prompt_of(n, config.vocab_size)
        next(llama3.generate(prompt, weights, config, max_new_tokens=1))
        finished(device)

    @torch.inference_mode()
    def decode(length: int, n: int) -> None:
        if length not in sessions:
            sessions[length] = llama3.Session(weights, config)
            sessions[length].reserve(length + 256)
            sessions[length].cache.normal_()
        session, token = sessions[length], torch.tensor([7], device=device)
        session.tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
        for _ in range(n):
            logits = session.read(token[None])[:, -1]
            if not torch.stack(logits.aminmax()).isfinite().all():  # as generate_batch does
                raise FloatingPointError
            token = llama3.sample(logits)
            token.item()

    return prefill, decode


def sizes_in_transformers(config: llama3.Config) -> dict[str, int]:
    """The sizes of a model, by their names in a LlamaConfig."""
    return {
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
    }


def in_transformers(config: llama3.Config, device: torch.device) -> Contestant:
    """LlamaForCausalLM with the same sizes and random bfloat16 weights, as it comes."""
    import transformers

    model_config = transformers.LlamaConfig(
        **sizes_in_transformers(config),
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(model_config).eval().to(torch.bfloat16)
    caches = {}

    @torch.inference_mode()
    def run(tokens: list[int], cache: object) -> int:
        tokens = torch.tensor([tokens], device=device)
        with warnings.catch_warnings(action="ignore"):  # of the name past_key_values
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        return logits[0, -1].argmax().item()

    def prefill(n: int) -> None:
        run(prompt_of(n, config.vocab_size), transformers.DynamicCache())

    def decode(length: int, n: int) -> None:
        if length not in caches:
            caches[length] = transformers.DynamicCache()
            run(prompt_of(length, config.vocab_size), caches[length])
        more = caches[length].get_seq_length() - length
        if more:
            caches[length].crop(-more)
        token = 7
        for _ in range(n):
            token = run([token], caches[length])

    return prefill, decode


def quantize(file: Path, target: Path, number: int) -> Path:
    """A GGUF file with the weights of another one in another type, by llama.cpp's number of it."""
    import ctypes

    import llama_cpp as lib

    options = lib.llama_model_quantize_default_params()
    options.ftype = number
    if lib.llama_model_quantize(str(file).encode(), str(target).encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp cannot write {target.name}")
    return target


def in_llama_cpp(file: Path, config: llama3.Config, threads: int) -> Contestant:
    """llama.cpp with the weights in a GGUF file, through llama-cpp-python's plain bindings."""
    import ctypes

    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 8192, 2048, 512
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = 30  # GGML_TYPE_BF16
    context = lib.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("llama.cpp cannot make a context for this model")
    memory = lib.llama_get_memory(context)
    held = [0]  # how many tokens its cache holds

    def run(tokens: list[int]) -> int:
        array = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama.cpp cannot read these tokens")
        held[0] += len(tokens)
        logits = lib.llama_get_logits_ith(context, -1)
        return (
            torch.frombuffer(
                (ctypes.c_float * config.vocab_size).from_address(
                    ctypes.addressof(logits.contents)
                ),
                dtype=torch.float32,
            )
            .argmax()
            .item()
        )

    def keep(n: int) -> None:
        if n > held[0]:
            keep(0)
            prompt = prompt_of(n, config.vocab_size)
            for start in range(0, n, 1024):
                run(prompt[start : start + 1024])
        lib.llama_memory_seq_rm(memory, 0, n, -1)
        held[0] = n

    def prefill(n: int) -> None:
        keep(0)
        run(prompt_of(n, config.vocab_size))

    def decode(length: int, n: int) -> None:
        token = 7
        for _ in range(n):
            token = run([token])

    decode.prepare = keep
    in_llama_cpp.quiet = quiet  # or the callback would be freed while it is in use
    return prefill, decode


# --- measuring ------------------------------------------------------------------------------------


def seconds(function: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def machine(device: torch.device, dtype: torch.dtype) -> dict:
    """What the machine can do at best: bytes read and floating-point operations, a second."""
    numbers = torch.ones(2**28, device=device)
    read = min(seconds(lambda: numbers.sum().item()) for _ in range(5))
    matrix = torch.randn(2048, 2048, device=device).to(dtype)

    def multiply() -> None:
        (matrix @ matrix)[0, 0].item()

    name = str(dtype).removeprefix("torch.")
    rates = {name: 2 * 2048**3 / min(seconds(multiply) for _ in range(5))}
    return {"bytes_s": numbers.nbytes / read, "flop_s": rates}


def processor() -> str:
    """Its name and the instruction sets that matter here."""
    if not Path("/proc/cpuinfo").exists():
        return platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info)
    flags = re.search(r"flags\s*: (.*)", info)
    sets = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    there = [s for s in sets if flags and f" {s} " in f" {flags[1]} "]
    return f"{name[1].strip() if name else platform.machine()} ({', '.join(there)})"


def peak_memory(path: Path, n: int, dtype: str) -> int:
    """The most that a process of its own has resident while it reads a prompt of n tokens."""
    code = f"""if True:
        import torch, formats, llama3
        from cli.step import with_built_steps
        from cli.messages import peak_rss_bytes
        source = formats.open({str(path)!r})
        config = source.config
        device = torch.device("cpu")
        weights = source.load_weights(device, {dtype} or source.default_dtype(device))
        weights = with_built_steps(weights, config, build=False)
        next(llama3.generate([7] * {n}, weights, config, max_new_tokens=1))
        print(peak_rss_bytes())"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def take_turns(contestants: dict[str, Contestant], contexts: tuple[int, ...], turns: int) -> dict:
    """{figure: {contestant: seconds of each turn}}; of decoding, seconds a token."""
    figures: dict[str, dict[str, list[float]]] = {}
    tasks = [(f"prefill {n}", 0, n, 1) for n in PREFILLS]
    tasks += [(f"decode at {length}", 1, length, 16) for length in contexts]
    for figure, which, size, n in tasks:
        times = figures.setdefault(figure, {name: [] for name in contestants})
        for turn in range(turns + 1):  # the first warms up
            for name, contestant in contestants.items():
                arguments = (size, n) if which else (size,)
                getattr(contestant[which], "prepare", lambda size: None)(size)
                taken = seconds(contestant[which], *arguments) / n
                if turn:
                    times[name].append(taken)
        medians = {name: f"{1000 * statistics.median(t):.0f}" for name, t in times.items()}
        print(f"{figure}, ms: {medians}", file=sys.stderr, flush=True)
    return figures


def table(record: dict) -> str:
    """The record of a run in Markdown."""
    limit, config, rates = record["machine"], record["model"], record["machine"]["flop_s"]
    contestants = [*next(iter(record["figures"].values()))]
    base = contestants[0]
    lines = [
        f"{record['processor']}, {record['threads']} threads, {record['versions']}, "
        f"`{record['command']}`. It reads {limit['bytes_s'] / 1e9:.1f} GB/s, and multiplies "
        f"matrices with {rates['float32'] / 1e9:.0f} GFLOP/s in float32 and "
        f"{rates['bfloat16'] / 1e9:.0f} in bfloat16. Computed in {record['dtype']}; loaded in "
        f"{record['load_s']:.2f} s, built in {record['build_s']:.1f} s.",
        "",
        "| figure | " + " | ".join(contestants) + " | share of the limit |",
        "|" + "---|" * (len(contestants) + 2),
    ]
    for figure, times in record["figures"].items():
        size = int(figure.split()[-1])
        own = statistics.median(times[base])
        if figure.startswith("prefill"):
            layers = (
                config["matrices"] - config["output"]
            )  # which the last token alone goes through
            operations = 2 * layers * size + config["attention"] * size**2 / 2
            share, shown = operations / own / rates[record["dtype"]], lambda t: f"{t:.2f} s"
        else:
            read = config["stored"] + config["cache"] * size
            share, shown = read / own / limit["bytes_s"], lambda t: f"{1000 * t:.1f} ms"
        cells = []
        for name in contestants:
            cell = shown(statistics.median(times[name]))
            if name != base:
                pairs = zip(times[name], times[base], strict=True)
                cell += f" ({statistics.median(a / b for a, b in pairs):.2f})"
            cells.append(cell)
        lines.append(f"| {figure} | " + " | ".join(cells) + f" | {100 * share:.0f}% |")
    lines += ["", "In brackets: how many times as long as the first column, median of the turns."]
    for what, size in record["memory"].items():
        lines.append(f"Peak resident memory, {what}: {size / 1e9:.2f} GB.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure llama3.py on a random model.")
    parser.add_argument("--size", choices=SIZES, default="small", help="of a random model")
    parser.add_argument("--model", type=Path, help="a folder or file instead of a random model")
    parser.add_argument("--format", choices=(*FORMATS, *QUANTIZED), help="the type of weights")
    parser.add_argument("--against", default="", help="llama.cpp, transformers, or both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=llama3.DTYPES, help="type to compute in")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--record", type=Path, help="JSON file to add the figures to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    params, contexts = SIZES[args.size] if not args.model else ({}, (128, 1024))
    with tempfile.TemporaryDirectory() as name:
        path = args.model.resolve() if args.model else Path(name)
        stored = "BF16" if args.format in QUANTIZED else args.format
        if not args.model:
            make_checkpoint(path, params, FORMATS[stored or "BF16"])
        if args.format in QUANTIZED or (args.model and args.format):
            source, path = formats.open(path), Path(name) / "model.gguf"
            to_gguf(source, path, stored, tokenizer=False)
        if args.format in QUANTIZED:
            path = quantize(path, Path(name) / "quantized.gguf", QUANTIZED[args.format])
        source = formats.open(path)
        config, dtype = source.config, llama3.DTYPES.get(args.dtype) or source.default_dtype(device)
        computed = str(dtype).removeprefix("torch.")
        contestants, seconds_of = {}, {}
        for what in ("build", "load"):  # which includes that words are made of blocks
            start = time.perf_counter()
            weights = source.load_weights(device, dtype)
            on_cpu = device.type == "cpu"
            built = with_built_steps({**weights}, config, build=True) if on_cpu else weights
            seconds_of[what] = time.perf_counter() - start
        if any(map(callable, built.values())):  # else it could not be built
            contestants["built"] = ours(built, config)
        plain = expanded(weights)
        if not any(isinstance(w, Blocks) for n, w in plain.items() if "embed" not in n):
            contestants["not built"] = ours(plain, config)
        against = [other for other in args.against.split(",") if other]
        if "llama.cpp" in against:
            file = path if path.is_file() else Path(name) / "model.gguf"
            if file != path:
                to_gguf(source, file, args.format or "BF16", tokenizer=False)
            contestants["llama.cpp"] = in_llama_cpp(file, config, args.threads)
        if "transformers" in against:
            contestants["transformers bfloat16"] = in_transformers(config, device)
        matrices = [w for n, w in weights.items() if len(w.shape) == 2 and "embed" not in n]
        kv_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim
        record = {
            "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
            "size": args.model.stem.split(".")[0] if args.model else args.size,
            "format": args.format,
            "processor": processor() if device.type == "cpu" else torch.cuda.get_device_name(),
            "threads": args.threads,
            "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
            "dtype": computed,
            "load_s": seconds_of["load"],
            "build_s": seconds_of["build"],
            "machine": machine(device, dtype),
            "model": {
                "matrices": sum(math.prod(w.shape) for w in matrices),
                "stored": sum(getattr(w, "raw", w).nbytes for w in matrices),
                "output": config.vocab_size * config.dim,
                "attention": 4 * config.dim * config.n_layers,
                "cache": kv_bytes * weights["norm.weight"].itemsize,
            },
            "figures": take_turns(contestants, contexts, args.turns),
            "memory": {},
        }
        after = machine(device, dtype)  # the limits are what it could do at best, before or after
        record["machine"]["bytes_s"] = max(record["machine"]["bytes_s"], after["bytes_s"])
        for name, rate in after["flop_s"].items():
            record["machine"]["flop_s"][name] = max(record["machine"]["flop_s"][name], rate)
        files = [path] if path.is_file() else path.glob("consolidated.*.pth")
        record["memory"]["of the file (on disk)"] = sum(file.stat().st_size for file in files)
        if device.type == "cpu":
            prompts = [(128, "None"), (4096, "None"), (4096, "torch.float32")]
            for n, asked in prompts[:1] if args.size == "8b" else prompts:
                what = f"a prompt of {n} tokens" + (", float32" if "float32" in asked else "")
                record["memory"][what] = peak_memory(path, n, asked)
    print(table(record))
    if args.record:
        records = json.loads(args.record.read_text()) if args.record.exists() else []
        args.record.write_text(json.dumps([*records, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
