"""The `train:` section: its defaults, its parts, its mistakes."""

import pytest

from core.config import Source, parse
from core.errors import UserError
from training.config import TrainConfig


def train(**options):
    return parse(TrainConfig, options, Source("run.yaml"))


def test_parts_are_resolved_and_survive_a_round_trip():
    config = train(optimizer={"name": "muon", "lr": 0.01}, schedule="trapezoid", objective=None)
    assert config.optimizer.lr == 0.01
    assert config.schedule.name == "wsd"
    assert parse(TrainConfig, config.dump()).dump() == config.dump()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimiser": "adamw"}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"optimizer": {"name": "adamw", "lr": -1}}, "optimizer.lr: input should be greater"),
        ({"schedule": {"name": "cosine", "warm": 3}}, "unknown key 'warm'; did you mean 'warmup'"),
        ({"objective": "causal"}, "did you mean 'causal_lm'"),
        ({"ema": 1.0}, "ema: input should be less than 1"),
        ({"steps": 0}, "steps: input should be greater than 0"),
        ({"precision": "fp16"}, "precision: input should be 'fp32' or 'bf16'"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError) as caught:
        train(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
