"""Meta's trained weights, for whoever has them: what has been published about Meta-Llama-3-8B.

    LLAMA3_CKPT_DIR=llama-3-8b/original python -m pytest tests/test_meta_weights.py

The folder is that of the base model of 8B, not of Llama 3.1 and not of Instruct. It reads 16 GB.
The numbers are those that naklecha's llama3-from-scratch prints of the same files:
https://github.com/naklecha/llama3-from-scratch
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import PARAMS_8B

import llama3
import tokenizer_setup

PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
PROMPT_TOKENS = [
    *(128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374),
    220,
]
EMBEDDINGS = {  # of the prompt: the first three and the last three numbers of some rows
    0: [-1.4305e-04, 1.0777e-04, -1.9646e-04, 2.0218e-04, 1.4842e-05, 3.0136e-04],
    1: [1.4267e-03, -5.1575e-03, 2.0905e-03, 1.0437e-02, -9.7656e-03, -7.8735e-03],
    2: [-1.1719e-02, 4.4861e-03, 1.1444e-03, 9.0790e-04, 1.0681e-02, -6.7444e-03],
    -1: [-2.1172e-04, -1.5545e-04, 1.5945e-03, -1.6632e-03, 1.1673e-03, -1.1826e-03],
}
FORTY_TWO = 2983  # the token "42"

CKPT_DIR = os.environ.get("LLAMA3_CKPT_DIR")  # as it is before conftest.py hides it from tests


def why_not():
    """Why the folder is not that of Meta-Llama-3-8B, or nothing."""
    if not CKPT_DIR:
        return "LLAMA3_CKPT_DIR does not name the folder of Meta-Llama-3-8B"
    try:
        params = json.loads((Path(CKPT_DIR) / "params.json").read_text())
    except (OSError, ValueError) as error:
        return f"LLAMA3_CKPT_DIR names a folder whose params.json cannot be read: {error}"
    other = [
        key for key in PARAMS_8B.keys() | params.keys() if params.get(key) != PARAMS_8B.get(key)
    ]
    return f"LLAMA3_CKPT_DIR names another model: other {', '.join(sorted(other))}" * bool(other)


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="module")
def config():
    return llama3.load_config(CKPT_DIR)


@pytest.fixture(scope="module")
def weights(config):
    return llama3.load_weights(CKPT_DIR, config)


def test_the_file_holds_the_weights_by_name_in_their_order_with_their_shapes(config):
    (content,) = llama3.map_files(CKPT_DIR)
    shapes = {name: tuple(weight.shape) for name, weight in content.items()}
    assert list(shapes.items()) == list(llama3.weight_shapes(config).items())
    assert {weight.dtype for weight in content.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in content.values()) == 8_030_261_248


def test_the_prompt_becomes_the_published_tokens_and_rows_of_embeddings(weights):
    tokenizer = tokenizer_setup.load_tokenizer(Path(CKPT_DIR) / "tokenizer.model")
    assert tokenizer_setup.encode(tokenizer, PROMPT) == PROMPT_TOKENS
    rows = weights["tok_embeddings.weight"][PROMPT_TOKENS]
    assert [*rows.shape] == [17, 4096]
    for row, published in EMBEDDINGS.items():
        found = [*rows[row, :3].tolist(), *rows[row, -3:].tolist()]
        assert found == pytest.approx(published, rel=5.1e-5), (  # five digits were printed
            "other embeddings: are these the weights of the base model of Llama 3 8B?"
        )


def test_the_answer_to_the_ultimate_question_is_42(config, weights):
    assert list(llama3.generate(PROMPT_TOKENS, weights, config, max_new_tokens=1)) == [FORTY_TWO]
