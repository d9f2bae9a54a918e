"""Draw decode.png from results.json: the time of a token over the length of the context.

python benchmarks/plot.py
"""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent


def main() -> None:
    records = json.loads((HERE / "results.json").read_text())
    plain = (record for record in records if record.get("format") in (None, "BF16", "F16", "F32"))
    records = {(record["size"], record["processor"]): record for record in plain}  # the last each
    figure, panels = plt.subplots(1, len(records), figsize=(5 * len(records), 4), squeeze=False)
    for axes, record in zip(panels[0], records.values(), strict=True):
        decode = {f: t for f, t in record["figures"].items() if f.startswith("decode")}
        lengths = [int(figure.split()[-1]) for figure in decode]
        for name in next(iter(decode.values())):
            times = [1000 * statistics.median(turns[name]) for turns in decode.values()]
            axes.plot(lengths, times, "o-", label=name)
        read = record["model"]["cache"]
        limit = [
            1000 * (record["model"]["stored"] + read * length) / record["machine"]["bytes_s"]
            for length in lengths
        ]
        axes.plot(lengths, limit, "k:", label="reading weights and cache once")
        axes.set(
            title=f"{record['size']}, {record['dtype']}\n{record['processor']}",
            xlabel="tokens in the context",
            ylabel="ms a token",
            xticks=lengths,
            ylim=(0, None),
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.title.set_fontsize(9)
    figure.tight_layout()
    figure.savefig(HERE / "decode.png", dpi=110)


if __name__ == "__main__":
    main()
