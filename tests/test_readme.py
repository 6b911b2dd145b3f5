"""What the README shows works as it stands there."""

import re
from pathlib import Path

import torch
import yaml

from core.config import parse
from launcher.config import RunConfig
from model.zoo import build_model
from parallel.check import check_model
from parallel.layout import Layout

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")


def test_the_config_is_valid_and_fits_its_layout():
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    config = parse(RunConfig, yaml.safe_load(shown))
    model = config.model.replace(vocab=4096, max_length=512)
    with torch.device("meta"):
        built = build_model(model)
    check_model(Layout.of(config.parallel, 4), built)


def test_the_library_example_runs():
    from model import create_model, list_models
    from model.norms import RMSNorm

    assert 'list_models("swin*")' in TEXT and "from model.norms import RMSNorm" in TEXT
    assert "swin_tiny_patch4_window7_224" in list_models("swin*")
    (name,) = re.findall(r'create_model\("(\w+)", seed=0\)', TEXT)
    with torch.device("meta"):
        create_model(name)
    assert RMSNorm(8)(torch.ones(1, 1, 8)).shape == (1, 1, 8)


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (root / target).exists(), target


def test_commands_exist():
    from typer.main import get_command

    from launcher.cli import app

    known = get_command(app).commands
    for word in set(re.findall(r"manyforms (\w+)", TEXT)):
        assert word in known, f"manyforms {word}"
