"""Models as people have them: Meta's folders, Hugging Face's, and GGUF files.

source = formats.open("Qwen2-0.5B")  # nothing is written, and what can be is mapped
weights, tokenizer = source.load_weights(), source.tokenizer()
logits = llama3.forward(tokens, weights, source.config)
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import llama3
from formats import blocks
from formats.blocks import SIZES
from formats.errors import CheckpointError, describe_file, one_line, out_of_memory, read_file
from formats.gguf import PART, open_gguf
from formats.huggingface import open_huggingface
from formats.meta import open_meta
from formats.source import Source, Stored, join

__all__ = ["CheckpointError", "Source", "open", "quantized"]


def _open(path: Path) -> Source:
    if os.path.isfile(path):  # unlike Path's, False for a name that is too long
        head = read_file(path, 4096)
        if head.startswith(b"GGUF"):
            return open_gguf(path)
        found = describe_file(head) or "a file of another kind"
        raise CheckpointError(path, f"found {found}, expected a GGUF file or a model's folder")
    if os.path.isdir(path) and not [*path.glob("consolidated.*")]:
        files = sorted(file for file in path.glob("*.gguf") if file.is_file())
        weights = [*path.glob("*.safetensors*"), *path.glob("pytorch_model*")]
        if files and not weights:
            if len({PART.sub(r"\1", file.name) for file in files}) > 1:
                names = one_line(", ".join(file.name for file in files), 100)
                raise CheckpointError(path, f"found several GGUF files ({names}); name one of them")
            return open_gguf(files[0])
        if (path / "config.json").is_file() and (weights or not (path / "params.json").exists()):
            return open_huggingface(path)
        if (path / "snapshots").is_dir():
            found = sorted((path / "snapshots").iterdir())
            names = ", ".join(str(folder) for folder in found[:3]) or "one that is downloaded"
            problem = "found the folder of the Hugging Face hub's cache around a model"
            raise CheckpointError(path, f"{problem}; name a folder in its snapshots: {names}")
    if not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        problem = "no such folder; a model on the Hugging Face hub is downloaded first"
        raise CheckpointError(path, f"{problem}: hf download {path} --local-dir {path.name}")
    return open_meta(path)


def open(path: str | os.PathLike) -> Source:
    """The model at `path`: a folder of Meta's or of Hugging Face's, or a GGUF file or its folder.

    Raises CheckpointError for what is not a whole model of a known family.
    """
    try:
        return _open(Path(path))
    except CheckpointError:
        raise
    except ImportError as error:
        problem = f"reading it needs a package: pip install {error.name}"
        raise CheckpointError(path, problem) from None
    except Exception as error:  # what is in files may have any form
        if out_of_memory(error):
            raise
        raise CheckpointError(path, f"cannot be used: {error!r}") from error


def quantized(source: Source, kind: str) -> Source:
    """The same model, of which matrices become blocks of Q8_0 or Q4_0 as they are loaded.

    Not the embeddings, nor what is in blocks already or has rows that blocks would cut. ValueError
    if that leaves nothing.
    """

    def made(name: str, w: Stored) -> Stored:
        def parts() -> Sequence[Tensor]:
            return [blocks.to_blocks(join(w.parts(), llama3.split_axis(name)), kind)]

        return w._replace(parts=parts, is_copy=True, stored_as=kind, blocks=True)

    stored, table = source.stored, source.stored["tok_embeddings.weight"]
    matrices = {
        name: made(name, w)
        for name, w in {"output.weight": table, **stored}.items()
        if len(w.shape) == 2 and "embed" not in name
        if not w.blocks and w.shape[1] % SIZES[kind] == 0
    }
    if not matrices:
        raise ValueError(f"found {source.found}: nothing of it can become {kind}")
    return source._replace(stored=stored | matrices, found=f"{source.found}, made {kind}")
