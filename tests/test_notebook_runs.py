"""The notebooks with mistakes, which must stop them, and with other models than the demo."""

import contextlib
import ctypes
import functools
import gc
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, config_of, random_weights, split
from notebook_run import PART_1, PART_2, PART_3, PROMPT, Run, code_cells, first_token, read
from other_formats import fallback_content, gguf_tokens, hf_model, trained_tokenizer, write_gguf

import llama3
from demo import mistakes, notebooks, pictures

every_notebook = pytest.mark.parametrize("name", notebooks.NOTEBOOKS)

# --- other models ---------------------------------------------------------------------------------


def make_checkpoint(folder: Path, dtype, **params):
    config = config_of(folder, **params)
    torch.save(random_weights(config, dtype), folder / "consolidated.00.pth")
    shutil.copy(DEMO / "tokenizer.model", folder)
    return sum(math.prod(shape) for shape in llama3.weight_shapes(config).values()) * dtype.itemsize


def check_pictures(run):
    """Hold what each picture says about itself against what a reader needs."""
    assert len(run.shown) >= 7
    for figure, text in run.shown:
        title = pictures.title_of(figure)
        assert min(len(title), len(text)) > 10
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        for axes in figure.axes:
            if axes not in panels:
                assert axes.get_xlabel() or axes.get_ylabel(), title
            elif axes.axison:  # of a row, the left one has the label
                assert figure.get_supxlabel() or any(a.get_xlabel() for a in panels), title
                assert figure.get_supylabel() or any(a.get_ylabel() for a in panels), title
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() != "linear":  # plain numbers, no formulas
                    assert not any("\\math" in tick.get_text() for tick in axis.get_ticklabels())


def memory_of_its_own():
    """The bytes of this process that are in no file; None where that cannot be told."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; pages of a mapped file are not among these
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024


def give_free_memory_back():
    """So that what is taken afterwards shows, and is not what was free before."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # Linux, with glibc
        libc.malloc_trim(0)


def test_it_runs_on_a_larger_model_in_the_memory_that_the_weights_take(tmp_path):
    Run(PART_1)  # so that all libraries are loaded and are not counted
    params = {"dim": 432, "n_layers": 8, "n_heads": 12, "n_kv_heads": None, "norm_eps": 1e-6}
    size = make_checkpoint(tmp_path, torch.float32, **params)
    memory = {}

    def note_memory(cell, names):
        if cell.id == "weights" and memory["setup"] is not None:
            give_free_memory_back()
        memory[cell.id] = memory_of_its_own()

    found = Run(PART_1, tmp_path, before=note_memory)
    assert found.names["next_token"] == first_token(tmp_path)
    check_pictures(found)
    if memory["weights"] is not None:
        names = [*memory]
        used = max(memory[name] for name in names[names.index("weights") :]) - memory["weights"]
        assert used < 0.75 * size  # a copy of the weights would add it all


SMALL_ONE = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 6, "ffn_dim": 40}


@every_notebook
def test_it_runs_on_a_small_model_with_an_empty_prompt(tmp_path, name):
    make_checkpoint(tmp_path, torch.bfloat16, **SMALL_ONE, use_scaled_rope=True)
    place = "model" if name == PART_1 else "from-part-1"
    found = Run(name, tmp_path, {place: {PROMPT: ""}})
    if name == PART_1:
        assert found.names["head"] == 1  # there is no head 6
    check_pictures(found)
    for figure, _ in found.shown:
        figure.set_layout_engine("none")  # which takes longest, and only moves things
        figure.draw_without_rendering()


@every_notebook
def test_it_runs_in_float16_on_several_files_and_on_another_prompt_and_head(tmp_path, name):
    config = config_of(tmp_path, n_layers=3, n_heads=16, n_kv_heads=4, ffn_dim_multiplier=1.3)
    weights = random_weights(config, torch.float16)
    weights["output.weight"][:1024] = 0  # so that the next token is a special one
    split(weights, tmp_path, 2)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    changes = {"model": {PROMPT: "你好, the answer is", "min(6,": "min(9,"}}
    if name != PART_1:
        changes = {"from-part-1": {PROMPT: "你好, the answer is"}}
    found = Run(name, tmp_path, changes)
    if name == PART_1:
        assert found.names["head"] == 9
        token = llama3.forward(found.names["tokens"], weights, config)[-1].argmax()
        assert found.names["next_token"] == token >= 1024
    check_pictures(found)


@every_notebook
def test_it_runs_on_weights_that_are_all_zero(tmp_path, name):
    config = config_of(tmp_path, n_layers=2)
    zeros = {name: torch.zeros(shape) for name, shape in llama3.weight_shapes(config).items()}
    torch.save(zeros, tmp_path / "consolidated.00.pth")
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    printed = "".join(Run(name, tmp_path).printed.values())
    assert "✓" in printed
    assert "nan" not in printed.replace("[nan, nan, nan]", "")  # softmax without the maximum


@every_notebook
def test_it_runs_on_a_hugging_face_folder_with_a_tokenizer_of_another_kind(tmp_path, name):
    hf_model("llama", vocab_size=420).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fallback_content()))
    found = Run(name, tmp_path)
    assert "as in llama3.forward" in "".join(found.printed.values())
    if name == PART_1:
        assert found.names["next_token"] == first_token(tmp_path)


@every_notebook
def test_it_runs_on_a_quantized_gguf_file(tmp_path, name):
    tokenizer = trained_tokenizer("llama3")
    config = config_of(tmp_path, vocab_size=len(tokenizer))
    weights, path = random_weights(config), tmp_path / "model.gguf"
    tokens = gguf_tokens(tokenizer, "llama-bpe")
    write_gguf(path, weights, config, kind="Q8_0", tokens=tokens)
    found = Run(name, path)
    assert "as in llama3.forward" in "".join(found.printed.values())
    if name == PART_1:
        assert found.names["next_token"] == first_token(path)


@pytest.mark.parametrize("prompt", ["Hello", "你好", "a $x$ <|eot_id|> é"])
@every_notebook
def test_it_runs_on_another_prompt_and_head(name, prompt):
    changes = {"from-part-1": {PROMPT: prompt}}
    if name == PART_1:
        changes = {"model": {PROMPT: prompt, "min(6,": "min(3,"}}
    Run(name, changes=changes, draw="nothing")


def test_tied_weights_are_counted_once(tmp_path, demo_weights):
    shutil.copy(DEMO / "params.json", tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    tied = demo_weights | {"output.weight": demo_weights["tok_embeddings.weight"]}
    torch.save(tied, tmp_path / "consolidated.00.pth")
    found = Run(PART_3, tmp_path, last="parameters", draw="nothing")
    assert found.names["total"] == 1_213_568 - 1280 * 128


def test_without_the_project_it_says_what_to_do(tmp_path):
    (setup,) = (cell.source for cell in code_cells(read(PART_1)) if cell.id == "setup")
    result = subprocess.run(
        [sys.executable, "-c", setup], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"FileNotFoundError: no llama3.py in {tmp_path} or above it: open this")


# --- mistakes in cells ----------------------------------------------------------------------------

# By notebook: what, in which cell, how, and the cell that must stop, if it is not the same.
MISTAKES = {
    PART_1: [
        ("no embedding of its own", "embedding", "embedding_table[tokens]", "embedding_table[:T]"),
        ("no norm", "rms", " * torch.rsqrt(mean_square + config.norm_eps)", ""),
        ("no epsilon", "rms", " + config.norm_eps", ""),
        ("no weight of the norm", "rms", ".to(x.dtype) * weight", ".to(x.dtype)"),
        ("another head", "queries", "normed @ wq[head].T", "normed @ wq[head - 1].T"),
        ("another base of RoPE", "frequencies", "config.rope_theta**", "10000**"),
        ("turned backwards", "rotations", "torch.ones_like(angles), angles", "0 * angles + 1, -angles"),
        ("turned twice", "rotate", "query_points * rotations", "query_points * rotations**2"),
        ("the matrix turned around", "rotate", "a * cos - b * sin", "a * cos + b * sin"),
        ("keys not rotated", "keys", "rotate(normed @ wk[shared].T, rotations)", "normed @ wk[shared].T"),
        ("another group", "keys", "shared = head // group", "shared = head % n_kv_heads"),
        ("no rotation", "scores", "queries_rotated @ keys_rotated.T", "queries @ keys_rotated.T"),
        ("queries not rotated", "scores", "queries_rotated @", "queries @"),
        ("no scale", "scores", " / math.sqrt(head_dim)", ""),
        ("scores with a constant", "scores", "= queries_rotated", "= 1 + queries_rotated"),
        ("no mask", "mask", ".tril()", ""),
        ("mask one too wide", "mask", ".tril()", ".tril(1)"),
        ("a sum over columns", "softmax-by-hand", "powers.sum(-1, keepdim=True)", "powers.sum(0)"),
        (
            *("no mask in the softmax", "softmax"),
            *("softmax(masked_scores.float())", "softmax(scores.float())"),
        ),
        ("softmax in 16 bits", "softmax", "softmax(masked_scores.float())", "softmax(masked_scores)"),
        ("values of another group", "values", "normed @ wv[shared].T", "normed @ wv[shared - 1].T"),
        ("pattern not used", "values", "pattern @ values", "values"),
        ("groups side by side", "heads", "wk[h // group]", "wk[h % n_kv_heads]"),
        ("heads not rotated", "heads", "rotate(normed @ wq[h].T, rotations)", "normed @ wq[h].T"),
        ("heads not scaled", "heads", " / math.sqrt(head_dim)", ""),
        ("heads not masked", "heads", ".masked_fill(~mask, -math.inf)", ""),
        (
            *("heads in another order", "wo"),
            *("torch.cat(head_outputs, dim=-1)", "torch.cat(head_outputs[::-1], dim=-1)"),
        ),
        ("no residual of attention", "wo", "token_embeddings + attention_change", "attention_change"),
        ("no second norm", "swiglu", 'normed_for("ffn", after_attention, 0)', "after_attention"),
        (
            *("no gate", "swiglu", "gated = gate_opened * (normed_again @ w3.T)"),
            "gated = normed_again @ w3.T",
        ),
        ("gate not bent", "swiglu", "gate_opened * (", "gate * ("),
        (
            *("SiLU in 16 bits", "swiglu"),
            *("(gate.float() / (1 + torch.exp(-gate.float())))", "(gate / (1 + torch.exp(-gate)))"),
        ),
        ("no residual of SwiGLU", "layer-end", "after_attention + ffn_change", "ffn_change"),
        ("layers not rotated", "attend", "rotate(normed @ wq[h].T, rotations)", "normed @ wq[h].T", "run"),
        ("layers not scaled", "attend", " / math.sqrt(head_dim)", "", "run"),
        ("layers not masked", "attend", "scores.masked_fill(~mask, -math.inf)", "scores", "run"),
        ("another group in layers", "attend", "@ wv[shared].T", "@ wv[shared - 1].T", "run"),
        ("patterns in another order", "attend", "(patterns)", "(patterns[::-1])", "run"),
        ("layers without residual", "layers", "x = x + change", "x = change", "run"),
        (
            *("no norm in layers", "layers"),
            *('swiglu(normed_for("ffn", x, layer), layer)', "swiglu(x, layer)", "run"),
        ),
        (
            *("no gate in layers", "layers"),
            *("(gate / (1 + torch.exp(-gate))).to(dtype) * ", "", "run"),
        ),
        ("no last norm", "logits", 'norm(after_layer[-1], weights["norm.weight"])', "after_layer[-1]"),
        ("the token before the last", "argmax", "logits[-1].argmax()", "logits[-2].argmax()"),
    ],
    PART_2: [
        ("a trace without a mask", "trace", "llama3.causal_mask(positions, positions)", "positions[:, None] >= 0 * positions", "sum"),
        ("no residual in the trace", "trace", "x = x + llama3.feed_forward", "x = llama3.feed_forward", "sum"),
        ("padding is read", "answers", "starts=starts, ", ""),
        ("one token early", "answers", "last_only=True)[:, -1]", "last_only=False)[:, -2]"),
        ("rows of wo for its columns", "without-heads", "wo[:, heads] = 0", "wo.view(n_heads, head_dim, -1)[heads] = 0"),
        ("a score without its root", "distance", " / math.sqrt(head_dim)\n\n", "\n\n"),
        ("keys not mirrored", "distance", "turned(key, key_position).conj()", "turned(key, key_position)"),
        ("another head's columns", "swap", "brought.flatten(-2)", "brought.flip(1).flatten(-2)"),
        ("heads swapped for each other", "swapped", "([first], [*zip(c, b)])", "([first], [*zip(a, d)])"),
        ("another head's values", "clock", "[h // group]", "[h % n_kv_heads]"),
        ("a circle of ten hours", "circle", "range(10, 80)", "range(10, 30)"),
        ("the circle of a - b", "streams", "circle(a + b)", "circle(a - b)"),
        ("layer 2 in the place of layer 1", "turn", "layer != 1", "layer != 2"),
        ("left in, not out", "leave-out", "attention_now(x, w, layer, *rest) * (layer != out)", "attention_now(x, w, layer, *rest) * (layer == out)", "leave-out-check"),
        ("another half left out", "leave-out", "feed_forward(x, w, layer) * (layer != out)", "feed_forward(x, w, layer) * (layer == out)", "leave-out-check"),
        ("nothing left out", "leave-out", "{\"rotate\": lambda x, rotations: x}", "{\"rotate\": llama3.rotate}", "leave-out-plot"),
        ("patterns of what is not normed", "trace", "queries_keys_values(normed,", "queries_keys_values(x,", "sum"),
        ("backwards in time", "by-distance", "score(query, key, distance, 0)", "score(query, key, 0, distance)"),
        ("another distance", "keys", "last - place, 0", "place, 0"),
        ("answers one too high", "sums", "str(a + b)", "str(a + b + 1)"),
        ("the wrong half of a layer", "silu-plot", "streams[f\"attention of layer {i}\"], i", "streams[f\"feed-forward of layer {i}\"], i"),
        ("a lens without norm", "lens", 'llama3.rms_norm(torch.stack(outputs)[:, -1], exact["norm.weight"], config.norm_eps)', "torch.stack(outputs)[:, -1]"),
        ("epsilon outside the root", "eps-plot", "(m**2 + config.norm_eps).sqrt()", "(m + config.norm_eps)"),
    ],
    PART_3: [
        ("the new token stands elsewhere", "cache", "T * frequencies", "(T + 1) * frequencies"),
        ("the cache is forgotten", "cache", "dict(stored)", "{at: (0 * k, v) for at, (k, v) in stored.items()}"),
        ("keys and values alone", "gqa", " * 2 * ", " * "),
        ("a power turned around", "powers", "two ** (1 / temperature)", "two**temperature"),
        ("hotter for colder", "temperature", "opening_logits / temperature", "opening_logits * temperature"),
        ("top-p takes one less", "temperature", "likelier <= top_p", "ordered.values.cumsum(0) <= top_p"),
        ("temperature after top-p", "sample", "kept_at[temperature], 1", "kept_at[1], 1"),
        ("k - 1", "sample", ".topk(k)", ".topk(k - 1)"),
        ("the last token is not read", "generate", "torch.tensor([ids], device=device)", "torch.tensor([ids[:-1]], device=device)"),
        ("padding is read", "batch", "starts=starts", "starts=None"),
        ("surprise at the token before", "perplexity", "ids[1:, None]", "ids[:-1, None]"),
        ("a mean of exponents", "perplexity", "surprise.mean().exp()", "surprise.exp().mean()"),
        ("the truth and the bet swapped", "coin", "bent[0] * bets.log2() + bent[1] * (1 - bets).log2()", "bets * bent[0].log2() + (1 - bets) * bent[1].log2()"),
        ("a slope that is not squared", "training", "w.grad.pow(2).sum().item()", "w.grad.abs().sum().item()"),
        ("forty steps uphill", "steps", "w.detach() - 0.1", "w.detach() + 0.1"),
        ("the key stays", "permute", "n * frequencies[None]).T", "0 * frequencies[None]).T"),
        ("bits for nats", "coin", "p.clamp(min=1e-30).log()", "p.clamp(min=1e-30).log2()"),
        ("a gradient without its token", "gradient", "by_hand[y] -= 1\n", ""),
        ("uphill", "training", "w - hoped / slope * w.grad", "w + hoped / slope * w.grad"),
        ("the rarest pair", "bpe-training", "pair = max(counts", "pair = min(counts"),
        ("the blend turned around", "frequencies-plot", "return kept * frequency + (1 - kept) * frequency / factor", "return (1 - kept) * frequency + kept * frequency / factor"),
        ("rows not permuted", "permute", "wq_head[rows], wk_head[rows]", "wq_head, wk_head"),
        ("keys for every head", "work", "c.n_kv_heads * c.head_dim", "c.n_heads * c.head_dim", "work-check"),
        ("another's embeddings", "trace-check", "embedding_table[tokens],", "embedding_table[:T],"),
    ],
}  # fmt: skip


def stopped_at(namespace, sources):
    """Run the sources of cells, by name, one after another; the one that stops, and why."""
    for name, source in sources.items():
        try:
            exec(compile(source, f"cell {name}", "exec"), namespace)
        except ValueError as error:
            return name, str(error)
    return None, None


@functools.cache
def run_with_mistakes(name):
    """A notebook on the demo, and where each of MISTAKES stopped it: `stopped`, by mistake."""
    sources = {cell.id: cell.source for cell in code_cells(read(name))}
    order, stopped = [*sources], {}

    def try_mistakes(cell, names):
        for what, place, right, wrong, *stops in MISTAKES[name]:
            if place == cell.id:
                assert right in cell.source, f"{place} has no {right!r} any more, for {what!r}"
                last = (stops or [place])[0]
                names_of_cells = order[order.index(place) : order.index(last) + 1]
                changed = {name: sources[name] for name in names_of_cells}
                changed[place] = cell.source.replace(right, wrong)
                with contextlib.redirect_stdout(io.StringIO()):
                    stopped[what] = stopped_at(dict(names), changed)

    run = Run(name, before=try_mistakes, draw="nothing")
    run.stopped = stopped
    return run


@every_notebook
def test_each_mistake_stops_it_in_the_cell_that_makes_it(name):
    stopped = run_with_mistakes(name).stopped
    assert len(stopped) == len(MISTAKES[name])
    for what, place, _, _, *stops in MISTAKES[name]:
        cell, why = stopped[what]
        assert cell == (stops or [place])[0], what
        assert why, what


def test_a_check_looks_at_each_row_by_itself(capsys):
    compare = run_with_mistakes(PART_1).names["compare"]
    right = torch.tensor([[1.0, 0.0], [0.001, 0.001], [0.0, 0.0]])
    compare("x", right.clone(), "right", right)
    assert capsys.readouterr().out == "✓ x [3, 2] as in right\n"  # zeros too, and no "nan"
    compare("x", right * 1.01, "right", right, 0.02)
    assert capsys.readouterr().out == "✓ x [3, 2] as in right (off by 1e-02, allowed 0.02)\n"
    for row, wrong in [(1, 0.0015), (2, 1e-9), (0, math.nan), (0, math.inf)]:
        other = right.clone()
        other[row] = wrong
        with pytest.raises(ValueError, match="x: differs from right"):
            compare("x", other, "right", right, 0.02)
    for other in (right[:2], right.bfloat16()):
        with pytest.raises(ValueError, match=r"x: \[[23], 2\] torch"):
            compare("x", other, "right", right, 0.02)


# --- mistakes in llama3.py ------------------------------------------------------------------------


@pytest.mark.parametrize("what", mistakes.MISTAKES)
def test_a_mistake_in_llama3_stops_the_first_notebook_where_the_table_says(monkeypatch, what):
    mistake, reached = mistakes.MISTAKES[what], []
    for name, function in mistake.functions.items():
        monkeypatch.setattr(llama3, name, function)
    with pytest.raises(ValueError, match="differs from"):
        Run(PART_1, before=lambda cell, _: reached.append(cell.id), draw="nothing")
    assert reached[-1] == mistake.cell


RIGHT = {name: getattr(llama3, name) for name in ("forward", "nucleus", "sample", "attention")}


def cache_slot_off_by_one(x, weights, layer, config, rotations, mask, positions, cache=None):
    where = None if positions is None else (positions - 1).clamp(min=0)
    return RIGHT["attention"](x, weights, layer, config, rotations, mask, where, cache)


def after_top_p(logits, temperature=0.0, top_p=1.0, generator=None):
    if temperature == 0:
        return logits.argmax(-1)
    powers = RIGHT["nucleus"](logits.softmax(-1), top_p) ** (1 / temperature)
    return torch.multinomial(powers / powers.sum(), 1, generator=generator).squeeze(-1)


def one_token_early(tokens, *rest, last_only=False, **options):
    logits = RIGHT["forward"](tokens, *rest, **options)
    return logits[..., -2:-1, :] if last_only and tokens.shape[-1] > 1 else logits


@pytest.mark.parametrize(
    ("notebook", "name", "wrong", "cell"),
    [
        (PART_2, "forward", one_token_early, "answers"),
        (PART_3, "attention", cache_slot_off_by_one, "cache"),
        (PART_3, "nucleus", lambda p, top_p: p, "temperature"),
        (PART_3, "sample", after_top_p, "sample"),
    ],
)
def test_a_mistake_in_what_comes_after_stops_the_other_notebooks(
    monkeypatch, notebook, name, wrong, cell
):
    monkeypatch.setattr(llama3, name, wrong)
    reached = []
    with pytest.raises(ValueError, match="differs from"):
        Run(notebook, before=lambda cell, _: reached.append(cell.id), draw="nothing")
    assert reached[-1] == cell


# --- exercises ------------------------------------------------------------------------------------


def test_the_exercises_know_their_answers(demo_config, demo_weights, demo_tokenizer, capsys):
    names = {part: run_with_mistakes(part).names for part in notebooks.NOTEBOOKS}
    weights = {name: w.float() for name, w in demo_weights.items()}

    def logits(text, weights=weights, config=demo_config):
        return llama3.forward(torch.tensor([1024, *demo_tokenizer.encode(text)]), weights, config)[
            -1
        ]

    order = torch.arange(16).view(2, -1).T.flatten()  # neighbors, where halves are pairs
    halves = dict(weights)
    for name in halves:
        if "wq" in name or "wk" in name:
            halves[name] = halves[name].view(-1, 16, 128)[:, order].flatten(0, 1)
    five = np.sort(np.exp(logits("What is the").double().numpy()))[-5:]
    five /= five.sum()
    second = names[PART_2]["fetching"][0]
    ids = torch.tensor([[1024, *demo_tokenizer.encode(f"9 plus {n} is ")] for n in (4, 6)])
    brought = names[PART_2]["heads_of"](ids)[:, -1]
    between = brought[:1].clone()
    between[0, second] = brought[:, second].mean(0)
    scores = names[PART_1]["masked_scores"][-2].float() * math.sqrt(16)
    answers = {
        (PART_1, "root"): scores.softmax(-1).max().item(),
        (PART_1, "one layer less"): logits(PROMPT, config=demo_config._replace(n_layers=3))
        .argmax()
        .item(),
        (PART_1, "broken"): 6,
        (PART_2, "hot"): 1,
        (PART_2, "capitals"): (1, 5),
        (PART_2, "between"): demo_tokenizer.decode(
            [names[PART_2]["finish"](ids[:1], between)[0].argmax().item()]
        ),
        (PART_3, "last turn"): 2 * math.pi * 10000 ** (14 / 16),
        (PART_3, "tied"): 8_030_261_248 - 128256 * 4096,
        (PART_3, "five"): -(five * np.log(five)).sum(),
        (PART_3, "halves"): logits("17 plus 8 is ", halves).argmax().item(),
    }
    assert answers[PART_2, "between"] == "14"
    assert run_with_mistakes(PART_1).printed["broken"].startswith("16 of 17 rows differ")
    repaired = {"broken": {"masked_fill(~mask, 0)": "masked_fill(~mask, -math.inf)"}}
    assert Run(PART_1, changes=repaired, draw="nothing").printed["broken"].startswith("0 of 17")
    for (part, exercise), answer in answers.items():
        check = names[part]["check"]
        check(exercise, answer)
        assert f"✓ {exercise}" in capsys.readouterr().out
        check(exercise, "none of them" if isinstance(answer, str | tuple) else answer * 1.01 + 1)
        assert f"✗ {exercise}" in capsys.readouterr().out
    assert demo_tokenizer.decode([answers[PART_3, "halves"]]) != "25"
    for part in notebooks.NOTEBOOKS:
        asked = [exercise for of, exercise in answers if of == part and exercise != "broken"]
        printed = run_with_mistakes(part).printed["exercises"]
        assert printed == "".join(f"{exercise}: no answer yet\n" for exercise in asked)


# --- the real model -------------------------------------------------------------------------------


def test_the_table_of_a_real_model_is_whole():
    saved = json.loads(notebooks.REAL.read_text(), parse_constant=pytest.fail)
    assert len(saved["asked"]) == 2
    assert [*saved["answers"]][:5] == [*run_with_mistakes(PART_2).names["left_out"]][:5]
    assert all(len(row) == 2 for row in saved["answers"].values())
