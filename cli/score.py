"""Scores: how likely the model finds a text, or every line of one."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

import llama3
from cli import ranks
from cli.messages import UsageError, note, say_stats, stream
from cli.model import open_model
from cli.options import MAX_SCORED_BYTES, from_file

SCORED_LOGITS = 2**24  # at a time: 64 MB


def windows(n_tokens: int, window: int) -> Iterator[tuple[int, int]]:
    """Yield the begin of each window over n_tokens, and the first token that it scores.

    They overlap by half, so that every token has half a window before it, or all there is.
    """
    yield 0, 1
    stride = max(window - window // 2, 1)
    for begin in range(stride, n_tokens - window + stride, stride):
        yield begin, begin + window - stride


@torch.inference_mode()
def scored_tokens(
    tokens: Sequence[int],
    weights: llama3.Weights,
    config: llama3.Config,
    done: Callable[[int], object] = bool,
) -> torch.Tensor:
    """The log-probabilities of tokens, each after all before it: [T] -> float32 [T - 1]."""
    session = llama3.Session(weights, config)
    session.reserve(len(tokens))
    tokens = torch.tensor(tokens, device=session.tokens.device)
    rows = max(min(SCORED_LOGITS // config.vocab_size, llama3.PREFILL_TOKENS), 1)
    found = []
    for i in range(0, len(tokens) - 1, rows):
        block = tokens[i : min(i + rows, len(tokens) - 1)]
        logits = session.read(block[None])[0]  # [rows, V]
        chosen = logits.gather(1, tokens[i + 1 : i + 1 + len(block), None])[:, 0]
        found.append(chosen - logits.logsumexp(-1))
        done(len(block))
    return torch.cat(found)


def score(args: argparse.Namespace) -> int:
    """Write how likely the model finds a text, or every line of one; returns the exit status."""
    start = time.perf_counter()
    text = ranks.agreed(lambda: from_file("--score", args.score, MAX_SCORED_BYTES))
    model = open_model(args)
    tokenizer, window = model.tokenizer, model.config.max_seq_len
    if window < 2:
        raise UsageError("--max-seq-len 1: a score needs a context of 2 tokens at least")
    documents = [text]
    if args.by_line:
        documents = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    encoded = [model.encode(document) for document in documents]
    longest, overlap = max(map(len, encoded)), f"{window} that overlap by {window // 2}"
    if longest > window:
        note(f"texts of up to {longest} tokens are read in windows of {overlap}")
    weights = model.load(min(longest, window), 0)
    begin = time.perf_counter()
    total = sum(max(len(tokens) - 1, 0) for tokens in encoded)
    progress = tqdm(total=total, desc="scoring", unit=" tokens", leave=False, disable=None)

    def lines() -> Iterator[str]:
        for document, tokens in zip(documents, encoded, strict=True):
            nll, n = 0.0, max(len(tokens) - 1, 0)
            for first, scored_from in windows(len(tokens), window) if n else ():
                part = tokens[first : first + window]
                before = progress.n
                scored = scored_tokens(part, weights, model.config, progress.update)
                if not scored.isfinite().all():
                    reason = model.why_not_finite(weights)
                    raise FloatingPointError(f"the scores are not finite: {reason}")
                scored = scored[scored_from - first - 1 :]
                progress.update(len(scored) - (progress.n - before))  # without the overlap
                nll -= scored.double().sum().item()
            size = len(document.encode(errors="replace"))
            if not tokenizer.begin:  # then the first token is not scored
                size = sum(len(tokenizer.decode_single_token_bytes(t)) for t in tokens[1:])
            line = {"tokens": n, "nll": round(nll, 4)}
            line["perplexity"] = float(f"{math.exp(min(nll / n, 700)):.6g}") if n else None
            line["bits_per_byte"] = float(f"{nll / math.log(2) / size:.6g}") if n and size else None
            yield json.dumps(line) + "\n"

    status, whole = 0, False
    try:
        whole = stream(lines())
    except KeyboardInterrupt:  # what was written stays
        status = 130
    finally:
        progress.close()
    if args.stats:
        stats = {"tokens": total, "score_s": round(time.perf_counter() - begin, 4)}
        say_stats(begin - start, stats, model.device, whole)
    return status
