"""Curves come from what the runs logged."""

import json
import xml.etree.ElementTree as ElementTree

from benchmarks.curves import main, read


def run(folder, losses):
    folder.mkdir()
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    rows[-1]["val/loss"] = 1.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_smoothing_starts_at_the_first_loss(tmp_path):
    curve = read(run(tmp_path / "one", [4.0, 2.0]))
    assert curve.training[0] == (1.0, 4.0)
    assert abs(curve.training[1][1] - (0.9 * 4 + 2) / 1.9) < 1e-9
    assert curve.held_out == [(2.0, 1.5)]


def test_an_image_with_both_runs(tmp_path):
    folders = [run(tmp_path / name, [3.0, 2.5, 2.0]) for name in ("one", "two")]
    target = tmp_path / "pictures" / "curves.svg"
    assert main([str(target), *map(str, folders)]) == 0
    tags = [element.tag.split("}")[1] for element in ElementTree.parse(target).getroot()]
    assert tags.count("polyline") == 2 and tags.count("circle") == 2


def test_a_folder_without_metrics_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "x.svg"), str(tmp_path)]) == 2
    assert "metrics.jsonl: no such file" in capsys.readouterr().err
