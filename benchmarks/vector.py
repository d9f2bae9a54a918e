"""One vector times a matrix, in the forms that a decode step can take.

    python benchmarks/vector.py

x @ w.T, as llama3.py multiplies; w @ x, PyTorch's product for this; and the sum of cli/step.py,
as built, over the rows and over their quarters.
The forms take turns; a line gives the median of each in GB of the matrix a second, and what it
reaches of the fastest plain sum over as many bytes.
"""

import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from run import processor  # noqa: E402

import llama3  # noqa: E402
from cli import build, step  # noqa: E402

ROWS, COLUMNS, TURNS = 32768, 2048, 15


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    print(f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    numbers = torch.ones(2**27)
    limit = numbers.nbytes / min(seconds(numbers.sum) for _ in range(TURNS)) / 1e9
    print(f"a plain sum reads {limit:.1f} GB/s")
    warnings.simplefilter("ignore")  # of the compiler
    for stored, computed in (
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
        ("bfloat16", "float32"),
    ):
        w = torch.randn(ROWS, COLUMNS).to(llama3.DTYPES[stored])
        x = torch.randn(1, 1, COLUMNS).to(llama3.DTYPES[computed])
        forms = {"x @ w.T": llama3.product}
        for name, parts in (("built", w[None]), ("built, in quarters", step.in_quarters(w))):
            part = step.matrix_part(w, x.dtype)._replace(weights=(parts,))
            run = build.kept(part) or build.build(part)
            forms[name] = lambda x, w, run=run, parts=parts: run([x, parts])[0]
        if stored == computed:
            forms["w @ x"] = lambda x, w: (w @ x.flatten()).view(1, 1, -1)
        times = {name: [] for name in forms}
        for turn in range(TURNS + 2):  # the first two warm up
            for name, form in forms.items():
                taken = seconds(form, x, w)
                if turn > 1:
                    times[name].append(taken)
        rates = {name: w.nbytes / statistics.median(taken) / 1e9 for name, taken in times.items()}
        shown = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        print(f"{stored} weights, computed in {computed}: {shown} GB/s", flush=True)


if __name__ == "__main__":
    main()
