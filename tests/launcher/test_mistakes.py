"""Every mistake of a user ends in one line on standard error and exit code 2."""

import os
import re
from pathlib import Path

import pytest
import yaml

from launcher.cli import call
from tests.launcher.command import manyforms


def mistake(capsys, *words):
    """Call the command; the line it says, after checking that it is one line and the code is 2."""
    code = call([str(word) for word in words])
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.count("\n") == 1 and said.err.startswith("manyforms: "), said.err
    assert not said.out, said.out
    return said.err.strip()


def line_of(config, text):
    """`file:line` of the first line of a config that contains a text."""
    lines = config.read_text().splitlines()
    return f"{config}:{next(n for n, line in enumerate(lines, 1) if text in line)}"


def edit(config, old, new):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def test_wrong_key(tiny, capsys):
    edit(tiny, "global_batch", "globl_batch")
    said = mistake(capsys, "train", tiny)
    assert line_of(tiny, "globl_batch") in said
    assert "unknown key 'globl_batch'; did you mean 'global_batch'?" in said


def test_wrong_key_inside_the_model(tiny, capsys):
    edit(tiny, "depth: 2", "deep: 2")
    said = mistake(capsys, "train", tiny)
    assert f"{line_of(tiny, 'deep')}: model.deep: unknown key" in said


def test_wrong_key_on_the_command_line(tiny, capsys):
    said = mistake(capsys, "train", tiny, "train.step=3")
    assert "command line: train.step: unknown key 'step'; did you mean 'steps'?" in said


def test_wrong_type(tiny, capsys):
    edit(tiny, "steps: 6", "steps: many")
    said = mistake(capsys, "train", tiny)
    assert re.search(r"train\.steps: .*integer.*\(got 'many'\)", said)
    assert line_of(tiny, "many") in said


def test_wrong_option_of_a_part(tiny, capsys):
    said = mistake(capsys, "train", tiny, "model.block.mixer.heds=2")
    assert "model.block.0.mixer.heds" in said and "did you mean 'heads'?" in said


def test_not_an_override(tiny, capsys):
    assert "write it as key.sub=value" in mistake(capsys, "train", tiny, "steps")


def test_missing_config(tmp_path, tiny, capsys):
    said = mistake(capsys, "train", tmp_path / "tinny.yaml")
    assert "no such file; did you mean 'tiny.yaml'?" in said


def test_missing_data_file(tiny, tmp_path, capsys):
    said = mistake(capsys, "train", tiny, f"data.sources={tmp_path / 'test.txt'}")
    assert f"{tmp_path / 'test.txt'}: no such file or folder; did you mean 'text.txt'?" in said


def test_empty_data(tiny, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    said = mistake(capsys, "train", tiny, f"data.sources={tmp_path / 'empty.txt'}")
    assert "there is no text in it" in said
    assert not (tmp_path / "run").exists()


def test_unknown_mechanism(tiny, capsys):
    edit(tiny, "name: attention", "name: atention")
    said = mistake(capsys, "train", tiny)
    assert "unknown mixer 'atention'; did you mean 'attention'?" in said
    assert line_of(tiny, "atention") in said


def test_unknown_kind_of_model(tiny, capsys):
    said = mistake(capsys, "train", tiny, "model.kind=visual")
    assert "unknown kind 'visual'" in said


def test_tensor_parallelism_that_does_not_divide_the_heads(tiny, capsys):
    words = ["parallel.tp=4", "model.dim=32", "--nproc", "4"]
    said = mistake(capsys, "train", tiny, *words)
    assert "parallel.tp: 4 does not divide heads (2)" in said and "use parallel.tp=2" in said


def test_more_processes_than_the_layout_needs(tiny, capsys):
    said = mistake(capsys, "train", tiny, "parallel.replicate=1", "--nproc", "3")
    assert "more processes than the layout needs" in said


def test_global_batch_that_does_not_divide(tiny, capsys):
    said = mistake(capsys, "train", tiny, "train.global_batch=5", "--nproc", "2")
    assert "train.global_batch: 5 is not a multiple of 2" in said
    assert "the nearest that works is 4" in said


def test_fewer_micro_batches_than_the_pipeline_needs(tiny, capsys):
    said = mistake(capsys, "train", tiny, "parallel.pp=2", "--nproc", 2)
    assert "1f1b on 2 pipeline ranks cannot run a step of 1 micro-batch; it can of 2" in said
    assert said.endswith("use train.micro_batch=2")


def test_more_stages_than_the_model_can_be_cut_into(tiny, capsys):
    pipeline = ("parallel.pp=5", "parallel.schedule=gpipe", "--nproc", 5)
    said = mistake(capsys, "train", tiny, *pipeline)
    assert "5 stages are too many for this model, which can be cut into 4 at most" in said


def test_run_folder_that_cannot_be_written(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = mistake(capsys, "train", tiny, f"run.dir={tmp_path / 'file' / 'run'}")
    assert "cannot be written" in said and "run.dir=" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_run_folder_without_permission(tiny, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    said = mistake(capsys, "train", tiny, f"run.dir={tmp_path / 'closed' / 'run'}")
    assert "Permission denied" in said


def test_existing_run(tiny, tmp_path, capsys):
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    said = mistake(capsys, "train", tiny)
    assert f"manyforms resume {tmp_path / 'run'}" in said and "run.dir=" in said
    assert step.is_dir()


def test_folder_with_other_files(tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "is not empty" in mistake(capsys, "train", tiny)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_sequence_longer_than_the_model_reads(tiny, capsys):
    said = mistake(capsys, "train", tiny, "model.max_length=8")
    assert "data.sequence" in said and "model.max_length (8)" in said


def test_sequence_that_the_context_axis_cannot_divide(tiny, capsys):
    said = mistake(capsys, "train", tiny, "parallel.cp=2", "data.sequence=18")
    assert "data.sequence: parallel.cp: 2 divides tokens in multiples of 4" in said
    assert said.endswith("which 18 is not; use 20")


def test_vocabulary_too_small_for_the_tokenizer(tiny, capsys):
    said = mistake(capsys, "train", tiny, "model.vocab=5")
    assert "command line: model.vocab: 5 is too small" in said


def test_more_heads_than_fit(tiny, capsys):
    assert "dim (16) must be a multiple of heads (3)" in mistake(
        capsys, "train", tiny, "model.block.mixer.heads=3"
    )


def test_images_for_a_language_model(tiny, capsys):
    said = mistake(capsys, "train", tiny, "data.sources=sklearn_digits")
    assert "source sklearn_digits has no text" in said


def test_classes_that_differ_from_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MANYFORMS_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "digits.yaml"
    config.write_text("model: {kind: vision, classes: 3}\ndata: {sources: sklearn_digits}\n")
    said = mistake(capsys, "train", config)
    assert f"{config}:1: model.classes: 3 does not fit the data's 10" in said


def test_declared_impossible(tiny, tmp_path, capsys):
    (tmp_path / "blind.py").write_text(
        "from core.registry import register\n"
        "from torch import nn\n"
        "@register('norm', 'onlyimages', cannot={'language': 'it needs a grid of pixels'})\n"
        "class OnlyImages(nn.Identity):\n"
        "    def __init__(self, dim: int):\n"
        "        super().__init__()\n"
    )
    tiny.write_text(tiny.read_text() + "plugins: [blind.py]\n")
    said = mistake(capsys, "train", tiny, "model.block.norm=onlyimages")
    assert "norm 'onlyimages' cannot do language models" in said and "a grid of pixels" in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [("import nothing_of_this_name\n", "ModuleNotFoundError"), ("def (:\n", "SyntaxError")],
)
def test_plugin_that_fails(tiny, tmp_path, capsys, text, problem):
    (tmp_path / "broken.py").write_text(text)
    tiny.write_text(tiny.read_text() + "plugins: [broken.py]\n")
    said = mistake(capsys, "train", tiny)
    assert problem in said and f"{tiny}:" in said


def test_missing_plugin(tiny, capsys):
    tiny.write_text(tiny.read_text() + "plugins: [absent.py]\n")
    assert "no such file" in mistake(capsys, "train", tiny)


@pytest.mark.parametrize("command", ["resume", "eval", "generate"])
def test_no_such_run(tmp_path, capsys, command):
    assert "no such folder" in mistake(capsys, command, tmp_path / "absent")


@pytest.mark.parametrize("command", ["list", "verify"])
def test_no_checkpoint(tmp_path, capsys, command):
    assert "no checkpoint there" in mistake(capsys, "checkpoint", command, tmp_path)


def test_unknown_suite(tmp_path, capsys):
    said = mistake(capsys, "eval", tmp_path, "--suite", "hellaswag")
    assert "unknown suite 'hellaswag'" in said and "held-out" in said


def test_nothing_of_that_name_in_the_zoo(capsys):
    assert "did you mean 'rmsnorm'?" in mistake(capsys, "zoo", "show", "rmsnrm")


@pytest.mark.parametrize("words", [["trane"], ["train"], ["train", "a.yaml", "--nproc", "x"]])
def test_the_command_line_itself(capsys, words):
    assert "see manyforms --help" in mistake(capsys, *words)


def test_a_mistake_found_by_a_worker_is_one_line_too(tiny, tmp_path):
    """Two real processes; the trainer finds it, so the folder made for the run goes again."""
    words = ["train", tiny, "train.objective=masked_lm", "train.objective.mask_id=1000"]
    code, out, err = manyforms(*words, "--nproc", "2")
    assert code == 2
    assert err.strip().count("\n") == 0 and err.startswith("manyforms: "), err
    assert "mask_id" in err and not out
    assert not (tmp_path / "run").exists()


def test_a_corrected_command_is_not_met_by_its_own_folder(tiny, capsys):
    mistake(capsys, "train", tiny, "train.objective=masked_lm", "train.objective.mask_id=1000")
    assert call(["train", str(tiny)]) == 0
    assert Path(yaml.safe_load(tiny.read_text())["run"]["dir"], "summary.json").exists()
