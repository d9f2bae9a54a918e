"""The step that is built once: when, that it computes the same, how it is kept, what may fail."""

import functools
import logging
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import DEMO, apart, random_weights, with_biases
from program import SUM, run_main

import llama3
from cli import build, step

CPU32 = [*SUM, "--device", "cpu", "--dtype", "float32"]
BUILDING = "llama3.py: building the step of one token for this machine, which is done once\n"
FAILED = "llama3.py: the step of one token is not built, continuing without: "
PROMPTS = ([1024, 355, 261], [1024, 40, 32, 56, 258, 32], [5, 4, 3, 2, 1])


@pytest.fixture(scope="module")
def weights32(demo_config):
    return llama3.load_weights(DEMO, demo_config, dtype=torch.float32)


@pytest.fixture(scope="module")
def layer_part(weights32, demo_config):
    with torch.inference_mode():
        return step.layer_parts(weights32, demo_config)["layers.0"]


@pytest.fixture(scope="module")
def library(tmp_path_factory, layer_part):
    """The file of the demo's layer in float32, which is really built: it takes 10 to 20 s."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler is at hand")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("XDG_CACHE_HOME", str(home))
        with torch.inference_mode():
            build.build(layer_part)
    (file,) = (home / "llama3").iterdir()
    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for what is built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "llama3").mkdir(mode=0o700)
    return tmp_path / "llama3"


@pytest.fixture
def kept(cache, library):
    """The file of the demo's layer in that folder."""
    return Path(shutil.copy(library, cache))


# --- when -----------------------------------------------------------------------------------------


def test_steps_are_built_where_it_pays_or_is_asked_for(capsys, monkeypatch, cache, tried):
    assert run_main(capsys, *CPU32) == ("25.", "")  # the demo is small
    assert tried == []
    assert run_main(capsys, *CPU32, "--compile") == ("25.", BUILDING)
    assert [len(part.weights) for part in tried] == [9, 1]  # a layer, and the output
    monkeypatch.setattr(step, "BUILT_FROM_BYTES", 10**6)
    assert run_main(capsys, *CPU32) == ("25.", BUILDING)
    assert run_main(capsys, *CPU32[:-1], "bfloat16") == ("25.", BUILDING)
    assert len(tried) == 6
    for options in (["--no-compile"], ["--max-new-tokens", "1"], ["--prompt", "17 plus 8 is "]):
        run_main(capsys, *CPU32, *options)  # nothing, or no single tokens of one text
    (cache / "text").write_text("17 plus 8 is 25.")
    run_main(capsys, "--score", cache / "text", *CPU32[2:])
    (cache / "text").unlink()
    assert len(tried) == 6
    assert [*cache.iterdir()] == []


def test_without_a_compiler_a_large_model_runs_as_it_is(capsys, monkeypatch, cache, tried):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    line = f"{FAILED}there is no C++ compiler (g++ or clang++)\n"
    assert run_main(capsys, *CPU32, "--compile") == ("25.", line)
    monkeypatch.setattr(step, "BUILT_FROM_BYTES", 10**6)
    assert run_main(capsys, *CPU32) == ("25.", line)
    monkeypatch.setattr(shutil, "which", lambda name: name == "clang++")
    assert run_main(capsys, *CPU32) == ("25.", BUILDING)
    assert build.compiler() == "clang++"
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr(shutil, "which", lambda name: name in ("my-c++", "g++"))
    assert build.compiler() == "my-c++"


def test_what_is_there_is_used_unless_that_is_forbidden(capsys, monkeypatch, kept):
    loaded, load = [], build.load
    monkeypatch.setattr(build, "load", lambda path: loaded.append(path) or load(path))
    assert run_main(capsys, *CPU32) == ("25.", "")
    assert loaded == [kept]
    assert run_main(capsys, *CPU32, "--no-compile") == ("25.", "")
    assert run_main(capsys, *CPU32[:-1], "bfloat16") == ("25.", "")  # another one
    assert loaded == [kept]


# --- what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quarters", [1, 4])
@pytest.mark.parametrize("inputs", [1, 7, 4096, 4097, 8192, 11008, 14336])
def test_a_sum_of_one_token_is_the_product_for_any_number_of_inputs(inputs, quarters):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, inputs, generator=generator).bfloat16()
    x = torch.randn(1, 1, inputs, generator=generator)
    found = step.multiply_and_sum(x, w.unflatten(0, (quarters, -1)))
    assert found.shape == (1, 1, 8)
    assert apart(found, x.double() @ w.double().T) < 1e-5


@pytest.mark.parametrize(
    ("rows", "inputs", "quarters"), [(4096, 2048, 4), (4094, 2048, 1), (64, 64, 1)]
)
def test_a_large_matrix_is_read_in_quarters_in_the_order_of_its_rows(rows, inputs, quarters):
    w = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, inputs)
    parts = step.in_quarters(w)
    assert parts.shape == (quarters, rows // quarters, inputs)
    x = torch.full((1, 1, inputs), 1 / inputs)
    assert step.multiply_and_sum(x, parts)[0, 0].round().tolist() == [*range(rows)]


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_of_products_are_those_of_bmm(transposed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, generator=generator)
    y = torch.randn(3, 7, 5, generator=generator).mT if transposed else torch.randn(3, 5, 7)
    assert torch.allclose(build.sum_of_products(x, y), torch.bmm(x, y), atol=1e-6)


def test_a_weight_whose_rows_do_not_follow_each_other_is_left_to_the_plain_layer(
    tried, cache, weights32, demo_config
):
    """Strides are built in: another layer's would be read for them."""
    turned = {n: weights32[n].T.contiguous().T for n in weights32 if "1.feed_forward.w2" in n}
    with torch.inference_mode():
        built = step.with_built_steps(weights32 | turned, demo_config, True)
    whole = {"layers.0", "layers.2", "layers.3", "output.weight"}
    assert {n for n, w in built.items() if callable(w)} >= whole
    assert "layers.1" not in built
    assert turned.keys().isdisjoint(n for n, w in built.items() if callable(w))


def layers_of(run, weights, config):
    """The weights with a function for every layer, all computed by `run`."""
    parts = step.layer_parts(weights, config)
    return weights | {
        name: step.layer_function(run, part, weights, int(name[7:]), config)
        for name, part in parts.items()
    }


@pytest.fixture(scope="module")
def built_weights(library, weights32, demo_config):
    with torch.inference_mode():
        return layers_of(build.load(library), weights32, demo_config)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_built_steps_choose_the_tokens_that_plain_ones_choose(
    monkeypatch, built_weights, weights32, demo_config, prompt
):
    """100 of them, where the plain layer computes the prompt and nothing else."""
    demo_config, shapes = demo_config._replace(max_seq_len=256), []
    new = {"max_new_tokens": 100}
    expected = [*llama3.generate(prompt, weights32, demo_config, **new)]
    plain = llama3.block
    monkeypatch.setattr(llama3, "block", lambda x, *a: shapes.append(x.shape[1]) or plain(x, *a))
    assert [*llama3.generate(prompt, built_weights, demo_config, **new)] == expected
    assert shapes == [len(prompt)] * demo_config.n_layers


def test_built_steps_follow_a_cache_that_grows_and_is_rewound(
    built_weights, weights32, demo_config
):
    tokens = torch.arange(3, 93)
    exact = {name: w.double() for name, w in weights32.items()}
    logits = llama3.forward(tokens, exact, demo_config)
    session = llama3.Session(built_weights, demo_config)
    for t, token in enumerate(tokens):  # the cache begins without any room
        assert apart(session.read(token.view(1, 1))[0, -1], logits[t]) < 1e-5
    session.rewind(tokens[:41].tolist())
    for t in (40, 41):
        assert apart(session.read(tokens[t].view(1, 1))[0, -1], logits[t]) < 1e-5


def test_what_is_no_single_token_with_a_cache_is_computed_by_the_plain_layer(
    built_weights, weights32, demo_config
):
    def same(tokens, **options):
        both = (
            llama3.forward(tokens, weights, demo_config, **options)
            for weights in (built_weights, weights32)
        )
        return torch.equal(*both)

    with torch.inference_mode():
        assert same(torch.tensor([[5]]))
        assert same(torch.tensor([[5, 6], [7, 8]]))
        cache = llama3.new_cache(weights32, demo_config, 4, [2])
        assert same(torch.tensor([[5], [7]]), positions=torch.tensor([3]), cache=cache)
        cache = llama3.new_cache(weights32, demo_config, 4)  # without a dimension for the batch
        assert same(torch.tensor([5]), positions=torch.tensor([3]), cache=cache)
        cache = llama3.new_cache(weights32, demo_config, 6, [1])[..., 2:, :]  # not its beginning
        assert same(torch.tensor([[5]]), positions=torch.tensor([3]), cache=cache)


def test_gradients_do_not_go_through_what_was_built(built_weights, demo_config):
    cache = llama3.new_cache(built_weights, demo_config, 4, [1])
    x = torch.randn(1, 1, demo_config.dim, requires_grad=True)
    positions = torch.tensor([3])
    mask = llama3.causal_mask(positions, torch.arange(4))
    rotations = llama3.rope_rotations(positions, demo_config)
    built_weights["layers.0"](x, rotations, mask, positions, cache[0]).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", llama3.DTYPES.values(), ids=str)
@pytest.mark.parametrize("layers", [True, False])
def test_every_kind_of_layer_and_matrix_is_built_once(
    tmp_path, cache, tried, demo_config, dtype, layers
):
    """With biases; the second of three layers has another type, and one matrix is a function."""
    config = demo_config._replace(n_layers=3)
    weights = with_biases(random_weights(config))
    weights = {n: w.to(dtype) if w.dim() == 1 else w.bfloat16() for n, w in weights.items()}
    second = "layers.1.feed_forward.w2.weight"
    weights[second] = weights[second].half()
    with torch.inference_mode():
        built = step.with_built_steps(weights, config, True, layers)
        matrices = {n for n, w in weights.items() if w.dim() == 2} - {"tok_embeddings.weight"}
        whole = {"layers.0", "layers.1", "layers.2", "output.weight"}
        assert {n for n, w in built.items() if callable(w)} == (whole if layers else matrices)
        # Two kinds of layers and the output; matrices of 256 and 768 inputs, and the second type.
        assert len(tried) == 3
        session = llama3.Session(built, config)
        plain = llama3.Session(weights, config)
        for tokens in ([3, 1, 4, 1], [5], [9], [2]):
            tokens = torch.tensor([tokens])
            near = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
            assert apart(session.read(tokens), plain.read(tokens)) < near


# --- kept -----------------------------------------------------------------------------------------


def test_one_file_is_kept_that_others_cannot_write(library):
    assert [*library.parent.iterdir()] == [library]
    assert library.parent.stat().st_mode & 0o077 == 0
    assert library.stat().st_size < 5e6


@pytest.mark.parametrize("damage", ["cut off", "empty", "changed", "renamed", "of another layer"])
def test_a_file_that_is_not_what_was_built_is_not_used(layer_part, kept, monkeypatch, damage):
    part, content = layer_part, kept.read_bytes()
    if damage == "of another layer":  # whole, under the name of one that computes something else
        config = part.plain.keywords["config"]._replace(norm_eps=1)
        plain = functools.partial(part.plain, config=config)
        part = part._replace(constants=repr(config), plain=plain)
        kept.rename(kept.with_name(build.file_name(build.key_of(part), content)))
    elif damage == "renamed":
        part = part._replace(constants="another")
        kept.rename(kept.with_name(kept.name.replace(kept.name[:32], build.key_of(part))))
    else:
        changed = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
        kept.write_bytes({"cut off": content[:-1], "empty": b""}.get(damage, changed))
    loaded, load = [], build.load
    monkeypatch.setattr(build, "load", lambda path: loaded.append(path) or load(path))
    with torch.inference_mode():
        assert build.kept(part) is None
    assert len(loaded) == (damage == "of another layer")


def test_what_else_is_in_the_folder_is_passed_over(layer_part, kept):
    """A folder and a pipe, which would never end, by the names of libraries."""
    key = build.key_of(layer_part)
    (kept.parent / f"{key}-0.so").mkdir()
    os.mkfifo(kept.parent / f"{key}-1.so")
    (kept.parent / f"{key}-2.so").write_bytes(b"damaged")
    with torch.inference_mode():
        assert build.kept(layer_part)


@pytest.fixture
def compiler(monkeypatch, library):
    """In the place of the compiler: what it made of the demo's layer before, never the same."""
    made = []

    def compile_again(exported, package_path, inductor_configs):
        made.append(inductor_configs["cpp.cxx"])
        with zipfile.ZipFile(package_path, "w") as package:
            package.writestr("function/data/kernel.cpp", "")
            package.writestr("function/data/wrapper.so", library.read_bytes() + bytes(len(made)))
        return package_path

    import torch._inductor

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_again)
    return compile_again


def test_a_damaged_file_is_built_again(kept, compiler, layer_part):
    kept.write_bytes(b"")
    other = kept.with_name("0" * 32 + "-" + "0" * 32 + ".so")
    other.write_bytes(b"of another model")
    with torch.inference_mode():
        assert build.runs_of([layer_part, layer_part], wanted=False) == {}
        runs = build.runs_of([layer_part, layer_part], wanted=True)
        assert runs.keys() == {build.key_of(layer_part)}
        assert build.kept(layer_part)
    assert len({*kept.parent.iterdir()} - {other}) == 1
    assert not kept.exists()


def test_processes_that_build_at_once_do_not_harm_each_other(
    cache, compiler, layer_part, monkeypatch
):
    """While one compiles, another one begins and ends; while one loads, another one ends."""
    others, load = [], build.load

    def meanwhile(*args, doing, **options):
        found = doing(*args, **options)
        if not others:
            others.append(None)
            others.append(build.build(layer_part))
        return found

    compile_meanwhile = functools.partial(meanwhile, doing=compiler)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_meanwhile)
    with torch.inference_mode():
        runs = [build.build(layer_part)]
        others.clear()
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
        monkeypatch.setattr(build, "load", functools.partial(meanwhile, doing=load))
        runs += [build.build(layer_part), others[1]]
        for run in runs:
            build.check(layer_part, run)
        assert build.kept(layer_part)
    for path in cache.iterdir():
        assert path.name == build.file_name(build.key_of(layer_part), path.read_bytes())


# --- where that fails -----------------------------------------------------------------------------


def blocked(monkeypatch, tmp_path, how):
    if how == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    elif how == "others can write":
        (tmp_path / "llama3").chmod(0o777)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


@pytest.mark.parametrize("how", ["no home", "others can write", "no folder"])
def test_without_a_folder_of_its_own_it_goes_on_without(
    capsys, tmp_path, cache, monkeypatch, compiler, how
):
    blocked(monkeypatch, tmp_path, how)
    assert run_main(capsys, *CPU32) == ("25.", "")
    out, err = run_main(capsys, *CPU32, "--compile")
    assert out == "25."
    reason = {"others can write": "others can write to it", "no home": "home directory"}
    assert err.startswith(FAILED)
    assert reason.get(how, "Not a directory") in err
    assert err.count("\n") == 1


def test_a_compiler_that_fails_is_told_in_one_line_and_tried_again_if_asked_for(
    capsys, cache, compiler, monkeypatch
):
    tried = []

    def fails(*args, **options):
        tried.append(options)
        warnings.warn("this will be slow", stacklevel=1)
        logging.getLogger("torch._inductor").error("a long story")
        raise RuntimeError("the compiler is ill\n\nand much advice")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    for _ in range(2):
        out, err = run_main(capsys, *CPU32, "--compile")
        assert (out, err) == ("25.", f"{BUILDING}{FAILED}the compiler is ill\n")
    assert len(tried) == 2
    monkeypatch.setattr(step, "BUILT_FROM_BYTES", 10**6)
    line = f"{FAILED}that failed today; --compile tries it again\n"
    assert run_main(capsys, *CPU32) == ("25.", line)
    assert len(tried) == 2
    (mark,) = cache.iterdir()
    assert mark.suffix == ".failed"
    os.utime(mark, (0, 0))  # a day later
    assert "the compiler is ill" in run_main(capsys, *CPU32)[1]
    assert len(tried) == 3
    assert logging.getLogger("torch._inductor").isEnabledFor(logging.ERROR)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    err = run_main(capsys, *CPU32, "--compile")[1]  # the output's part is not what comes
    assert err.startswith(f"{BUILDING}{FAILED}expected inputs vector size")
    assert [path.suffix for path in cache.iterdir()].count(".so") == 1


def test_what_is_there_is_used_where_the_rest_cannot_be_built(capsys, monkeypatch, kept):
    used, load = [], build.load
    monkeypatch.setattr(build, "load", lambda path: used.append(path) or load(path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    out, err = run_main(capsys, *CPU32, "--compile")
    assert (out, err) == ("25.", f"{FAILED}there is no C++ compiler (g++ or clang++)\n")
    assert used == [kept]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda y, *_: y.zero_(),
        lambda y, *_: y.neg_(),
        lambda y, *_: y.fill_(torch.nan),
        lambda y, *_: y[..., -1:].neg_(),
        lambda y, keys, values: keys[:, :, 4].zero_(),  # the position that it writes to
        lambda y, keys, values: values[:, -1, 0].add_(1),  # one that it must leave alone
        lambda y, keys, values: keys.copy_(torch.linspace(0, 1, keys.numel()).view_as(keys)),
    ],
)
def test_what_computes_something_else_is_noticed_and_not_used(
    capsys, cache, monkeypatch, layer_part, mistake
):
    """As where a compiler has a fault."""

    def run(inputs):
        y = layer_part.function(*inputs)
        mistake(y, *inputs[4:6])
        return [y]

    with torch.inference_mode():
        build.check(layer_part, lambda inputs: [layer_part.function(*inputs)])
        with pytest.raises(ValueError, match="computes something else"):
            build.check(layer_part, run)


def test_what_was_built_and_is_wrong_is_told_in_one_line(capsys, cache, monkeypatch):
    def build_wrongly(part):
        return build.check(part, lambda inputs: [0 * part.function(*inputs)])

    monkeypatch.setattr(build, "build", build_wrongly)
    out, err = run_main(capsys, *CPU32, "--compile")
    assert (out, err) == ("25.", f"{BUILDING}{FAILED}what was built computes something else\n")
