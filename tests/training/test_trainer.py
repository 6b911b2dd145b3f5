"""The loop: resume, failure, stops, accumulation, what it refuses."""

import json
import math
import os
import signal

import pytest
import torch

from checkpoints.config import CheckpointConfig
from core.errors import UserError
from tests.training.helpers import (
    LANGUAGE,
    Losses,
    language_data,
    make_engine,
    make_trainer,
    vision_data,
)
from training import EXIT_STOPPED, RunFailure
from training.callbacks.base import Callback

DROPPING = {**LANGUAGE, "embedding_dropout": 0.1}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.at, self.action = step, action

    def step(self, trainer, record):
        if trainer.step == self.at:
            self.action(trainer)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_at_25_and_resumed_is_bitwise_the_unbroken_run(tmp_path, optimizer):
    def trainer(folder, **more):
        folder.mkdir(exist_ok=True)
        return make_trainer(
            model=DROPPING,
            steps=50,
            micro_batch=4,
            optimizer=optimizer,
            ema=0.9,
            validate_every=10,
            folder=folder,
            checkpoint=CheckpointConfig(every=1000),
            **more,
        )

    unbroken = trainer(tmp_path / "a").run()
    stop = At(25, lambda t: os.kill(os.getpid(), signal.SIGTERM))
    # The signal arrives within step 25's callbacks, so step 26 is finished and saved.
    first = trainer(tmp_path / "b", callbacks=[stop]).run()
    assert (first.stopped, first.code, first.step) == ("SIGTERM", EXIT_STOPPED, 26)
    second = trainer(tmp_path / "b").run(resume=True)
    assert (second.step, second.code) == (50, 0)

    measured = ("step", "loss", "grad_norm", "learning_rate", "tokens", "val/loss")
    whole, pieces = (
        [{k: r[k] for k in measured if k in r} for r in lines(tmp_path / run / "metrics.jsonl")]
        for run in ("a", "b")
    )
    assert len(whole) == 50
    assert whole == pieces
    assert second.validation == unbroken.validation
    assert second.seconds > first.seconds > 0


def test_resume_drops_what_was_logged_past_the_checkpoint(tmp_path):
    def trainer(**more):
        return make_trainer(
            steps=8,
            folder=tmp_path,
            checkpoint=CheckpointConfig(every=3, **{"async": False}),
            **more,
        )

    class Crash(Exception):
        pass

    def crash(trainer):
        raise Crash

    with pytest.raises(Crash):
        trainer(callbacks=[At(5, crash)]).run()
    before = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in before] == [1, 2, 3, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    trainer().run(resume=True)
    after = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in after] == list(range(1, 9))
    assert [r["loss"] for r in after[:5]] == [r["loss"] for r in before]


def test_resume_from_a_named_step_and_from_nothing(tmp_path):
    checkpoint = CheckpointConfig(every=2, **{"async": False})
    whole = make_trainer(steps=6, folder=tmp_path, checkpoint=checkpoint).run()
    again = make_trainer(steps=6, folder=tmp_path, checkpoint=checkpoint)
    assert again.run(resume=4).metrics["loss"] == whole.metrics["loss"]
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        make_trainer(steps=6, folder=tmp_path, checkpoint=checkpoint).run(resume=3)
    with pytest.raises(UserError, match="keeps no checkpoints"):
        make_trainer().run(resume=True)


def test_a_finished_run_resumes_to_its_own_end_and_may_be_prolonged(tmp_path):
    checkpoint = CheckpointConfig(every=100)
    schedule = {"name": "constant"}
    whole = make_trainer(steps=4, schedule=schedule, folder=tmp_path, checkpoint=checkpoint).run()
    same = make_trainer(steps=4, schedule=schedule, folder=tmp_path, checkpoint=checkpoint)
    outcome = same.run(resume=True)
    assert (outcome.step, outcome.validation) == (4, whole.validation)
    longer = make_trainer(steps=7, schedule=schedule, folder=tmp_path, checkpoint=checkpoint)
    assert longer.run(resume=True).step == 7
    unbroken, prolonged = Losses(), lines(tmp_path / "metrics.jsonl")
    make_trainer(steps=7, schedule=schedule, callbacks=[unbroken]).run()
    assert [r["loss"] for r in prolonged] == unbroken.losses


def test_micro_batches_give_the_same_run():
    whole, parts = Losses(), Losses()
    make_trainer(micro_batch=8, callbacks=[whole]).run()
    make_trainer(micro_batch=2, callbacks=[parts]).run()
    assert whole.losses == pytest.approx(parts.losses, rel=1e-5)
    assert whole.losses[-1] < whole.losses[0]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(tmp_path):
    data = language_data()

    def poison(trainer):
        with torch.no_grad():
            next(iter(trainer.engine.model.parameters())).fill_(math.nan)
        trainer.poisoned = {n: p.clone() for n, p in trainer.engine.model.named_parameters()}

    trainer = make_trainer(
        data, steps=9, folder=tmp_path, checkpoint=CheckpointConfig(), callbacks=[At(3, poison)]
    )
    with pytest.raises(RunFailure) as caught:
        trainer.run()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data rank 0, step 4: the loss is nan")
    for name, parameter in trainer.engine.model.named_parameters():
        assert torch.equal(parameter, trainer.poisoned[name]) or parameter.isnan().all()
    events = lines(tmp_path / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "failure"]
    assert events[-1]["cause"] == message
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_ends_the_run():
    class Overflowing(type(make_trainer().objective)):
        def __call__(self, model, batch):
            sums = super().__call__(model, batch)
            tiny = sums["loss"] * 0.0
            return {**sums, "loss": sums["loss"] + tiny.sqrt()}  # 0 with an infinite slope

    trainer = make_trainer()
    trainer.objective = Overflowing()
    with pytest.raises(RunFailure, match="step 1: the gradient's norm is nan"):
        trainer.run()


def test_ctrl_c_saves_and_the_second_stops_at_once(tmp_path, monkeypatch):
    def interrupt(trainer):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # relayed by the parent: the same one

    checkpoint = CheckpointConfig(every=100)
    former = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(folder=tmp_path, checkpoint=checkpoint, callbacks=[At(2, interrupt)])
    outcome = trainer.run()
    assert (outcome.stopped, outcome.step, outcome.code) == ("SIGINT", 3, EXIT_STOPPED)
    assert [found.step for found in trainer.store.list()] == [3]
    assert signal.getsignal(signal.SIGINT) is former
    kinds = [event["event"] for event in lines(tmp_path / "events.jsonl")]
    assert kinds == ["start", "save", "stop"]

    monkeypatch.setattr("training.callbacks.stop.TWICE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[At(2, interrupt)]).run()
    assert signal.getsignal(signal.SIGINT) is former


def test_ema_is_what_validation_measures_and_the_weights_come_back():
    trainer = make_trainer(steps=5, ema=0.5, schedule="constant")
    expected = {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}

    class Follow(Callback):
        def step(self, trainer, record):
            decay = min(0.5, (1 + trainer.step) / (10 + trainer.step))
            for name, p in trainer.engine.model.named_parameters():
                expected[name] = decay * expected[name] + (1 - decay) * p.detach()

    trainer.callbacks.append(Follow())
    outcome = trainer.run()
    weights = {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}
    assert outcome.validation["loss"] != pytest.approx(plain_loss(trainer), rel=1e-6)
    with trainer.averaged():
        for name, p in trainer.engine.model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)
    for name, p in trainer.engine.model.named_parameters():
        assert torch.equal(p, weights[name])


def plain_loss(trainer):
    trainer.average, average = None, trainer.average
    loss = trainer.validate()["loss"]
    trainer.average = average
    return loss


def test_files_of_a_run(tmp_path):
    trainer = make_trainer(
        vision_data(), steps=4, folder=tmp_path, checkpoint=CheckpointConfig(every=2), log_every=2
    )
    outcome = trainer.run()
    records = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [2, 4]
    wanted = {"step", "loss", "grad_norm", "learning_rate", "images", "images_per_second"}
    assert wanted <= set(records[0])
    assert {"val/loss", "val/accuracy"} <= set(records[1])
    assert records[1]["images"] == 32
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["validation"] == outcome.validation
    assert summary["counts"]["parameters"] == sum(
        p.numel() for p in trainer.engine.model.parameters()
    )
    flops = summary["counts"]["training_flops_per_sample"]
    assert records[0]["tflops_per_device"] == pytest.approx(
        flops * records[0]["images_per_second"] / 1e12
    )
    assert summary["seed"] == 0 and summary["seconds"] > 0 and summary["versions"]["torch"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-00000002",
        "step-00000004",
    ]


def test_seed_names_the_run():
    def losses(seed):
        collected = Losses()
        make_trainer(model=DROPPING, seed=seed, steps=3, callbacks=[collected]).run()
        return collected.losses

    assert losses(1) == losses(1)
    assert losses(1)[0] != losses(2)[0]


def test_batches_that_do_not_divide_are_the_users_mistake():
    with pytest.raises(UserError, match="global batch 8 is not a multiple of 3"):
        make_trainer(micro_batch=3)


def test_deterministic_algorithms_by_default_on_the_cpu():
    make_trainer(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    make_trainer()
    assert torch.are_deterministic_algorithms_enabled()


def test_the_last_micro_batch_and_the_first_read_different_samples():
    seen = []

    class Watching(type(make_trainer().objective)):
        def prepare(self, batch, samples):
            seen.append(samples.tolist())
            return batch

    trainer = make_trainer(steps=2, micro_batch=4, engine=make_engine())
    trainer.objective = Watching()
    trainer.data.validation.items.clear()
    trainer.run()
    assert [i for batch in seen for i in batch] == list(range(16))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"recompute": "block"}, 1e-6),
        ({"recompute": "selective"}, 1e-6),
        ({"precision": "bf16"}, 0.02),
    ],
)
def test_recomputation_and_half_precision_train_alike(options, tolerance):
    plain, other = Losses(), Losses()
    make_trainer(callbacks=[plain]).run()
    make_trainer(callbacks=[other], **options).run()
    assert other.losses == pytest.approx(plain.losses, rel=tolerance)
    assert (other.losses != plain.losses) == ("precision" in options)
