"""Vision models: what enters the first block, stages, heads, reconstruction, and mistakes."""

import pytest
import torch

from core.config import Source, parse
from core.errors import UserError
from model.block import Block
from model.init import initialise
from model.leaves import DropPath
from model.vision import VisionConfig, VisionModel
from model.vision_heads import Reconstruction
from model.zoo import build_model

BLOCK = {
    "norm": "layernorm",
    "mixer": {"name": "attention", "heads": 2},
    "position": "none",
    "feedforward": {"name": "mlp", "ratio": 2},
}
COLUMNAR = {
    "kind": "vision", "image_size": 8, "channels": 1, "classes": 5, "dim": 16, "depth": 2,
    "stem": {"name": "patch", "patch": 2}, "block": {**BLOCK, "position": "learned"},
}  # fmt: skip
STAGES = {
    "kind": "vision", "image_size": 16, "channels": 2, "classes": 5,
    "stem": {"name": "patch", "patch": 2}, "block": BLOCK,
    "stages": [{"dim": 8, "depth": 1}, {"dim": 12, "depth": 3}, {"dim": 16, "depth": 2}],
}  # fmt: skip


def model(config, seed=0, **changes):
    built = build_model({**config, **changes})
    initialise(built, seed)
    for index, (_, parameter) in enumerate(sorted(built.named_parameters())):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


def images(config, batch=3, seed=0):
    shape = (batch, config["channels"], config["image_size"], config["image_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [COLUMNAR, STAGES])
def test_targets_give_losses_beside_the_logits(config):
    built, x = model(config), images(config)
    targets = torch.tensor([4, -100, 0])
    output, plain = built({"images": x, "targets": targets}), built({"images": x})
    assert plain.token_losses is None
    assert torch.equal(output.logits, plain.logits)
    log_p = plain.logits.log_softmax(-1)
    expected = torch.stack([-log_p[0, 4], torch.tensor(0.0), -log_p[2, 0]])
    torch.testing.assert_close(output.token_losses, expected)


def test_mean_pool_reads_every_token_and_class_token_the_first():
    x = images(COLUMNAR)
    mean = model(COLUMNAR, pool="mean")
    output = mean({"images": x})
    tokens = output.stream.hidden
    assert tokens.shape == (3, 16, 16)
    head = mean.head.linear
    expected = tokens.mean(1) @ head.weight.T + head.bias
    torch.testing.assert_close(output.logits, expected)

    first = model(COLUMNAR, pool="class_token")
    output = first({"images": x})
    tokens = output.stream.hidden
    assert tokens.shape == (3, 17, 16)
    head = first.head.linear
    torch.testing.assert_close(output.logits, tokens[:, 0] @ head.weight.T + head.bias)


def test_distilled_averages_two_heads_on_two_tokens():
    built = model(COLUMNAR, pool="distilled")
    output = built({"images": images(COLUMNAR)})
    tokens, (one, two) = output.stream.hidden, (built.head.linear, built.head.distilled)
    assert tokens.shape == (3, 18, 16)
    first = tokens[:, 0] @ one.weight.T + one.bias
    second = tokens[:, 1] @ two.weight.T + two.bias
    torch.testing.assert_close(output.logits, (first + second) / 2)


def test_a_norm_after_pooling_replaces_the_one_before():
    built = model(STAGES, pool_norm="rmsnorm")
    assert built.stages[-1].stack.norm is None
    output = built({"images": images(STAGES)})
    pooled = output.stream.hidden.mean(1)
    normed = torch.nn.functional.rms_norm(pooled, (16,), built.head.norm.gain.weight, 1e-6)
    expected = normed @ built.head.linear.weight.T + built.head.linear.bias
    torch.testing.assert_close(output.logits, expected)
    assert [stage.stack.norm is not None for stage in model(STAGES).stages] == [False, False, True]


def test_prefix_and_positions_enter_before_the_first_block():
    built, x = model(COLUMNAR, pool="distilled"), images(COLUMNAR)
    patches, grid = built.stem(x)
    stream = built.embed({"images": x})
    assert stream.grid == grid == (4, 4)
    table = built.position.table.weight
    torch.testing.assert_close(stream.hidden[:, 2:], patches + table[2:])
    torch.testing.assert_close(stream.hidden[1, :2], built.prefix.weight + table[:2])


def test_stages_halve_the_grid_and_count_layers_through():
    built = model(STAGES, block={**BLOCK, "drop_path": 0.5})
    found = built.features({"images": images(STAGES)})
    assert [grid for _, grid in found] == [(8, 8), (4, 4), (2, 2)]
    assert [tuple(x.shape) for x, _ in found] == [(3, 64, 8), (3, 16, 12), (3, 4, 16)]
    blocks = [m for m in built.modules() if isinstance(m, Block)]
    rates = [next(m.rate for m in b.modules() if isinstance(m, DropPath)) for b in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert built.depth == 6


def test_windows_shift_by_the_place_in_their_stage():
    mixer = {"name": "window_attention", "window": 2, "heads": 2}
    built = model(STAGES, block={**BLOCK, "mixer": mixer})
    shifts = [
        [block.sublayers["mixer"].branch.shifts for block in stage.stack.blocks]
        for stage in built.stages
    ]
    assert shifts == [[False], [False, True, False], [False, True]]


def test_features_stand_before_the_last_norm():
    built, x = model(COLUMNAR, pool="class_token"), images(COLUMNAR)
    found = built.features({"images": x})
    assert len(found) == 2
    assert all(t.shape == (3, 16, 16) and grid == (4, 4) for t, grid in found)
    normed = built.stages[0].stack.norm(found[-1][0])
    torch.testing.assert_close(normed, built({"images": x}).stream.hidden[:, 1:])


def test_features_settle_what_a_residual_leaves_pending():
    built = model(COLUMNAR, block={**COLUMNAR["block"], "residual": "ladder"}, pool="mean")
    x = images(COLUMNAR)
    last = built.features({"images": x})[-1][0]
    torch.testing.assert_close(built.stages[0].stack.norm(last), built({"images": x}).stream.hidden)


def slow_reconstruction(built, tokens, x, mask, kind):
    """The loss image by image, patch by patch, pixel by pixel."""
    head = built.reconstruction.linear
    rows, columns = built.reconstruction.grid
    cell = x.shape[2] // rows
    tokens = tokens[:, -rows * columns :] @ head.weight.T + head.bias
    predicted = torch.zeros_like(x)
    for r in range(rows):
        for c in range(columns):
            values = tokens[:, r * columns + c].view(len(x), x.shape[1], cell, cell)
            predicted[:, :, r * cell : (r + 1) * cell, c * cell : (c + 1) * cell] = values
    losses = []
    side = built.grid[1]
    patch = x.shape[3] // side
    for b in range(len(x)):
        errors = []
        for p in mask[b].nonzero().flatten().tolist():
            at = (
                slice(p // side * patch, (p // side + 1) * patch),
                slice(p % side * patch, (p % side + 1) * patch),
            )
            wanted, got = x[b, :, *at], predicted[b, :, *at]
            if kind == "normalised_pixels":
                wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-6).sqrt()
                errors.append((got - wanted).square().mean())
            else:
                errors.append((got - wanted).abs().mean())
        losses.append(torch.stack(errors).mean() if errors else torch.tensor(0.0))
    return torch.stack(losses)


@pytest.mark.parametrize("kind", ["pixels", "normalised_pixels"])
@pytest.mark.parametrize("config", [{**COLUMNAR, "pool": "class_token"}, STAGES])
def test_reconstruction_is_its_formula(config, kind):
    built, x = model(config, reconstruct=kind), images(config)
    mask = torch.rand(3, built.patches, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1] = False
    output = built({"images": x, "mask": mask})
    assert output.logits is None
    expected = slow_reconstruction(built, output.stream.hidden, x, mask, kind)
    torch.testing.assert_close(output.token_losses, expected)
    assert expected[1] == 0 and expected[0] > 0


@pytest.mark.parametrize("config", [COLUMNAR, STAGES])
def test_masked_pixels_are_hidden_from_the_model(config):
    built, x = model(config, reconstruct="pixels"), images(config)
    mask = torch.zeros(3, built.patches, dtype=torch.bool)
    mask[:, 1] = True
    changed = x.clone()
    changed[:, :, :2, 2:4] += 5  # the pixels of patch 1
    seen = [built({"images": i, "mask": mask}).stream.hidden for i in (x, changed)]
    assert torch.equal(*seen)
    seen = [built({"images": i, "mask": ~mask}).stream.hidden for i in (x, changed)]
    assert not torch.allclose(*seen)


@pytest.mark.parametrize("config", [COLUMNAR, STAGES])
def test_reconstruction_trains_every_parameter(config):
    built, x = model(config, reconstruct="pixels", classes=None), images(config)
    mask = torch.arange(built.patches) % 3 == 0
    built({"images": x, "mask": mask.expand(3, -1)}).token_losses.sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_reconstruction_needs_sides_that_tokens_divide():
    with pytest.raises(UserError, match="5 tokens do not divide 18 pixels"):
        Reconstruction(8, 1, (18, 18), (9, 9), (5, 5), "pixels")


def test_images_need_not_be_square():
    built = model(COLUMNAR, image_size=[4, 12], pool="class_token")
    assert built({"images": torch.zeros(2, 1, 4, 12)}).logits.shape == (2, 5)
    assert built.patches == 12


def test_without_positions_images_may_have_another_size():
    built = model({**STAGES, "block": {**BLOCK, "mixer": "pooling"}})
    assert built({"images": torch.zeros(1, 2, 24, 8)}).logits.shape == (1, 5)


def test_a_config_survives_being_written():
    config = parse(VisionConfig, {**STAGES, "reconstruct": "pixels", "image_size": [16, 32]})
    assert parse(VisionConfig, config.dump()) == config
    assert parse(VisionConfig, VisionConfig().dump()) == VisionConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"dim": 8, "depth": 1}]}, "either dim and depth, or stages"),
        ({"stages": [], "dim": None, "depth": None}, "at least one"),
        ({"pool": "class_tokens"}, "pool"),
        ({"stem": "path"}, "unknown stem 'path'; did you mean 'patch'"),
        ({"dim": 0}, "dim: input should be greater than 0"),
        ({"clases": 3}, "unknown key 'clases'; did you mean 'classes'"),
    ],
)
def test_config_mistakes_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        parse(VisionConfig, {**COLUMNAR, **changes}, Source("model"))


def test_a_class_token_needs_a_columnar_model():
    with pytest.raises(UserError, match="needs a columnar model"):
        parse(VisionConfig, {**STAGES, "pool": "class_token"})


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (COLUMNAR, {"images": (1, 1, 6, 6)}, "images of 6×6 pixels, but this model is for 8×8"),
        (COLUMNAR, {"images": (1, 1, 7, 8)}, "do not divide into patches of 2"),
        (COLUMNAR, {"images": (1, 1, 8, 8), "mask": (1, 16)}, "masked images need"),
        (
            {**COLUMNAR, "classes": None},
            {"images": (1, 1, 8, 8), "targets": (1,)},
            "targets need a head",
        ),
    ],
)
def test_batches_that_do_not_fit_are_told(config, batch, message):
    kinds = {"images": torch.float32, "mask": torch.bool, "targets": torch.long}
    with pytest.raises(UserError, match=message):
        model(config)({k: torch.zeros(shape, dtype=kinds[k]) for k, shape in batch.items()})


def test_sizes_from_data_must_be_known_to_build():
    with pytest.raises(UserError, match="must be numbers"):
        VisionModel(VisionConfig(channels=3, image_size=8))
