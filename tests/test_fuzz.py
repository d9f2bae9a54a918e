"""Mutated files, random options and any prompt: a right result, or one line and status 2.

Seven kinds of cases, each as many as the Hypothesis profile says: 100 by default, 10,000 with
`--hypothesis-profile long` (see README.md here). A case runs the whole program in this process, on
a copy of a model so small that it takes a few milliseconds.
"""

import base64
import contextlib
import io
import json
import math
import re
import shutil

import pytest
import torch
from conftest import compressed, config_of, random_weights
from hypothesis import given, note
from hypothesis import strategies as st
from other_formats import write_gguf

import formats
import llama3
import tokenizer_setup
from cli.main import main
from formats import convert
from formats.errors import CheckpointError
from formats.text import BYTE_OF

PARAMS = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "vocab_size": 512,
    "multiple_of": 16,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint whose vocabulary is the single bytes; the folder is not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    weights = random_weights(config_of(folder, **PARAMS), torch.bfloat16)
    weights["output.weight"][256:] = 0  # no special token is the likeliest: none ends a completion
    torch.save(weights, folder / "consolidated.00.pth")
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """A copy of it, of which each case writes one file anew."""
    return shutil.copytree(made, tmp_path_factory.mktemp("fuzz") / "changed")


@pytest.fixture(autouse=True)
def whole_again(made, folder):
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    shutil.copytree(made, folder, dirs_exist_ok=True)


def run(folder, *arguments):
    """The status of the program and what it wrote to each stream, which hold what they may."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["--ckpt-dir", str(folder), "--device", "cpu", *arguments])
    out, err = out.getvalue(), err.getvalue()
    note(err)
    lines = err.split("\n")
    assert lines.pop() == ""
    assert all(line.startswith(("llama3.py: ", "{")) and line.isprintable() for line in lines)
    errors = [line for line in lines if line.startswith("llama3.py: error: ")]
    if status == 2:
        assert errors == lines[-1:]
        assert len(errors[0]) < 700 + len(str(folder))
        later = re.search(r"logits of new token ([2-9]) are not finite", err)
        assert len(out) == (int(later[1]) - 1 if later else 0)  # what was written stays
    else:
        assert (status, errors) == (0, [])
    return status, out, err


COMPLETE = ["--prompt", "ab", "--max-new-tokens", "2"]


@st.composite
def edited(draw, content):
    """`content` with some bytes changed, left out, doubled or put in, or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = len(changed)
        places = [st.integers(0, end), st.integers(0, min(end, 2000))]
        places.append(st.integers(max(end - 3000, 0), end))  # the directory of a zip archive
        at = draw(st.one_of(places))
        how = draw(st.sampled_from(["flip", "flip", "set", "leave out", "put in", "double", "cut"]))
        if how == "flip" and at < end:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            new = draw(st.binary(min_size=1, max_size=8))
            changed[at : at + len(new)] = new
        elif how == "leave out":
            del changed[at : at + draw(st.integers(1, 40))]
        elif how == "put in":
            changed[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif how == "double":
            changed[at:at] = changed[at : at + draw(st.integers(1, 40))]
        elif how == "cut":
            del changed[at:]
    return bytes(changed)


# --- params.json ----------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 600),
    st.sampled_from([2**31, 2**63, 10**40, -1, 0, 1]),
    st.floats(),
    st.floats(0, 2),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
POSSIBLE = {  # values that such a model may have, if not always this one
    "n_kv_heads": st.sampled_from([1, 2, None]),
    "vocab_size": st.just(-1),
    "multiple_of": st.sampled_from([1, 2, 16, 32, 48, 96]),
    "ffn_dim_multiplier": st.floats(0.9, 1.2),
    "norm_eps": st.floats(1e-12, 1),
    "rope_theta": st.floats(1, 1e12) | st.integers(1, 10**6),
    "use_scaled_rope": st.booleans(),
    "rope_scaling_factor": st.floats(1, 1e6) | st.integers(1, 32),
    "head_dim": st.sampled_from([16, None]),
    "ffn_dim": st.sampled_from([96, None]),
    "rope_divisors": st.lists(st.floats(1, 32), min_size=8, max_size=8),
    "max_seq_len": st.integers(64, 10**6),
}
KEYS = st.one_of(
    st.sampled_from(sorted({*llama3.Config._fields, *llama3.PARAMS, "rope_scaling", "lora_args"})),
    st.text(max_size=9),
)


@st.composite
def params_files(draw):
    params = dict(PARAMS)
    for key in draw(st.lists(st.sampled_from([*params]), max_size=1)):
        del params[key]
    params |= draw(st.fixed_dictionaries({}, optional=POSSIBLE))
    params |= draw(st.dictionaries(KEYS, VALUES, max_size=1))
    text = json.dumps(
        params, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([0, 2]))
    )
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32-le"]))
    content = text.encode(encoding, "surrogatepass")
    return draw(edited(content)) if draw(st.booleans()) else content


def one_number(value):
    """A value of params.json or Config, so that 1 and 1.0 are equal, and True is neither."""
    if isinstance(value, list | tuple):
        return [float(number) for number in value]
    return value if isinstance(value, bool | None) else float(value)


@given(content=params_files())
def test_params(folder, content):
    """What is accepted has the values that the file gives, and fits the weights."""
    (folder / "params.json").write_bytes(content)
    status, out, _ = run(folder, *COMPLETE)
    if status == 0:
        assert len(out.encode()) >= 2
        params, config = json.loads(content), formats.open(folder).config
        scaled = bool(params.get("use_scaled_rope"))
        follows = {"n_kv_heads": config.n_heads, "head_dim": 16, "ffn_dim": 96}
        follows |= {"rope_scaling_factor": 8 if scaled else None, "rope_divisors": None}
        follows |= {"rope_attention_factor": 1.0}
        follows |= {"max_seq_len": 131072 if scaled else 8192}
        if params["vocab_size"] == -1:
            params["vocab_size"] = PARAMS["vocab_size"]
        for key, value in config._asdict().items():
            given = params.get(key) if params.get(key) is not None else follows[key]
            assert one_number(value) == one_number(given), key
        assert (config.dim, config.n_layers, config.vocab_size) == (32, 1, 512)


# --- consolidated.00.pth --------------------------------------------------------------------------


@given(data=st.data())
def test_bytes_of_a_checkpoint(made, folder, data):
    """What is accepted is what PyTorch reads without mapping it, and of the right shapes."""
    content = data.draw(edited((made / "consolidated.00.pth").read_bytes()))
    path = folder / "consolidated.00.pth"
    path.unlink(missing_ok=True)  # for what is mapped of it still
    path.write_bytes(content)
    status, _, err = run(folder, *COMPLETE)
    config = llama3.load_config(folder)
    try:
        weights = llama3.load_weights(folder, config, dtype=torch.bfloat16)
    except CheckpointError:
        assert status == 2
        return
    assert status == 0 or "not finite" in err or "memory" in err
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError:  # damage between the records, which only shows where all is read
        return
    for name, shape in llama3.weight_shapes(config).items():
        expected = read[name] if len(shape) == 2 else read[name].bfloat16()
        assert weights[name].shape == shape
        assert torch.equal(weights[name].view(torch.uint8), expected.view(torch.uint8))


CHANGES = {  # what is done to a weight, and whether the model can still be run
    "leave out": (lambda w: None, False),
    "float32": (lambda w: w.float(), True),
    "float16": (lambda w: w.half(), True),
    "a parameter": (lambda w: torch.nn.Parameter(w), True),
    "other strides": (lambda w: torch.stack([w, w], -1)[..., 0], True),
    "a part of more": (lambda w: torch.cat([w, w])[: len(w)], True),
    "float64": (lambda w: w.double(), False),
    "int8": (lambda w: w.to(torch.int8), False),
    "complex": (lambda w: w.to(torch.complex64), False),
    "a row less": (lambda w: w[1:], False),
    "a dimension more": (lambda w: w[None], False),
    "a number": (lambda w: 1.5, False),
    "a list": (lambda w: w[:2].tolist(), False),
    "no storage": (lambda w: w.to("meta"), False),
    "sparse": (lambda w: w.to_sparse(), False),
    "a number shown often": (
        lambda w: w.flatten()[:1].clone().expand(w.numel()).view(w.shape),
        True,
    ),
    "NaN": (lambda w: w * math.nan, False),
    "infinity": (lambda w: w + math.inf, False),
}
EXTRA = {  # a tensor more: its shape, and whether the model can still be run
    "rope.freqs": ((8,), True),
    "layers.0.attention.wv.bias": ((16,), True),
    "layers.0.attention.wq.bias": ((16,), False),
    "layers.0.attention_norm.bias": ((32,), False),
    "tok_embeddings.bias": ((512,), False),
    "layers.1.attention.wq.weight": ((32, 32), False),
    "": ((2,), False),
    "\n\x1b": ((2,), False),
    3: ((2,), False),
}


@given(data=st.data())
def test_contents_of_a_checkpoint(made, folder, data):
    """Accepted is what the model can be run with, and nothing else, in any of PyTorch's formats."""
    original = torch.load(made / "consolidated.00.pth", weights_only=True)
    weights, usable = dict(original), True
    chosen = st.dictionaries(st.sampled_from([*original]), st.sampled_from([*CHANGES]), max_size=3)
    changes = data.draw(chosen)
    for name, change in changes.items():
        function, keeps = CHANGES[change]
        weights[name] = function(weights[name])
        if weights[name] is None:
            del weights[name]
            keeps = name == "output.weight"  # then it is tied
        usable &= keeps
    for name in data.draw(st.sets(st.sampled_from([*EXTRA]), max_size=1)):
        shape, keeps = EXTRA[name]
        weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        usable &= keeps
    path = folder / "consolidated.00.pth"
    path.unlink(missing_ok=True)
    form = data.draw(st.sampled_from(["zip", "zip", "zip", "compressed", "old"]))
    torch.save(weights, path, _use_new_zipfile_serialization=form != "old")
    if form == "compressed":
        compressed(path)
    usable &= form == "zip"  # what can be mapped
    dtype = data.draw(st.sampled_from([[], ["--dtype", "float32"], ["--dtype", "bfloat16"]]))
    status, _, _ = run(folder, *COMPLETE, *dtype)
    assert status == (0 if usable else 2)
    if usable:
        loaded = llama3.load_weights(folder, llama3.load_config(folder), dtype=torch.float32)
        read = torch.load(path, weights_only=True)
        for name in original:
            expected = read.get(name, read["tok_embeddings.weight"])
            assert torch.equal(loaded[name].float(), expected.float())


# --- tokenizer.model ------------------------------------------------------------------------------


@st.composite
def vocabularies(draw, content):
    lines = content.splitlines(keepends=True)
    merged = draw(st.lists(st.binary(min_size=1, max_size=3), max_size=4))
    for rank, token in enumerate(merged, start=len(lines)):
        lines.append(b"%s %d\n" % (base64.b64encode(token), rank))
    if draw(st.booleans()):
        lines = [lines[i] for i in draw(st.permutations(range(len(lines))))]
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(["edit", "another token", "leave out", "twice", "blank"]))
        if how == "edit":
            lines[i] = draw(edited(lines[i]))
        elif how == "another token":
            token = base64.b64encode(draw(st.binary(min_size=2, max_size=3)))
            rank = (lines[i].split() or [b"0"])[-1]
            lines[i] = token + b" " + rank + b"\n"
        else:
            lines[i] = {"leave out": b"", "twice": lines[i] * 2, "blank": b"\n"}[how]
    return b"".join(lines)


@given(data=st.data(), text=st.text())
def test_vocabularies(made, folder, data, text):
    """What is accepted spells every text, with as many tokens as the file has lines."""
    content = data.draw(vocabularies((made / "tokenizer.model").read_bytes()))
    (folder / "tokenizer.model").write_bytes(content)
    status, _, _ = run(folder, *COMPLETE)
    try:
        tokenizer = tokenizer_setup.load_tokenizer(folder / "tokenizer.model")
    except ValueError:
        assert status == 2
        return
    n_lines = sum(bool(line) for line in content.splitlines())
    assert tokenizer.n_vocab == n_lines + 256
    assert status == (0 if n_lines == 256 else 2), "the weights are for 512 tokens"
    text += "".join(map(chr, range(300)))
    assert tokenizer.decode(tokenizer_setup.encode(tokenizer, text, bos=False)) == text


# --- options and prompts --------------------------------------------------------------------------


def spelled(numbers, allowed):
    """Texts of numbers, each with whether it is allowed."""
    return numbers.map(lambda number: (str(number), allowed(number)))


WRONG = st.sampled_from(["", "x", "nan", "inf", "-inf", "1e400", "0x10", "1_", "٣x", "\n"])
OPTIONS = {
    "--max-new-tokens": spelled(
        st.integers(-2, 5) | st.just(1.0), lambda n: type(n) is int and n > 0
    ),
    "--max-seq-len": spelled(st.integers(-2, 9999), lambda n: n >= 1),
    "--temperature": spelled(st.floats(-1, 1e6) | st.integers(-1, 9), lambda x: x >= 0),
    "--top-k": spelled(st.integers(-2, 3), lambda k: k >= 0),
    "--min-p": spelled(st.floats(-0.5, 1.5), lambda p: 0 <= p <= 1),
    "--repetition-penalty": spelled(st.floats(-1, 3), lambda x: x >= 0.01),
    "--top-p": spelled(st.floats(-0.5, 1.5), lambda p: 0 <= p <= 1),
    "--threads": spelled(st.integers(-1, 3), lambda n: n >= 1),
    "--seed": spelled(st.integers(-9, 2**65), lambda n: 0 <= n < 2**63),
    "--dtype": st.sampled_from(
        [("float32", True), ("bfloat16", True), ("float16", True), ("int8", False), ("", False)]
    ),
    "--device": st.sampled_from(
        [("auto", True), ("cpu", True), ("tpu", False), ("cuda:-1", False), ("cuda:999", False)]
    ),
}


@st.composite
def option_lists(draw):
    """Arguments, and whether each of them is allowed."""
    arguments, right = [], True
    for option in draw(st.lists(st.sampled_from([*OPTIONS]), unique=True, max_size=4)):
        value, allowed = draw(OPTIONS[option])
        if draw(st.integers(0, 9)) == 0:
            value, allowed = draw(WRONG), False
        arguments += [f"{option}={value}"]
        right &= allowed
    return arguments, right


TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=st.characters(categories=["Cc", "Cf", "Zs", "Co"]), max_size=20),
    st.lists(st.sampled_from([*tokenizer_setup.SPECIAL_TOKENS[:12], " ", "a", "\n"])).map("".join),
    st.characters(codec="utf-8").flatmap(lambda c: st.integers(1, 300).map(lambda n: c * n)),
)


@given(options=option_lists(), prompt=TEXTS, in_a_file=st.booleans(), mark=st.booleans())
def test_options_and_prompts(made, folder, options, prompt, in_a_file, mark):
    """A prompt is any text, and is never a special token; the options say what is allowed."""
    arguments, right = options
    limits = [int(a.split("=")[1]) for a in arguments if a.startswith("--max-seq-len=") and right]
    n_tokens = 1 + len(prompt.encode())  # of this vocabulary
    if in_a_file:
        path = folder.parent / "prompt.txt"
        content = "\ufeff" * mark + prompt + "\n"  # a byte order mark and the line break go
        path.write_bytes(content.encode())
        asked = ["--prompt-file", str(path)]
        n_tokens -= prompt.endswith("\r") + 3 * (prompt.startswith("\ufeff") and not mark)
    else:
        asked = [f"--prompt={prompt}"]
    status, _, err = run(made, *asked, "--stats", "--max-new-tokens=3", *arguments)
    assert status == (0 if right and all(n_tokens <= n for n in limits) else 2)
    if status == 0:
        spells = any(name in prompt for name in tokenizer_setup.SPECIAL_TOKENS)
        assert ("which is treated as plain text" in err) == spells
        assert json.loads(err.splitlines()[-1])["prompt_tokens"] == n_tokens


# --- Hugging Face folders and GGUF files ----------------------------------------------------------

JSON_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.fixture(scope="module")
def sources(made, tmp_path_factory):
    """The same model as others keep it, in a Hugging Face folder and in a GGUF file."""
    base = tmp_path_factory.mktemp("sources")
    convert.to_hf(formats.open(made), base / "hf")
    (base / "gguf").mkdir()
    config = llama3.load_config(made)

    def vocabulary(writer):
        writer.add_tokenizer_pre("llama-bpe")
        tokens = sorted(BYTE_OF, key=BYTE_OF.get)
        writer.add_token_list([*tokens, *tokenizer_setup.SPECIAL_TOKENS])
        writer.add_token_types([1] * 256 + [3] * 256)
        writer.add_token_merges([])
        writer.add_bos_token_id(256)

    weights = llama3.load_weights(made, config, dtype=torch.bfloat16)
    write_gguf(base / "gguf" / "model.gguf", weights, config, tokens=vocabulary)
    write_gguf(base / "blocks.gguf", weights, config, kind="Q8_0", tokens=vocabulary)
    for folder in ("hf", "gguf"):
        assert main(["--ckpt-dir", str(base / folder), *COMPLETE]) == 0
    return base


def places(value, path=()):
    """Where in a value of JSON something can be put: of long lists, the first places."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, part in [*inner][:12]:
        yield from places(part, (*path, key))


@st.composite
def changed_json(draw, content):
    """`content` with a value replaced, left out or put in, or some bytes changed."""
    if draw(st.integers(0, 3)) == 0:
        return draw(edited(content))
    value = json.loads(content)
    *path, last = draw(st.sampled_from([*places(value)][1:]))
    inner = value
    for key in path:
        inner = inner[key]
    how = draw(st.sampled_from(["set", "set", "leave out", "put in"]))
    if how == "leave out":
        del inner[last]
    elif how == "put in" and isinstance(inner, dict):
        inner[draw(st.text(max_size=9))] = draw(VALUES)
    else:
        inner[last] = draw(VALUES)
    return json.dumps(value).encode()


def check_source(sources, source, same=True):
    """It runs or is refused, and what is written of it runs as it does, but for rounded blocks."""
    status, out, _ = run(source, *COMPLETE, "--dtype", "float32")
    target = sources / "converted"
    shutil.rmtree(target, ignore_errors=True)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        converted = convert.main([str(source), str(target)])
    note(err.getvalue())
    *lines, last = err.getvalue().split("\n")
    assert last == ""
    assert all(line.startswith("convert: ") and line.isprintable() for line in lines)
    assert [line.startswith("convert: error: ") for line in lines][-1] == (converted != 0)
    assert target.exists() == (converted == 0)
    assert not [*sources.glob(".*")]
    if converted == 0:
        found = run(target, *COMPLETE, "--dtype", "float32")[:2]
        assert found == (status, out) if same else found[0] == status
    else:
        assert (status, converted) == (2, 2)


@given(data=st.data())
def test_hugging_face_folders(sources, data):
    name = data.draw(st.sampled_from([*JSON_FILES, *JSON_FILES, "model.safetensors"]))
    content = (sources / "hf" / name).read_bytes()
    change = edited if name == "model.safetensors" else changed_json
    source = shutil.copytree(sources / "hf", sources / "changed", dirs_exist_ok=True)
    (source / name).write_bytes(data.draw(change(content)))
    check_source(sources, source)


@given(data=st.data())
def test_gguf_files(sources, data):
    name = data.draw(st.sampled_from(["gguf/model.gguf", "blocks.gguf"]))
    path = sources / "changed.gguf"
    path.write_bytes(data.draw(edited((sources / name).read_bytes())))
    check_source(sources, path, same=name != "blocks.gguf")
