"""Functions of tensors, built once for this machine and kept.

torch.export traces a function, AOTInductor writes it as C++, and what a compiler makes of that is
loaded by every later start in a millisecond, without the compiler. Before it is used, it is
compared with the plain function.
"""

import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cli.messages import bar, note
from formats.errors import one_line

Run = Callable[[list[Tensor]], list[Tensor]]
# GCC's: a loop asks for all that it reads as early as some 3000 operations before it needs it.
PREFETCH = (
    " -fprefetch-loop-arrays --param=prefetch-latency=3000 --param=simultaneous-prefetches=100"
    " --param=prefetch-min-insn-to-mem-ratio=1 --param=min-insn-to-prefetch-ratio=1"
)
# PyTorch copies 8 numbers of 32 bits to the stack before it reads them as a vector: in one piece,
# which GCC sees through, or in two, for which the processor waits, three times as long for Q8_0.
WHOLE_VECTORS = " -mmove-max=256 -mstore-max=256"  # GCC 12's, on x86
BUILT_FROM_BYTES = 5e8  # of weights: below, building takes longer than it saves


class Part(NamedTuple):
    """A function of tensors to build, with inputs such as these."""

    function: Callable[..., Tensor]  # as it is compiled
    plain: Callable[..., Tensor]  # what it is compared with
    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]  # further inputs, which it does not write to
    open_sizes: tuple[dict[int, str], ...]  # which dimensions of them all may have another size
    constants: str  # what else the function depends on


@functools.cache
def sources() -> str:
    """The hash of all code that is traced or traces."""
    names = "llama3.py", "cli/build.py", "cli/step.py", "cli/words.py", "formats/blocks.py"
    code = [(Path(__file__).parents[1] / name).read_bytes() for name in names]
    return hashlib.sha256(b"".join(code)).hexdigest()


def key_of(part: Part) -> str:
    """A name for what is built of a part: the same one where the same code comes out."""
    sizes = [
        (x.dtype, [open_sizes.get(i, n) for i, n in enumerate(x.shape)])
        for x, open_sizes in zip(part.inputs + part.weights, part.open_sizes, strict=True)
    ]
    able = sorted(getattr(torch.cpu, "get_capabilities", dict)().items())
    able = platform.machine(), torch.backends.cpu.get_cpu_capability(), able
    made_by = torch.__version__, able, torch.get_num_threads(), sources()
    return hashlib.sha256(repr((part.constants, sizes, made_by)).encode()).hexdigest()[:32]


def file_name(key: str, content: bytes) -> str:
    """The name of a file by its key and content: one that was damaged or renamed has another."""
    return f"{key}-{hashlib.sha256(key.encode() + content).hexdigest()[:32]}.so"


def folder(make: bool = False) -> Path:
    """The folder in the user's cache where functions are kept. OSError if it is not safe."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama3"
    if make:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise PermissionError(f"{path} belongs to others, or others can write to it")
    return path


def load(path: Path) -> Run:
    """Load what was built; the public way, aoti_load_package, imports the compiler for it."""
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run


def check(part: Part, run: Run) -> Run:
    """Return `run` if it does what the plain function does, but for rounding; else ValueError."""
    ours, plain = ([x.clone() for x in part.inputs] for _ in range(2))
    found = [*run([*ours, *part.weights]), *ours]
    for x, y in zip(found, [part.plain(*plain, *part.weights), *plain], strict=True):
        if y.is_floating_point():
            near = max(1e-4, 4 * torch.finfo(y.dtype).eps) * y.nan_to_num(0, 0, 0).abs().max()
            x, y = (z.where(z.isfinite(), math.nan) for z in (x, y))  # infinite, or inf - inf
            if not torch.allclose(x, y, rtol=0, atol=near.item(), equal_nan=True):
                raise ValueError("what was built computes something else")
    return run


def kept(part: Part) -> Run | None:
    """What was built of a part, if it is there and right."""
    key = key_of(part)
    with suppress(OSError, RuntimeError):  # there is no folder, or no home
        for path in folder().glob(f"{key}-*.so"):
            with suppress(Exception):  # or nothing that runs here
                if path.is_file() and path.name == file_name(key, path.read_bytes()):
                    return check(part, load(path))
    return None


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    names = os.environ.get("CXX"), "g++", "clang++"
    return next((name for name in names if name and shutil.which(name)), None)


def accepted(name: str, options: str) -> bool:
    """Whether a compiler knows these options."""
    command = [name, *options.split(), "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """torch.bmm of a few rows, as it compiles to a loop: [B, m, k] @ [B, k, n] -> [B, m, n]."""
    if y.stride(-1) == 1:
        return (x.float()[..., None] * y.float()[:, None]).sum(2).to(x.dtype)
    return (x.float()[:, :, None] * y.mT.float()[:, None]).sum(3).to(x.dtype)


def compiled(part: Part, name: str) -> bytes:
    """A part as a library, compiled in a folder whose name has no spaces: it is not quoted."""

    def traced(*inputs: Tensor) -> Tensor:
        return part.function(*inputs)

    inputs, graph = part.inputs + part.weights, torch.fx.Graph()
    places = tuple(graph.placeholder(f"x{i}") for i in range(len(inputs)))
    graph.output(graph.call_function(traced, places))  # of one call, which is traced into
    size = functools.partial(torch.export.Dim, min=2)
    sizes = tuple({i: size(dim) for i, dim in dims.items()} for dims in part.open_sizes)
    exported = torch.export.export(torch.fx.GraphModule({}, graph), inputs, dynamic_shapes=sizes)
    table = torch.export.default_decompositions()
    table[torch.ops.aten.bmm.default] = sum_of_products  # else a call, which costs more
    contract = "fast"  # fused multiply and add
    if sys.platform == "linux" and "clang" not in compiler():
        contract += PREFETCH  # there is no other way to give the compiler an option
        contract += WHOLE_VECTORS * accepted(compiler(), WHOLE_VECTORS)
    options = {
        "cpp.cxx": (None, compiler()),
        "aot_inductor.compile_wrapper_opt_level": "O0",  # it only calls the loops
        "cpp.enable_floating_point_contract_flag": contract,
        "realize_reads_threshold": 0,  # what several products read is computed once
        "cpp.max_horizontal_fusion_size": 4,  # four quarters of a matrix in one loop, not eight
    }
    more = dict.fromkeys(("opcount", "acc_reads", "cpu_opcount", "cpu_acc_reads"), 10**6)
    more = {f"realize_{name}_threshold": n for name, n in more.items()}  # one loop, however long
    more["unroll_reductions_threshold"] = 9  # sums of up to 8 numbers are written out
    more["cpp_cache_precompile_headers"] = False  # in a folder that others may know
    options |= {name: n for name, n in more.items() if hasattr(torch._inductor.config, name)}
    package = torch._inductor.aoti_compile_and_package(
        exported.run_decompositions(table),
        package_path=f"{name}/function.pt2",
        inductor_configs=options,
    )
    with zipfile.ZipFile(package) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(".so")))


def build(part: Part) -> Run:
    """Build a part, check it and keep it. Raises whatever the compiler raises."""
    key, home, before = key_of(part), folder(make=True), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    useless = [*home.glob(f"{key}[-.]*")]  # damaged, wrong, or a mark that it failed
    logging.disable(logging.ERROR)  # what the compiler has to say is for those who develop it
    try:
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = name  # else a folder that others may know
            content = compiled(part, name)
    finally:
        logging.disable(logging.NOTSET)
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        os.environ |= {} if before is None else {"TORCHINDUCTOR_CACHE_DIR": before}
    new = home / file_name(key, content)
    with tempfile.TemporaryDirectory(dir=home) as name:
        path = Path(name, new.name)
        path.write_bytes(content)
        run = check(part, load(path))
        path.replace(new)
    for old in useless:
        with suppress(OSError):
            old.unlink()
    return run


def runs_of(
    parts: Iterable[Part], wanted: bool, again: bool = False, what: str = "the step of one token"
) -> dict[str, Run]:
    """What is built of parts, by key; what is not there yet is built now, if that is wanted.

    again: also what could not be built before. A line on standard error says why something fails.
    what: the parts, in a few words.
    """
    kinds = {key_of(part): part for part in parts}
    runs = {key: kept(part) for key, part in kinds.items()}
    missing = [key for key, run in runs.items() if run is None]
    try:
        if missing and wanted:
            home = folder(make=True)
            if compiler() is None:
                raise RuntimeError("there is no C++ compiler (g++ or clang++)")
            marks, yesterday = [home / f"{key}.failed" for key in missing], time.time() - 86400
            if not again and any(m.exists() and m.stat().st_mtime > yesterday for m in marks):
                raise RuntimeError("that failed today; --compile tries it again")
            note(f"building {what} for this machine, which is done once")
            for key in bar("building", " functions", delay=0)(missing):
                try:
                    runs[key] = build(kinds[key])
                except Exception as error:
                    if not isinstance(error, OSError):
                        (home / f"{key}.failed").touch()
                    raise
    except Exception as error:  # it fails in many ways
        text = str(error).partition("Output:\n")[2] or str(error)  # the compiler's own words
        reason = one_line(text.strip().partition("\n")[0] or error)
        note(f"{what} is not built, continuing without: {reason}")
    return {key: run for key, run in runs.items() if run is not None}
