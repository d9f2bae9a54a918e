"""Running the program in this process, for the tests in this folder."""

import re

import torch
from conftest import DEMO, config_of, random_weights

from cli.main import main
from tokenizer_setup import stop_tokens

SUM = ["--prompt", "17 plus 8 is "]  # which the demo continues with "25."
OPENING = re.compile(r"(llama3\.py: using the model in .*\n)?(llama3\.py: found in .*\n)?")


def run_main(capsys, *arguments, status=0):
    """What the program writes to standard output, and to standard error after its first lines.

    Those say which model it is.
    """
    found = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err[OPENING.match(err).end() :]


def refused(capsys, *arguments):
    """The one line with which the program refuses `arguments`, without what every refusal has."""
    out, err = run_main(capsys, *arguments, status=2)
    assert out == ""
    assert err.startswith("llama3.py: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("llama3.py: error: ").removesuffix("\n")


def write_endless_model(folder, tokenizer):
    """Write a small model with the demo's tokenizer that never chooses a stop token."""
    config = config_of(folder, vocab_size=tokenizer.n_vocab, n_layers=1)
    weights = random_weights(config)
    for token in stop_tokens(tokenizer):  # their logits are 0, and some of the others above
        weights["output.weight"][token] = 0
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    return folder
