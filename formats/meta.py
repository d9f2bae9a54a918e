"""Meta's own folders, and what is wrong with a params.json or a .pth, in one line."""

import functools
import re
import zipfile
from pathlib import Path
from typing import NoReturn

from torch import Tensor

import llama3
from formats.errors import (
    CheckpointError,
    describe_file,
    find_file,
    one_line,
    out_of_memory,
    quoted,
    read_file,
    read_json_object,
)
from formats.source import Source, Stored, summary
from formats.text import FileTokenizer
from formats.vocabulary import folder_tokenizer, model_tokenizer
from tokenizer_setup import Tokenizer

EXPECTED = "expected a PyTorch checkpoint, a dictionary of plain tensors"


def refuse_pickle(path: Path, error: BaseException) -> NoReturn:
    """Raise the CheckpointError that says why PyTorch could not load the file `path`.

    error: what llama3.map_file met; the true reason is in the file as often as in it.
    """
    head, size = read_file(path, 4096), path.stat().st_size
    found = describe_file(head)
    if out_of_memory(error):
        problem = f"not enough memory (or address space, ulimit -v) for its {size / 1e9:.1f} GB"
    elif not head or "LFS" in found or "web page" in found:
        problem = f"found {found}; {EXPECTED}; download it again"
    elif head.startswith(b"PK") and not zipfile.is_zipfile(path):
        problem = f"found a file that was cut off after {size} bytes; {EXPECTED}; download it again"
    elif head.startswith(b"\x80") or "a compressed archive" in str(error):
        kind = "a compressed archive" if head[:1] == b"P" else "a pickle, as before PyTorch 1.6"
        problem = f"found {kind}; {EXPECTED}: torch.save it again where it comes from"
    elif match := re.search(r"\bGLOBAL (\S+)", str(error)):
        calls = f"a pickle that calls for {one_line(match[1], 80)}, which could run any code"
        problem = f"found {calls} and is not loaded; {EXPECTED}: save the state_dict alone"
    else:
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        found = found or "neither a zip archive nor a pickle"
        problem = f"found {found} ({one_line(reason[1] if reason else error)}); {EXPECTED}"
    raise CheckpointError(path, problem) from None


def map_file(path: Path) -> dict[str, Tensor]:
    """As llama3.map_file, but with the true reason in the CheckpointError."""
    try:
        return llama3.map_file(path)
    except CheckpointError as error:
        refuse_pickle(path, error.__cause__)


def describe_weights(content: object) -> str:
    """Describe a checkpoint that is not a text model's weights, and what to do; or ""."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}, expected a dictionary of tensors"
    expected, metas = "expected a dictionary of tensors under Meta's names", "tok_embeddings.weight"
    hf = r"embed_tokens|self_attn|lm_head|\bmlp\.|transformer\.h\."
    original = "use the files in the folder 'original' of Meta's download"
    for pattern, kind, todo in (
        (r"vision_|text_model\.|cross_attention", "a vision checkpoint", "use a text model"),
        ("lora_", "LoRA weights", "merge them into their model first"),
        (hf, "the names of a Hugging Face checkpoint", original),
        (rf".+\b{re.escape(metas)}$", "names with a prefix", "save the weights without it"),
    ):
        for name in content:
            if isinstance(name, str) and re.search(pattern, name):
                return f"{kind} ({one_line(name, 80)}); {expected}; {todo}"
    inner = [name for name, value in content.items() if isinstance(value, dict)]
    if inner and metas not in content:
        return f"a dictionary in a dictionary, as {quoted(inner[0])}; {expected}; save it alone"
    return ""


def map_files(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """The contents of consolidated.00.pth, consolidated.01.pth, ... by their paths."""
    there = sorted(path.name for path in folder.glob("consolidated.[0-9][0-9].pth"))
    contents = {}
    for i in range(max(len(there), 1)):
        name = f"consolidated.{i:02}.pth"
        if there and name not in there:
            problem = f"{name} is missing, but there is {there[-1]}"
            raise CheckpointError(folder, f"{problem}; expected all files of the model, from 00 on")
        path = find_file(folder, name)
        contents[path] = map_file(path)
        if found := describe_weights(contents[path]):
            raise CheckpointError(path, f"found {found}")
    return contents


def open_meta(folder: Path) -> Source:
    """A folder with params.json, consolidated.NN.pth, tokenizer.model. Raises CheckpointError."""
    path = find_file(folder, "params.json")
    params, contents = read_json_object(path), map_files(folder)
    if params.get("vocab_size") == -1:  # Meta's default: that of the weights
        tables = (file.get("tok_embeddings.weight", ()) for file in contents.values())
        params["vocab_size"] = sum(map(len, tables)) or 1
    try:
        config = llama3.config_from_params(params)
        path = folder if len(contents) > 1 else next(iter(contents))
        shards = llama3.shards_of([*contents.values()], config)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(path, error) from None
    stored, shapes = {}, llama3.weight_shapes(config)
    for name, parts in shards.items():
        of_head = tuple(parts[0].shape)  # of a norm of heads, which is whole in each file
        bias = shapes[f"{name[:-4]}weight"][:1] if name.endswith(".bias") else None
        shape = shapes.get(name) or bias or of_head
        load = functools.partial(list, parts)
        stored[name] = Stored(shape, parts[0].dtype, load, is_copy=len(parts) > 1)
    if shards["output.weight"][0].data_ptr() == shards["tok_embeddings.weight"][0].data_ptr():
        del stored["output.weight"]  # tied

    def text() -> Tokenizer | FileTokenizer:
        if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").exists():
            return folder_tokenizer(folder, config.vocab_size)  # as formats.convert writes it
        return model_tokenizer(find_file(folder, "tokenizer.model"), config.vocab_size)

    found = summary("Meta's files", config, stored)
    return Source(folder, found, config, stored, text, exact=True)
