"""Write a model of any kind as Meta's files, or as a Hugging Face folder, or as a GGUF file.

python -m formats.convert SOURCE OUT_DIR
python -m formats.convert --to-hf CKPT_DIR HF_DIR
python -m formats.convert SOURCE OUT.gguf --type Q8_0
"""

import argparse
import base64
import contextlib
import functools
import json
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import formats
import llama3
from formats.errors import CheckpointError, one_line, out_of_memory, say
from formats.huggingface import BIASES_QKV, HF_KEYS, to_hf_name
from formats.source import Source, pairs_half_a_head_apart
from formats.write_gguf import TYPES, to_gguf
from formats.write_text import as_files, llama3_ranks, tokenizer_files

Progress = Callable[[Iterable[str]], Iterable[str]]
# Meta's own multiple_of and ffn_dim_multiplier, so that a params.json is as Meta's: no ffn_dim.
FFN_FORMULAS = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))
SHARD_BYTES = 2**31  # of one safetensors file, as it is in memory while it is written


def params_of(config: llama3.Config) -> dict[str, object]:
    """The params.json of a config: what follows from the rest is left out."""
    params = config._asdict() | {"use_scaled_rope": config.rope_scaling_factor is not None or None}
    del params["rope_attention_factor"]
    for multiple_of, multiplier in FFN_FORMULAS:
        meta = {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier, "ffn_dim": None}
        if llama3.config_from_params(params | meta) == config:
            params |= meta
            break
    for key in ("head_dim", "max_seq_len"):
        if llama3.config_from_params(params | {key: None}) == config:
            params[key] = None
    return {key: value for key, value in params.items() if value is not None}


def refuse_existing(path: Path, folder: bool) -> None:
    """Raise CheckpointError if there is something at `path`, but where an empty folder will do."""
    if os.path.lexists(path) and not (folder and path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(path, "already exists and is not overwritten; choose a new name")


@contextlib.contextmanager
def new(path: Path, folder: bool = True) -> Iterator[Path]:
    """A folder or file to write, which becomes `path` when all is there, else it is gone."""
    refuse_existing(path, folder)
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:99]}.", dir=path.parent) as made:
            inner = Path(made) / "new"
            if folder:
                inner.mkdir()
            yield inner
            os.replace(inner, path)
    except Exception as error:  # a library that cannot write a file raises what it likes
        if out_of_memory(error) or isinstance(error, ImportError | CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(path, f"cannot be written: {reason}") from None


def to_meta(
    source: Source, out_dir: Path, progress: Progress = iter, tokenizer: bool = True
) -> None:
    """Write a model as Meta's files; what is not mapped is in memory all at once.

    A tokenizer that is not Llama 3's is written as Hugging Face has it. Raises CheckpointError.
    """
    if source.config.rope_divisors or source.config.rope_attention_factor != 1:
        raise CheckpointError(source.path, "params.json cannot say how its RoPE is scaled")
    files = {"params.json": json.dumps(params_of(source.config)) + "\n"}
    if tokenizer:
        found = source.tokenizer()
        ranks = llama3_ranks(found)
        if ranks:
            ordered = sorted(ranks, key=ranks.get)
            lines = (f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in ordered)
            files["tokenizer.model"] = "".join(lines)
        else:
            files |= {name: json.dumps(held) for name, held in tokenizer_files(found).items()}
    weights = {}
    for name in progress(source.stored):
        w = source.stored[name].tensor(llama3.split_axis(name)).contiguous()
        # torch.save would write all that a view is a view of, but for one that NumPy gives back.
        own = torch.from_numpy(w.flatten().view(torch.uint8).numpy())
        weights[name] = own.view(w.dtype).view(w.shape)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    with new(out_dir) as folder:
        for name, content in files.items():
            (folder / name).write_text(content)
        torch.save(weights, folder / "consolidated.00.pth")


def hf_config(source: Source) -> dict[str, object]:
    """The config.json of a LlamaForCausalLM. Raises CheckpointError for what it cannot say."""
    config, more = source.config, r"\.bias$|\.[qk]_norm\.weight$"
    more = [name for name in source.stored if re.search(more, name)]
    kinds = {re.sub(r"^layers\.\d+\.|\.bias$", "", name) for name in more}
    known = kinds in (set(), BIASES_QKV | {"attention.wo"})
    scaled = config.rope_divisors or config.rope_attention_factor != 1
    if scaled or not known or len(more) != len(kinds) * config.n_layers:
        found = "RoPE that is scaled otherwise" if scaled else ", ".join(sorted(kinds))
        problem = f"found {found}, which Hugging Face's Llama does not have"
        raise CheckpointError(source.path, f"{problem}; expected a Llama model")
    scaling = {"rope_type": "llama3", "factor": config.rope_scaling_factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    dtype = source.stored["tok_embeddings.weight"].dtype
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, name) for name, key in HF_KEYS.items()},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling_factor else None,
        "attention_bias": bool(kinds),
        "tie_word_embeddings": "output.weight" not in source.stored,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def to_hf(source: Source, out_dir: Path, progress: Progress = iter, tokenizer: bool = True) -> None:
    """Write a Llama model, with its tokenizer or without. Raises CheckpointError."""
    from safetensors.torch import save_file

    files = {"config.json": hf_config(source)}
    if tokenizer:
        files |= tokenizer_files(as_files(source.tokenizer()))
        files["tokenizer_config.json"]["model_max_length"] = source.config.max_seq_len
        files["config.json"] |= files["generation_config.json"]
    sizes = {n: math.prod(s.shape) * s.dtype.itemsize for n, s in source.stored.items()}
    with new(out_dir) as folder:
        tensors, places, file, held = {}, {}, "model-00001.safetensors", 0
        for name in progress(source.stored):
            if held and held + sizes[name] > SHARD_BYTES:
                save_file(tensors, folder / file, metadata={"format": "pt"})
                tensors, held, file = {}, 0, f"model-{int(file[6:11]) + 1:05}.safetensors"
            w = source.stored[name].tensor(llama3.split_axis(name))
            if re.search(r"attention\.w[qk]\.", name):
                w = pairs_half_a_head_apart(w, source.config.head_dim)
            tensors[to_hf_name(name)] = w.contiguous().clone()  # safetensors refuses views
            places[to_hf_name(name)], held = file, held + sizes[name]
        save_file(tensors, folder / file, metadata={"format": "pt"})
        if len({*places.values()}) == 1:
            (folder / file).rename(folder / "model.safetensors")
        else:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            files["model.safetensors.index.json"] = index
        for name, content in files.items():
            indent = None if name == "tokenizer.json" else 2
            (folder / name).write_text(json.dumps(content, indent=indent) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 if the input was bad."""
    parser = argparse.ArgumentParser(
        prog="python -m formats.convert",
        description="Write a model of any kind as Meta's files, as a Hugging Face folder, or as a "
        "GGUF file. In folders weights keep their type; those of a quantized GGUF file become "
        "bfloat16.",
    )
    parser.add_argument("source", type=Path, help="folder or GGUF file", metavar="SOURCE")
    parser.add_argument("out", type=Path, help="new folder, or NAME.gguf, to write", metavar="OUT")
    parser.add_argument("--to-hf", action="store_true", help="write a Hugging Face folder")
    parser.add_argument("--type", choices=TYPES, help="of the matrices in a GGUF file (BF16)")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    args = parser.parse_args(argv)
    quiet = True if sys.stderr is None else None  # None: unless it is a terminal
    progress = functools.partial(tqdm, disable=quiet, desc="writing", unit=" tensors", leave=False)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        is_gguf = args.out.suffix.lower() == ".gguf"
        if (args.to_hf and is_gguf) or (args.type and not is_gguf):
            parser.error("--type is for an OUT that ends in .gguf, --to-hf for another one")
        refuse_existing(args.out, folder=not is_gguf)
        source = formats.open(args.source)
        say(f"convert: found {source.found}")
        if is_gguf:
            with new(args.out, folder=False) as path:
                to_gguf(source, path, args.type or "BF16", progress, not args.no_tokenizer)
        else:
            write = to_hf if args.to_hf else to_meta
            write(source, args.out, progress, not args.no_tokenizer)
        say(f"convert: wrote {args.out}")
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not (isinstance(error, CheckpointError | OSError | ImportError) or out_of_memory(error)):
            raise
        missing = isinstance(error, ImportError)
        found = f"a package is missing: pip install {error.name}" if missing else error
        say(f"convert: error: {one_line(found, 1000)}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
