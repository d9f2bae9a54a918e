"""GGUF files, run as they are, against transformers; and headers that mean harm."""

import math
import re
import shutil
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import SMALL, apart, peak_of, random_weights
from other_formats import SIZES, TOKENS, hf_model, logits_of, refused, write_gguf

import formats
import llama3
from formats.blocks import Blocks


def small_config(**params):
    small = SMALL | {"dim": 32, "vocab_size": 96, "multiple_of": 16, "rope_theta": 1e4}
    return llama3.config_from_params(small | {"max_seq_len": 256} | params)


def small_gguf(path, **more):
    config = small_config()
    return write_gguf(path, random_weights(config), config, **more)


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "IQ4_NL"])
def test_logits_of_a_gguf_file_equal_those_of_transformers(tmp_path, kind):
    import transformers

    config = small_config(dim=256, n_heads=8, ffn_dim=256)
    path = write_gguf(tmp_path / "model.gguf", random_weights(config), config, kind)
    source = formats.open(path)
    assert source.config == config
    weights = source.load_weights(dtype=torch.float32)
    types = {w.kind if isinstance(w, Blocks) else w.dtype for w in weights.values()}
    types -= {torch.float32}  # of norms
    as_stored = {"F32": set(), "F16": {torch.float16}, "Q8_0": {"Q8_0"}, "Q4_K": {"Q4_K"}}
    assert types == as_stored.get(kind, {torch.bfloat16})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    if kind == "IQ4_NL":  # which is made bfloat16 here
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.dim() == 2):
                parameter.copy_(parameter.bfloat16())
    assert apart(llama3.forward(TOKENS, weights, source.config), logits_of(model)) < 1e-4


def test_a_folder_with_one_gguf_file_will_do(tmp_path):
    path = small_gguf(tmp_path / "any name.gguf")
    assert formats.open(tmp_path).config == small_config()
    shutil.copy(path, tmp_path / "b.gguf")
    refused(tmp_path, "found several GGUF files (any name.gguf, b.gguf); name one of them")


@pytest.mark.parametrize("kind", ["qwen2", "qwen2, tied"])
def test_gguf_has_hugging_faces_order_for_qwen2(tmp_path, kind):
    """And biases. transformers reads it so, too."""
    import transformers

    model = hf_model(kind)
    model.save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    weights = {name: stored.parts()[0] for name, stored in source.stored.items()}
    for name, w in weights.items():
        if "attention.wq" in name or "attention.wk" in name:  # neighbours go half a head apart
            heads = w.unflatten(0, (-1, 8))
            weights[name] = torch.cat([heads[:, ::2], heads[:, 1::2]], dim=1).flatten(0, 1)
    path = write_gguf(tmp_path / "model.gguf", weights, source.config, family="qwen2")
    again = formats.open(path)
    assert again.config == source.config
    assert ("output.weight" in again.stored) == (kind == "qwen2")
    logits = llama3.forward(TOKENS, again.load_weights(), again.config)
    assert apart(logits, logits_of(model)) < 1e-4
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    assert apart(logits_of(read), logits_of(model)) < 1e-4


@pytest.mark.parametrize("kind", ["scaled", "scaled as Meta's"])
def test_rope_freqs_of_a_gguf_file_are_obeyed(tmp_path, kind):
    """llama.cpp's converter writes what each frequency is divided by."""
    import transformers

    model = hf_model(kind)
    model.save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    theta = model.config.rope_parameters["rope_theta"]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | rope))
    inv_freq = model.model.rotary_emb.inv_freq
    divisors = (plain.model.rotary_emb.inv_freq / inv_freq).numpy()
    assert divisors.max() > 5
    path = write_gguf(
        tmp_path / "model.gguf",
        source.load_weights(),
        source.config,
        change={"add_tensor": ("rope_freqs.weight", divisors)},
    )
    again = formats.open(path)
    assert (again.config.rope_scaling_factor == 32) == (kind == "scaled as Meta's")
    assert (again.config.rope_divisors is None) == (kind == "scaled as Meta's")
    assert torch.allclose(llama3.rope_frequencies(again.config), inv_freq, rtol=1e-5)
    logits = llama3.forward(TOKENS, again.load_weights(), again.config)
    assert apart(logits, logits_of(model)) < 1e-4


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_what_is_not_quantized_is_mapped_and_not_copied(tmp_path, kind):
    """A number that is written to the file later is seen in the weight."""
    path = small_gguf(tmp_path / "model.gguf", kind=kind)
    source = formats.open(path)
    assert not any(stored.is_copy for stored in source.stored.values())
    assert source.bytes_needed(torch.device("cpu"), torch.float32) == 0
    weights = source.load_weights(dtype=torch.float32)
    for name in ("layers.1.feed_forward.w2.weight", "tok_embeddings.weight"):
        w = weights[name]
        content = w.clone().view(torch.uint8).numpy().tobytes()
        with path.open("r+b") as file:
            file.seek(path.read_bytes().index(content))
            file.write(torch.full_like(w, 7).view(torch.uint8).numpy().tobytes())
        assert (w == 7).all()


def test_quantized_matrices_are_mapped_as_they_are(tmp_path):
    config = small_config()
    source = formats.open(small_gguf(tmp_path / "model.gguf", kind="Q8_0"))
    assert not any(stored.is_copy for stored in source.stored.values())
    shapes = [shape for shape in llama3.weight_shapes(config).values() if len(shape) == 2]
    numbers = sum(math.prod(shape) for shape in shapes)
    table = config.vocab_size * config.dim  # of which only some rows are looked up
    needed = source.bytes_needed(torch.device("cpu"), torch.float32)
    assert needed == (numbers - table) / 32 * 34
    assert source.bytes_needed(torch.device("cuda"), torch.float32) > numbers / 32 * 34
    assert source.found.endswith("million weights in Q8_0")


def test_types_without_blocks_here_are_made_bfloat16(tmp_path):
    source = formats.open(small_gguf(tmp_path / "model.gguf", kind="IQ4_NL"))
    assert source.found.endswith("million weights in IQ4_NL, partly made bfloat16")
    assert source.stored["output.weight"].is_copy


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_output_is_in_the_same_blocks(tmp_path, device):
    config = small_config(vocab_size=128)
    weights = random_weights(config)
    del weights["output.weight"]
    source = formats.open(write_gguf(tmp_path / "model.gguf", weights, config, "Q8_0"))
    loaded = source.load_weights(device)
    table, output = loaded["tok_embeddings.weight"], loaded["output.weight"]
    assert table.shape == output.shape == (128, 32)
    assert table.raw.device.type == output.raw.device.type == device
    if device == "cpu":
        assert torch.equal(table.raw, output.raw)
        assert table.raw.data_ptr() != output.raw.data_ptr(), (
            "pages of the output can be given back"
        )


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rope_of_a_gguf_file_is_that_of_transformers(tmp_path, kind):
    """By the keys that llama.cpp's converter writes."""
    model = hf_model(kind)
    model.save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    rope = model.config.rope_parameters
    change = {"add_rope_scaling_type": (gguf.RopeScalingType(kind),)}
    change |= {"add_rope_scaling_factor": (rope["factor"],)}
    if kind == "yarn":
        change["add_rope_scaling_orig_ctx_len"] = (rope["original_max_position_embeddings"],)
    weights = source.load_weights(dtype=torch.float32)
    path = write_gguf(tmp_path / "model.gguf", weights, source.config, change=change)
    again = formats.open(path)
    assert again.config.rope_attention_factor == source.config.rope_attention_factor
    logits = llama3.forward(TOKENS, again.load_weights(dtype=torch.float32), again.config)
    assert apart(logits, logits_of(model)) < 1e-4
    change = {"add_float32": ("llama.rope.scale_linear", rope["factor"])}  # of older files
    again = formats.open(write_gguf(path, weights, source.config, change=change))
    assert max(again.config.rope_divisors) == min(again.config.rope_divisors) == rope["factor"]


def test_what_a_file_says_of_attention_comes_on_top_of_yarns_own(tmp_path):
    change = {"add_rope_scaling_type": (gguf.RopeScalingType.YARN,)}
    change |= {"add_rope_scaling_factor": (4.0,), "add_rope_scaling_attn_factors": (0.5,)}
    config = formats.open(small_gguf(tmp_path / "model.gguf", change=change)).config
    assert config.rope_attention_factor == pytest.approx(0.5 * (1 + 0.1 * math.log(4)))


def test_qwen3_has_norms_of_heads_in_hugging_faces_order(tmp_path):
    """As llama.cpp has it; transformers reads no `head_dim` from such a file."""
    model = hf_model("qwen3")
    model.save_pretrained(tmp_path / "hf")
    source = formats.open(tmp_path / "hf")
    weights = {
        name: w.unflatten(0, (-1, 6, 2)).transpose(1, 2).flatten(0, 2)
        if re.search(r"attention\.(w[qk]|[qk]_norm)\.", name)
        else w
        for name, w in source.load_weights(dtype=torch.float32).items()
    }
    change = {"add_key_length": (12,), "add_value_length": (12,)}
    path = write_gguf(
        tmp_path / "model.gguf", weights, source.config, family="qwen3", change=change
    )
    again = formats.open(path)
    logits = llama3.forward(TOKENS, again.load_weights(dtype=torch.float32), again.config)
    assert apart(logits, logits_of(model)) < 1e-4


def test_lists_of_the_same_number_are_that_number(tmp_path):
    change = {"add_head_count_kv": ([2, 2],), "add_feed_forward_length": ([64, 64],)}
    config = small_config(n_kv_heads=2, ffn_dim=64)
    path = write_gguf(tmp_path / "model.gguf", random_weights(config), config, change=change)
    assert formats.open(path).config == config


# --- several files --------------------------------------------------------------------------------


def split_gguf(folder, n=3):
    """A small model in n files, as llama.cpp's gguf-split writes them."""
    config = small_config()
    weights = random_weights(config)
    names, paths = sorted(weights), []
    for i in range(n):
        path = folder / f"small-{i + 1:05}-of-{n:05}.gguf"
        change = {"add_uint16": ("split.no", i)}
        some = {name: weights[name] for name in names[i::n]}
        paths.append(write_gguf(path, some, config, change=change, split=(n, len(weights))))
    return config, weights, paths


def test_a_model_in_several_files_is_named_by_any_of_them_or_the_folder(tmp_path):
    config, weights, paths = split_gguf(tmp_path)
    for path in (*paths, tmp_path):
        source = formats.open(path)
        assert source.config == config
        loaded = source.load_weights(dtype=torch.float32)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_parts_that_are_missing_or_of_another_model_are_named(tmp_path):
    _, _, paths = split_gguf(tmp_path)
    paths[1].rename(tmp_path / "aside")
    refused(paths[0], f"{paths[1]}: is missing, which is a part of the model")
    shutil.copy(paths[2], paths[1])
    refused(paths[0], f"{paths[1]}: is not the part 2 of the model")
    small_gguf(paths[1])
    refused(paths[0], f"{paths[1]}: is not the part 2 of the model")
    (tmp_path / "aside").rename(paths[1])
    (tmp_path / "other").mkdir()
    _, _, others = split_gguf(tmp_path / "other", n=2)
    refused(others[0].rename(tmp_path / "small.gguf"), "it says that it is one of 2 files")
    small_gguf(tmp_path / "b.gguf")
    refused(tmp_path, "found several GGUF files")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"add_string": ("llama.rope.scaling.type", "longrope")}, '"rope_type" is "longrope"'),
        ({"add_float32": ("llama.rope.scaling.x", 2.0)}, '"llama.rope.scaling.x" is 2.0'),
        (
            {"add_float32": ("llama.rope.scale_linear", 2.0)}
            | {"add_tensor": ("rope_freqs.weight", np.full(4, 2, np.float32))},
            '"rope.scaling.type" is "linear"',
        ),
        ({"add_uint32": ("llama.attention.sliding_window", 9)}, 'sliding_window" is 9'),
        ({"add_array": ("llama.expert_count", [8, 8])}, '"expert_count" is 8'),
        ({"add_array": ("llama.x", [1, 2])}, '"llama.x" is [1, 2]'),
        ({"add_uint32": ("llama.expert_count", 8)}, '"expert_count" is 8'),
        ({"add_bool": ("llama.attention.causal", False)}, '"attention.causal" is false'),
        ({"add_key_length": (32,)}, '"rope.dimension_count" is 8'),
        ({"add_uint16": ("split.count", 3)}, "it says that it is one of 3 files"),
        ({"add_string": ("llama.no_such_key", "x")}, ""),  # is of no consequence
        ({"add_tensor": ("rope_freqs.weight", np.ones(3, np.float32))}, "expected 4 divisors"),
        ({"add_tensor": ("rope_freqs.weight", np.zeros(4, np.float32))}, "expected 4 divisors"),
        ({"add_tensor": ("blk.0.attn_q_norm.weight", np.ones(8, np.float32))}, "contradicts llama"),
        (
            {"add_tensor": ("blk.0.ffn_gate_exps.weight", np.ones((2, 2, 2), np.float32))},
            "found blk.0.ffn_gate_exps.weight, which is no weight of a model known here",
        ),
        (
            {"add_tensor": ("blk.0.attn_q.bias", np.ones(32, np.float32))},
            "blk.1.attn_q.bias is missing",
        ),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, change, says):
    path = small_gguf(tmp_path / "model.gguf", change=change)
    refused(path, says) if says else formats.open(path)


def test_another_architecture_is_refused(tmp_path):
    path = small_gguf(tmp_path / "model.gguf", family="gemma")
    refused(path, '"general.architecture" is "gemma", which is not computed here')


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = small_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, "pip install gguf")


# --- the header, written down again ---------------------------------------------------------------

U8, U32, F32, TEXT, LIST, F64 = 0, 4, 6, 8, 9, 12  # types of values
SHAPES = {  # of a Llama whose dim, ffn_dim and head_dim are 8, 8 and 4, in GGUF's order
    "token_embd.weight": (8, 6),
    "output.weight": (8, 6),
    "output_norm.weight": (8,),
    **{f"blk.0.{name}_norm.weight": (8,) for name in ("attn", "ffn")},
    **{f"blk.0.attn_{name}.weight": (8, 8) for name in ("q", "k", "v", "output")},
    **{f"blk.0.ffn_{name}.weight": (8, 8) for name in ("gate", "up", "down")},
}


def text(content):
    return struct.pack("<Q", len(content)) + content.encode()


def field(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def number(key, value):
    return field(f"llama.{key}", U32, struct.pack("<I", value))


FIELDS = [
    field("general.architecture", TEXT, text("llama")),
    *(number(key, 8) for key in ("embedding_length", "feed_forward_length", "context_length")),
    number("block_count", 1),
    number("attention.head_count", 2),
    field("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
]


def gguf_bytes(more=(), version=3, n_fields=None, n_tensors=None, alignment=32, **changed):
    """A GGUF file of zeros, and the length of its header.

    more: fields of it. changed: by the name of a weight of the layer, its dimensions, type and
    offset as bytes.
    """
    fields, tensors, offset = [*FIELDS, *more], [], 0
    for name, shape in SHAPES.items():
        entry = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        tensors.append(text(name) + changed.get(name.split(".")[-2], entry))
        offset += -(-4 * int(np.prod(shape)) // alignment) * alignment
    counts = [len(tensors) if n_tensors is None else n_tensors]
    counts += [len(fields) if n_fields is None else n_fields]
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*fields, *tensors])
    return header + bytes(-len(header) % alignment + offset), len(header)


def test_the_smallest_file_is_read(tmp_path):
    """Fields of other programs may be there, and any alignment of the numbers."""
    path = tmp_path / "model.gguf"
    others = [field("a", LIST, struct.pack("<IQ3B", U8, 3, 1, 2, 3)), field("b", TEXT, text(""))]
    aligned = field("general.alignment", U32, struct.pack("<I", 64))
    for content, _ in (gguf_bytes(), gguf_bytes(others), gguf_bytes([aligned], alignment=64)):
        path.write_bytes(content)
        config = formats.open(path).config
        assert (config.dim, config.ffn_dim, config.head_dim, config.vocab_size) == (8, 8, 4, 6)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    content, header = gguf_bytes()
    lengths = [*range(header + 1), (header + len(content)) // 2, len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        refused(path, "not a whole GGUF file" if length > 3 else "expected a GGUF file")


def with_tensor(shape=(8, 8), kind=0, offset=0):
    return gguf_bytes(ffn_up=struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))


def with_alignment(kind, *value):
    return gguf_bytes([field("general.alignment", kind, struct.pack(*value))])


BAD_HEADERS = {
    "version 1": gguf_bytes(version=1),
    "a big-endian file": gguf_bytes(version=3 << 24),
    "2**63 tensors": gguf_bytes(n_tensors=2**63),
    "2**63 fields": gguf_bytes(n_fields=2**63),
    "a field less than said": gguf_bytes(n_fields=len(FIELDS) + 1),
    "a key of 2**63 bytes": gguf_bytes([struct.pack("<Q", 2**63)]),
    "a text of 2**62 bytes": gguf_bytes([field("a", TEXT, struct.pack("<Q", 2**62))]),
    "2**60 numbers": gguf_bytes([field("a", LIST, struct.pack("<IQ", U8, 2**60))]),
    "2**20 texts": gguf_bytes([field("a", LIST, struct.pack("<IQ", TEXT, 2**20))]),
    "an unknown type": gguf_bytes([field("a", 13, b"")]),
    "a list of lists": gguf_bytes([field("a", LIST, struct.pack("<IQ", LIST, 1))]),
    "an architecture that is a number": gguf_bytes([field("general.architecture", U8, b"1")]),
    "an eps that is a text": gguf_bytes(
        [field("llama.attention.layer_norm_rms_epsilon", TEXT, text("1e-5"))]
    ),
    "an eps that is a list": gguf_bytes(
        [
            field(
                "llama.attention.layer_norm_rms_epsilon",
                LIST,
                struct.pack("<IQff", F32, 2, 1e-5, 1e-6),
            )
        ]
    ),
    "a head count for each layer": gguf_bytes(
        [field("llama.attention.head_count", LIST, struct.pack("<IQII", U32, 2, 2, 1))]
    ),
    "alignment 0": with_alignment(U32, "<I", 0),
    "alignment 7": with_alignment(U32, "<I", 7),
    "alignment -32": with_alignment(5, "<i", -32),
    "alignment 32.0": with_alignment(F32, "<f", 32),
    "alignment inf": with_alignment(F64, "<d", float("inf")),
    "alignment nan": with_alignment(F64, "<d", float("nan")),
    "alignment as a text": with_alignment(TEXT, "<Q2s", 2, b"32"),
    "no dimensions": with_tensor(()),
    "nine dimensions": with_tensor((8, 8, *[1] * 7)),
    "2**31 dimensions": gguf_bytes(ffn_up=struct.pack("<I2QIQ", 2**31, 8, 8, 0, 0)),
    "a dimension of 0": with_tensor((8, 0)),
    "a dimension of 2**63": with_tensor((8, 2**63)),
    "a product that overflows": with_tensor((2**32, 2**32)),
    "half a block": with_tensor((8, 8), kind=8),
    "an unknown type of numbers": with_tensor(kind=9999),
    "numbers that are not dequantized": with_tensor(kind=24),
    "an offset of 2**40": with_tensor(offset=2**40),
    "an offset of 2**63": with_tensor(offset=2**63),
    "an offset that is not aligned": with_tensor(offset=3),
}


@pytest.mark.parametrize("damage", BAD_HEADERS)
def test_a_header_that_cannot_be_is_refused_at_once(tmp_path, damage):
    path = tmp_path / "model.gguf"
    path.write_bytes(BAD_HEADERS[damage][0])
    peak = peak_of(lambda: refused(path))
    assert peak < 2e7


@pytest.mark.parametrize("what", ["a text of 2**26 bytes", "a list of 10**8 numbers"])
def test_a_long_value_that_no_one_asked_for_takes_no_memory(tmp_path, what):
    """It lies in the hole of a sparse file."""
    path, n = tmp_path / "model.gguf", 2**26
    value = struct.pack("<Q", n)
    if "list" in what:
        value = struct.pack("<IQ", U8, 10**8)
    start, _ = gguf_bytes(n_tensors=0, n_fields=len(FIELDS) + 1)
    start = start[: 24 + sum(map(len, FIELDS))]
    path.write_bytes(start + field("a", LIST if "list" in what else TEXT, value))
    with path.open("r+b") as file:
        file.truncate(2**29)
    assert peak_of(lambda: refused(path)) < 1e8
