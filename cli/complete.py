"""Completions: of one prompt as a stream, of several as a batch, or token by token as JSON."""

import argparse
import codecs
import contextlib
import json
import time
from collections.abc import Iterator

from torch import Tensor

import tokenizer_setup
from cli import plot, ranks
from cli.messages import UsageError, note, say_stats, steps_stats, stream, timed
from cli.model import open_model
from cli.options import read_prompts
from tokenizer_setup import Tokenizer

Steps = Iterator[tuple[Tensor, Tensor]]


def numbered(tokenizer: Tokenizer, steps: Steps, n: int) -> Iterator[str]:
    """The completions of n prompts in lines, each as soon as the one before has ended."""
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n)]
    waiting, ended, current = [f"[{i}] " for i in range(1, n + 1)], [False] * n, 0
    for tokens, _ in steps:
        for i, token in enumerate(tokens.tolist()):
            ended[i] = token < 0
            if not ended[i]:
                waiting[i] += decoders[i].decode(tokenizer.decode_single_token_bytes(token))
        while ended[current] and current < n - 1:
            yield waiting[current] + decoders[current].decode(b"", final=True) + "\n"
            current += 1
        yield waiting[current]
        waiting[current] = ""
    for i in range(current, n):
        yield waiting[i] + decoders[i].decode(b"", final=True) + "\n"


def as_json(tokenizer: Tokenizer, steps: Steps, n_prompts: int, k: int) -> Iterator[str]:
    """A line of JSON for each new token, as --logprobs has it."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        text = tokenizer.decode_single_token_bytes(token).decode(errors="replace")
        return {"token": token, "text": text, "logprob": round(logprob, 6)}

    for tokens, logprobs in steps:
        likeliest = logprobs[:, : tokenizer.n_vocab].topk(min(k, tokenizer.n_vocab))
        for i, token in enumerate(tokens.tolist()):
            if token >= 0:
                of_prompt = {"prompt": i + 1} if n_prompts > 1 else {}
                top = zip(likeliest.indices[i].tolist(), likeliest.values[i].tolist(), strict=True)
                line = of_prompt | entry(token, logprobs[i, token].item())
                yield json.dumps(line | {"top": [entry(*other) for other in top]}) + "\n"


def complete(args: argparse.Namespace) -> int:
    """Stream the completion of the prompt, or of several; returns the exit status."""
    start = time.perf_counter()
    prompts = read_prompts(args)
    model = open_model(args)
    tokenizer, room = model.tokenizer, model.config.max_seq_len
    if args.plot is not None:
        ranks.agreed(lambda: plot.check(args, model.config))
    encoded = []
    for prompt in prompts:
        spelled = tokenizer_setup.special_tokens_in(tokenizer, prompt)
        if spelled and not args.special:
            found = f'the prompt contains "{spelled[0]}", which is treated as plain text'
            note(f"{found}; --special reads it as a special token")
        encoded.append(model.encode(prompt, args.special))
        if not encoded[-1]:
            raise UsageError("the prompt is empty, and this model has no token that begins a text")
    n_prompt = max(map(len, encoded))
    if n_prompt > room:
        can_be_raised = n_prompt <= model.source.config.max_seq_len
        advice = "shorten the prompt" + " or raise --max-seq-len" * can_be_raised
        raise UsageError(f"the prompt has {n_prompt} tokens, but the context only {room}; {advice}")
    n_new = min(args.max_new_tokens, room - n_prompt)
    if n_new < args.max_new_tokens:
        note(f"the context of {room} tokens has room for {n_new} new ones")
    weights = model.load(n_prompt, min(n_new, 1024), len(encoded))  # it may end early
    load_s = time.perf_counter() - start
    if args.plot is not None:
        plot.plot(model, weights, encoded[0])

    all_steps = model.steps(encoded, weights)
    times = [time.perf_counter()]  # of the start, then of every token
    steps = timed(all_steps, times)
    if args.logprobs is not None:
        texts = as_json(tokenizer, steps, len(encoded), args.logprobs)
    elif len(encoded) > 1:
        texts = numbered(tokenizer, steps, len(encoded))
    else:
        new = (tokens.item() for tokens, _ in steps)
        texts = tokenizer_setup.decode_stream(tokenizer, new, continues=True)
    status, whole = 0, False
    try:
        with contextlib.closing(all_steps):
            whole = stream(texts)
    except KeyboardInterrupt:  # what was written stays
        status = 130
    if args.stats:
        say_stats(load_s, steps_stats(sum(map(len, encoded)), times), model.device, whole)
    return status
