"""Other ways to compute the same model, for the tests to compare with.

`meta_order` is the order of operations of Meta's reference (llama3/model.py in llama-models),
written down again with PyTorch's own building blocks: equal results are equal to the last bit.
`numpy_float64` shares nothing with llama3.py: NumPy, double precision, one token and one head at a
time, RoPE by sines and cosines. `texts` are for comparing tokenizers.
"""
# ruff: noqa: RUF001 (texts of many scripts)

import math

import numpy as np
import torch
import torch.nn.functional as F


def meta_order(tokens, weights, params):
    """Logits [B, T, vocab_size] of whole sequences, as Meta's reference computes them."""
    dtype = weights["output.weight"].dtype
    n_heads, head_dim = params["n_heads"], params["dim"] // params["n_heads"]
    n_kv_heads = params.get("n_kv_heads") or n_heads
    batch, length = tokens.shape

    def norm(x, weight):
        x32 = x.float()
        mean_square = torch.mean(x32**2, dim=-1, keepdim=True)
        return torch.mul((x32 * torch.rsqrt(mean_square + params["norm_eps"])).type_as(x), weight)

    frequencies = 1.0 / torch.pow(
        params["rope_theta"], torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim
    )
    if params.get("use_scaled_rope"):
        frequencies = torch.stack([scaled_frequency(f) for f in frequencies])
    table = torch.outer(torch.arange(2 * length + 5, dtype=torch.float32), frequencies)
    turns = torch.polar(torch.ones_like(table), table)[:length].view(1, length, 1, head_dim // 2)

    def turned(x):  # [B, T, heads, head_dim]
        pairs = torch.view_as_complex(x.float().reshape(batch, length, -1, head_dim // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)

    def for_every_query_head(x):  # [B, T, n_kv_heads, head_dim] -> [B, T, n_heads, head_dim]
        return torch.repeat_interleave(x, n_heads // n_kv_heads, dim=2)

    mask = torch.triu(torch.full((length, length), float("-inf")), diagonal=1).to(dtype)
    h = F.embedding(tokens, weights["tok_embeddings.weight"])
    for i in range(params["n_layers"]):
        w = {
            name.split(".")[-2]: weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{i}.")
        }
        x = norm(h, w["attention_norm"])
        q = turned(F.linear(x, w["wq"]).view(batch, length, n_heads, head_dim))
        k = turned(F.linear(x, w["wk"]).view(batch, length, n_kv_heads, head_dim))
        v = F.linear(x, w["wv"]).view(batch, length, n_kv_heads, head_dim)
        q = q.transpose(1, 2)
        k, v = for_every_query_head(k).transpose(1, 2), for_every_query_head(v).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(head_dim) + mask
        shares = F.softmax(scores.float(), dim=-1).type_as(q)
        out = torch.matmul(shares, v).transpose(1, 2).contiguous().view(batch, length, -1)
        h = h + F.linear(out, w["wo"])
        x = norm(h, w["ffn_norm"])
        h = h + F.linear(F.silu(F.linear(x, w["w1"])) * F.linear(x, w["w3"]), w["w2"])
    return F.linear(norm(h, weights["norm.weight"]), weights["output.weight"]).float()


def scaled_frequency(frequency, factor=8, low=1, high=4, old_context=8192):
    """Llama 3.1's rule for one frequency of RoPE, case by case."""
    wavelength = 2 * math.pi / frequency
    if wavelength < old_context / high:
        return frequency
    if wavelength > old_context / low:
        return frequency / factor
    smooth = (old_context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def numpy_float64(tokens, weights, params):
    """Logits [T, vocab_size] of one sequence, in double precision."""
    w = {name: weight.double().numpy() for name, weight in weights.items()}
    dim, n_heads = params["dim"], params["n_heads"]
    n_kv_heads = params.get("n_kv_heads") or n_heads
    head_dim = dim // n_heads

    def norm(x, weight):
        return x / math.sqrt(np.mean(x * x) + params["norm_eps"]) * weight

    def turned(head, position):  # pairs (2i, 2i + 1), turned by position * frequency
        out = np.empty_like(head)
        for i in range(head_dim // 2):
            frequency = params["rope_theta"] ** (-2 * i / head_dim)
            if params.get("use_scaled_rope"):
                frequency = scaled_frequency(frequency)
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            x, y = head[2 * i], head[2 * i + 1]
            out[2 * i], out[2 * i + 1] = x * cos - y * sin, x * sin + y * cos
        return out

    hidden = [w["tok_embeddings.weight"][token] for token in tokens]
    for layer in range(params["n_layers"]):
        a, f = f"layers.{layer}.attention", f"layers.{layer}.feed_forward"
        keys, values = [], []
        for position in range(len(tokens)):
            x = norm(hidden[position], w[f"layers.{layer}.attention_norm.weight"])
            q = (w[f"{a}.wq.weight"] @ x).reshape(n_heads, head_dim)
            k = (w[f"{a}.wk.weight"] @ x).reshape(n_kv_heads, head_dim)
            values.append((w[f"{a}.wv.weight"] @ x).reshape(n_kv_heads, head_dim))
            keys.append([turned(head, position) for head in k])
            heads = []
            for h in range(n_heads):
                query, shared = turned(q[h], position), h // (n_heads // n_kv_heads)
                scores = np.array([query @ key[shared] for key in keys]) / math.sqrt(head_dim)
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                heads.append(sum(s * v[shared] for s, v in zip(shares, values, strict=True)))
            hidden[position] = hidden[position] + w[f"{a}.wo.weight"] @ np.concatenate(heads)
        for position in range(len(tokens)):
            x = norm(hidden[position], w[f"layers.{layer}.ffn_norm.weight"])
            gate = w[f"{f}.w1.weight"] @ x
            inner = gate / (1 + np.exp(-gate)) * (w[f"{f}.w3.weight"] @ x)
            hidden[position] = hidden[position] + w[f"{f}.w2.weight"] @ inner
    return np.stack([w["output.weight"] @ norm(x, w["norm.weight"]) for x in hidden])


def texts():
    """Some hundred strings: scripts, code, white space, and random characters of many blocks."""
    fixed = [
        "Hello, world! It's 2026: I'd say we'll've DONE 1234567 things\u2026",
        "Straße, naïve café, e\u0301 and \u00e9, Å and A\u030a",
        "你好，世界。今天是2026年11月25日。日本語テキスト、한국어 문장",
        "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ١٢٣",
        "नमस्ते दुनिया १२३, สวัสดีชาวโลก, Ⅻ ½ ²³ ① 𝟘",
        "def f(x):\n\treturn {k: v for k, v in x.items() if v >= 0x1F}  # done\r\n\r\n",
        'for (int i = 0; i < 10; ++i) { a[i] += i*2; }\n\n\n    <div class="x">&nbsp;</div>',
        "   leading, trailing   ",
        "\n",
        " ",
        "\t\t x",
        "a\u00a0b\u2003c\u3000d\u0085e\u200bf",
        "",
        "👩‍👩‍👧‍👦 🇩🇪 🧑🏽‍🚀 \u0000\u0001\u007f",
        "x" * 300,
        "1" * 50,
        " " * 70,
        "\n \n  \n   12 \n",
        "'s 'S 't 'RE don't DON'T 'llama",
        "a  1",
        "7 8  9   10",
        "€100, 50%, #1 @me $x_y-z",
    ]
    random = np.random.default_rng(0)
    blocks = [(32, 127), (160, 592), (880, 1424), (1424, 1792), (2304, 2432), (3584, 3712)]
    blocks += [(8192, 8304), (12288, 12544), (19968, 20480), (44032, 44544), (127744, 128512)]
    for _ in range(300):
        parts = []
        for _ in range(random.integers(1, 6)):
            low, high = blocks[random.integers(len(blocks))]
            parts.append("".join(map(chr, random.integers(low, high, random.integers(1, 9)))))
        fixed.append(random.choice([" ", "", "\n", "  "]).join(parts))
    return fixed
