"""How much a model changes with the type of its weights, and with the program that computes it.

    python benchmarks/quality.py model.gguf

Takes the weights of a small model as the truth, in bfloat16, lets llama.cpp quantize them to each
type, and reads a text with every file, in pieces of 512 tokens: by this program in float32, and by
llama.cpp. Both are compared with the dequantized weights in float32. Writes a table in Markdown.
What it needs stands in benchmarks/requirements.txt.
"""

import argparse
import ctypes
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llama_cpp as lib  # noqa: E402
import torch  # noqa: E402
from run import quantize  # noqa: E402
from torch import Tensor  # noqa: E402

import formats  # noqa: E402
import llama3  # noqa: E402
import tokenizer_setup  # noqa: E402
from formats.blocks import Blocks  # noqa: E402
from formats.write_gguf import to_gguf  # noqa: E402

TYPES = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_0": 8, "Q4_K_M": 15, "Q4_0": 2}
TOKENS, PIECE = 4096, 512  # of the text; the first half of a piece is context alone


def by_llama_cpp(path: Path, pieces: list[list[int]], n_vocab: int) -> Iterator[Tensor]:
    """The logits of all tokens of each piece, [T, V]."""
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = PIECE
    options.type_k = options.type_v = 0  # GGML_TYPE_F32
    context = lib.llama_init_from_model(model, options)
    for piece in pieces:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch = lib.llama_batch_init(len(piece), 0, 1)
        batch.n_tokens = len(piece)
        for i, token in enumerate(piece):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if lib.llama_decode(context, batch):
            raise SystemExit("llama.cpp cannot read these tokens")
        size, place = ctypes.c_float * (len(piece) * n_vocab), lib.llama_get_logits(context)
        array = size.from_address(ctypes.addressof(place.contents))
        yield torch.frombuffer(array, dtype=torch.float32).view(len(piece), n_vocab).clone()
        lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)


def dense(source: formats.Source) -> dict[str, Tensor]:
    """The weights in float32, dequantized."""
    weights = source.load_weights(dtype=torch.float32)
    return {n: w.to(torch.float32) for n, w in weights.items() if isinstance(w, Blocks)} | {
        n: w.float() for n, w in weights.items() if isinstance(w, Tensor)
    }


@torch.inference_mode()
def compare(found: Tensor, truth: Tensor, tokens: Tensor) -> Tensor:
    """Sums over the second half of a piece: KL divergence, same likeliest tokens, -log p, count."""
    half = slice(PIECE // 2, -1)
    p, q = (torch.log_softmax(logits[half], -1) for logits in (truth, found))
    same = p.argmax(-1) == q.argmax(-1)
    nll = -q.gather(1, tokens[PIECE // 2 + 1 :, None])
    return torch.tensor([(p.exp() * (p - q)).sum(), same.sum(), nll.sum(), len(p)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare types of weights.")
    parser.add_argument("model", type=Path, help="a small model, of which llama.cpp reads the type")
    args = parser.parse_args()
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    source = formats.open(args.model)
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/*.md")))
    ids = tokenizer_setup.encode(source.tokenizer(), text)[:TOKENS]
    pieces = [ids[i : i + PIECE] for i in range(0, len(ids), PIECE)]
    n_vocab = source.config.vocab_size
    print(
        "| type | bits a weight | perplexity | KL divergence from bfloat16 | same likeliest token |"
    )
    print("|---|---|---|---|---|")
    nearer = []
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        first = Path(name, "bf16.gguf")
        to_gguf(source, first, "BF16", tokenizer=False)
        weights = dense(formats.open(first))
        truths = [llama3.forward(torch.tensor(p), weights, source.config) for p in pieces]
        for kind in ("BF16", *TYPES):
            path = Path(name, f"{kind}.gguf") if kind in TYPES else first
            if kind in TYPES:
                quantize(first, path, TYPES[kind])
            opened = formats.open(path)
            exact, blocks = dense(opened), opened.load_weights(dtype=torch.float32)
            bfloat16 = opened.load_weights(dtype=torch.bfloat16)
            totals = torch.zeros(4, 4)
            numbers = sum(math.prod(s.shape) for s in opened.stored.values())
            size = sum(part.nbytes for s in opened.stored.values() for part in s.parts())
            theirs = by_llama_cpp(path, pieces, n_vocab)
            for piece, truth, other in zip(pieces, truths, theirs, strict=True):
                tokens = torch.tensor(piece)
                ours = llama3.forward(tokens, blocks, opened.config)
                here = llama3.forward(tokens, exact, opened.config)
                rounded = llama3.forward(tokens, bfloat16, opened.config)
                pairs = (ours, truth), (ours, here), (rounded, here), (other, here)
                for row, (found, true) in zip(totals, pairs, strict=True):
                    row += compare(found, true, tokens)
            kl, same, nll, n = totals[0].tolist()
            print(
                f"| {kind} | {8 * size / numbers:.2f} | {math.exp(nll / n):.3f} | {kl / n:.5f} | "
                f"{100 * same / n:.1f}% |",
                flush=True,
            )
            cells = (f"{t[0] / n:.1e}, {100 * t[1] / n:.1f}%" for t in totals[1:])
            nearer.append(f"| {kind} | " + " | ".join(cells) + " |")
    print("\nAgainst the dequantized weights of the same file in float32: KL divergence, and how")
    print("often the likeliest token is the same.\n")
    print("| type | this, float32 | this, bfloat16 | llama.cpp |\n|---|---|---|---|")
    print("\n".join(nearer))


if __name__ == "__main__":
    main()
