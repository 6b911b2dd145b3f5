"""Published language models have exactly their published parameter counts."""

import pytest
import torch

from model.zoo import create_model, list_models

COUNTS = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "tinyllama_1b": 1_100_048_384,
    "mixtral_8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_they_are_listed():
    assert list_models("gpt2*") == ["gpt2", "gpt2_large", "gpt2_medium", "gpt2_xl"]
    assert set(COUNTS) <= set(list_models())
