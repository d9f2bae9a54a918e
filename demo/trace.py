"""The tensors on the way from the prompt to 42, for those who check an implementation of their own.

    python demo/trace.py

writes trace.json beside this file: of every tensor its shape, and of its last row, which is the
last token's, the first three numbers and the length. Computed in float32 from the demo's weights.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.append(str(HERE.parent))

import llama3  # noqa: E402
import tokenizer_setup  # noqa: E402
from demo.mistakes import PROMPT  # noqa: E402


def tensors(tokens: Tensor, weights: llama3.Weights, config: llama3.Config) -> dict[str, Tensor]:
    """What is computed on the way, by name: the first layer in all its steps, then layer by layer.

    Heads lie side by side, [T, heads * d]; scores and pattern are those of the last head.
    """
    positions = torch.arange(len(tokens))
    rotations = llama3.rope_rotations(positions, config)
    no_rotation = torch.ones_like(rotations)
    mask = llama3.causal_mask(positions, positions)

    def flat(heads: Tensor) -> Tensor:  # [heads, T, d] -> [T, heads * d]
        return heads.transpose(0, 1).flatten(1)

    x = weights["tok_embeddings.weight"][tokens]
    found = {"embeddings": x}
    normed = llama3.rms_norm(x, weights["layers.0.attention_norm.weight"], config.norm_eps)
    found["layers.0 attention_norm"] = normed
    q, k, v = llama3.queries_keys_values(normed, weights, 0, config, no_rotation)
    found |= {"layers.0 queries": flat(q), "layers.0 keys": flat(k), "layers.0 values": flat(v)}
    q, k, v = llama3.queries_keys_values(normed, weights, 0, config, rotations)
    found |= {"layers.0 queries, rotated": flat(q), "layers.0 keys, rotated": flat(k)}
    found["layers.0 scores, last head"] = q[-1] @ k[-1].T / math.sqrt(config.head_dim)
    pattern = llama3.attention_pattern(q[-1], k[-1], mask)
    found["layers.0 pattern, last head"] = pattern
    found["layers.0 heads"] = flat(llama3.grouped_query_attention(q, k, v, mask))
    change = llama3.attention(normed, weights, 0, config, rotations, mask)
    found |= {"layers.0 attention, after wo": change, "layers.0 after attention": x + change}
    x = x + change
    normed = llama3.rms_norm(x, weights["layers.0.ffn_norm.weight"], config.norm_eps)
    gate = llama3.linear(normed, weights, "layers.0.feed_forward.w1")
    found |= {"layers.0 ffn_norm": normed, "layers.0 gate, before SiLU": gate}
    found["layers.0 gated"] = llama3.silu(gate) * llama3.linear(
        normed, weights, "layers.0.feed_forward.w3"
    )
    found["layers.0 feed_forward"] = llama3.feed_forward(normed, weights, 0)
    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(config.n_layers):
        x = llama3.block(x, weights, layer, config, rotations, mask)
        found[f"after layers.{layer}"] = x
    found["norm"] = llama3.rms_norm(x, weights["norm.weight"], config.norm_eps)
    return found | {"logits": llama3.forward(tokens, weights, config)}


def of_the_demo() -> dict:
    """What trace.json holds."""
    config = llama3.load_config(HERE)
    weights = {name: w.float() for name, w in llama3.load_weights(HERE, config).items()}
    tokenizer = tokenizer_setup.load_tokenizer(HERE / "tokenizer.model")
    tokens = tokenizer_setup.encode(tokenizer, PROMPT)
    found = {}
    for name, tensor in tensors(torch.tensor(tokens), weights, config).items():
        first = [round(number, 6) for number in tensor[-1, :3].tolist()]
        length = round(tensor[-1].norm().item(), 6)
        found[name] = {"shape": [*tensor.shape], "first": first, "length": length}
    return {"prompt": PROMPT, "tokens": tokens, "tensors": found}


def main() -> None:
    rows = of_the_demo()
    tensors = rows.pop("tensors").items()  # one a line
    lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in tensors)
    head = ",\n ".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    (HERE / "trace.json").write_text(f'{{\n {head},\n "tensors": {{\n  {lines}\n }}\n}}\n')


if __name__ == "__main__":
    main()
