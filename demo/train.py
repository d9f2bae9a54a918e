"""Make the demo checkpoint from nothing: corpus, tokenizer, model.

    python demo/train.py

writes consolidated.00.pth, params.json and tokenizer.model beside this file, in Meta's formats, so
that llama3.py loads them as it loads the models of Meta. The model is llama3.forward itself:
autograd runs through the same functions that compute the next token.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm, trange

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import bpe  # noqa: E402
import corpus  # noqa: E402

import llama3  # noqa: E402
import tokenizer_setup  # noqa: E402

PARAMS = {
    "dim": 128,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 1280,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
N_MERGES = PARAMS["vocab_size"] - 256 - len(tokenizer_setup.SPECIAL_TOKENS)
ROW_TOKENS, ROWS = 128, 12  # of a training step
PEAK_LEARNING_RATE = 3e-3


def render(document: corpus.Document) -> str:
    """A document as one text, special tokens spelled out, for the tokenizer's training."""
    if isinstance(document, str):
        return f"<|begin_of_text|>{document}<|end_of_text|>"
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content']}<|eot_id|>"
        for message in document
    )


def tokens_of(tokenizer: tiktoken.Encoding, document: corpus.Document) -> list[int]:
    """A document as the tokens that the model is trained on, end token included."""
    if isinstance(document, str):
        end = tokenizer.encode_single_token("<|end_of_text|>")
        return [*tokenizer_setup.encode(tokenizer, document), end]
    *asked, answer = document
    tokens = tokenizer_setup.encode_dialog(tokenizer, asked)
    tokens += tokenizer_setup.encode(tokenizer, answer["content"], bos=False)
    return [*tokens, tokenizer.encode_single_token("<|eot_id|>")]


def batches(documents: list[list[int]], seed: int) -> Iterator[Tensor]:
    """Endless batches, int64 [ROWS, ROW_TOKENS + 1], the documents in a new order each time round.

    A row begins with a whole document; others follow, and the last one is cut off at its end.
    """
    rng = random.Random(seed)
    rows: list[list[int]] = []
    row: list[int] = []
    while True:
        for document in rng.sample(documents, len(documents)):
            row += document
            if len(row) > ROW_TOKENS:
                rows.append(row[: ROW_TOKENS + 1])
                row = []
            if len(rows) == ROWS:
                yield torch.tensor(rows)
                rows = []


def new_weights(config: llama3.Config, seed: int) -> dict[str, Tensor]:
    """Random float32 weights to start from; those that end in the residual stream are smaller."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in llama3.weight_shapes(config).items():
        into_residual = name.endswith(("wo.weight", "w2.weight"))
        std = 0.02 / math.sqrt(2 * config.n_layers) if into_residual else 0.02
        matrix = len(shape) > 1
        weights[name] = (
            torch.randn(shape, generator=generator) * std if matrix else torch.ones(shape)
        )
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def loss_of(rows: Tensor, weights: dict[str, Tensor], config: llama3.Config) -> Tensor:
    """Cross-entropy in nats per token, of each token given those before it in its row."""
    logits = llama3.forward(rows[:, :-1], weights, config)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(
    documents: list[list[int]], config: llama3.Config, steps: int, seed: int
) -> dict[str, Tensor]:
    """AdamW with warm-up, cosine decay to a tenth, and gradient clipping."""
    weights = new_weights(config, seed)
    matrices = [weight for weight in weights.values() if weight.dim() > 1]
    norms = [weight for weight in weights.values() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 1.0}, {"params": norms, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    warm_up = max(steps // 20, 1)

    def learning_rate(step: int) -> float:
        done = (step - warm_up) / max(steps - warm_up, 1)
        return (step + 1) / warm_up if step < warm_up else 0.55 + 0.45 * math.cos(math.pi * done)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    progress = trange(steps, desc="training", disable=None)
    for _, rows in zip(progress, batches(documents, seed), strict=False):
        loss = loss_of(rows, weights, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return {name: weight.detach() for name, weight in weights.items()}


@torch.inference_mode()
def held_out_loss(
    documents: list[list[int]], weights: dict[str, Tensor], config: llama3.Config
) -> float:
    """Mean cross-entropy in nats per token over documents that were not trained on."""
    losses = [loss_of(torch.tensor([tokens]), weights, config) for tokens in documents]
    lengths = [len(tokens) - 1 for tokens in documents]
    return sum(loss.item() * n for loss, n in zip(losses, lengths, strict=True)) / sum(lengths)


@torch.inference_mode()
def answers_exactly(
    question: list[corpus.Message],
    tokenizer: tiktoken.Encoding,
    weights: dict[str, Tensor],
    config: llama3.Config,
) -> bool:
    """Whether greedy decoding gives the answer, the last message, and then ends.

    It does if each token of the answer is the likeliest after those before it, which one forward
    pass over question and answer tells.
    """
    tokens = torch.tensor(tokens_of(tokenizer, question))
    n_asked = len(tokenizer_setup.encode_dialog(tokenizer, question[:-1]))
    logits = llama3.forward(tokens[:-1], weights, config)
    return torch.equal(logits[n_asked - 1 :].argmax(-1), tokens[n_asked:])


def share_right(
    questions: list[list[corpus.Message]],
    tokenizer: tiktoken.Encoding,
    weights: dict[str, Tensor],
    config: llama3.Config,
) -> float:
    """The share of questions that are answered exactly as the corpus answers them."""
    questions = tqdm(questions, desc="answering", leave=False, disable=None)
    right = [answers_exactly(question, tokenizer, weights, config) for question in questions]
    return sum(right) / len(right)


def evaluate(ckpt_dir: Path) -> dict[str, float]:
    """Measure a checkpoint, as it lies on the disk, on what was held out of its training."""
    config = llama3.load_config(ckpt_dir)
    weights = llama3.load_weights(ckpt_dir, config)
    tokenizer = tokenizer_setup.load_tokenizer(ckpt_dir / "tokenizer.model")
    text = corpus.make_corpus()
    documents = [tokens_of(tokenizer, document) for document in text.held_out]
    figures = {"held-out loss, nats per token": held_out_loss(documents, weights, config)}
    for kind, questions in text.questions.items():
        name = f"held-out {kind} answered exactly, share of {len(questions)}"
        figures[name] = share_right(questions, tokenizer, weights, config)
    return figures


def make_checkpoint(folder: Path, steps: int, seed: int) -> None:
    """Write tokenizer.model, params.json and consolidated.00.pth, trained from nothing."""
    start = time.perf_counter()
    text = corpus.make_corpus()
    rendered = "".join(map(render, text.train))
    merges = bpe.train_bpe(rendered, N_MERGES, tokenizer_setup.SPECIAL_TOKENS, progress=True)
    bpe.save_tokenizer(merges, folder / "tokenizer.model")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")
    tokenizer = tokenizer_setup.load_tokenizer(folder / "tokenizer.model")
    config = llama3.load_config(folder)
    documents = [tokens_of(tokenizer, document) for document in text.train]
    print(
        f"corpus: {len(documents)} documents, {len(rendered):,} characters, "
        f"{sum(map(len, documents)):,} tokens"
    )

    weights = train(documents, config, steps, seed)
    stored = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    torch.save(stored, folder / "consolidated.00.pth")
    size = sum(weight.numel() for weight in stored.values())
    print(f"model: {size:,} parameters, made in {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Train, write the three files, and print what the result is worth."""
    parser = argparse.ArgumentParser(description="Make the demo checkpoint from nothing.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: demo)")
    parser.add_argument("--steps", type=int, default=4500, help="training steps (default: 4500)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and batches (default: 1)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)  # the same machine makes the same model again

    # The three files belong together: an interrupted run leaves those of the last one as they were.
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        make_checkpoint(Path(folder), args.steps, args.seed)
        for path in Path(folder).iterdir():
            path.replace(args.out / path.name)
    for name, figure in evaluate(args.out).items():
        print(f"{name}: {figure:.3f}")


if __name__ == "__main__":
    main()
