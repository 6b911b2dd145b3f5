import torch

from tests.references import import_timm, import_transformers


def test_timm_builds_a_published_model() -> None:
    """Swin-T (2103.14030) has 28 million parameters."""
    model = import_timm().create_model("swin_tiny_patch4_window7_224")
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_288_354


def test_transformers_builds_a_published_model() -> None:
    """GPT-2 has 124 million parameters."""
    transformers = import_transformers()
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
