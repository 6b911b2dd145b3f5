"""`manyforms zoo --check`: a user's file goes through the contracts."""

from launcher.contracts import check

PLUGIN = '''
from torch import nn
from core.registry import register
from model.leaves import NormVector

@register("norm", "checked_{name}")
class Checked(nn.Module):
    """Scales by the root mean square."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = NormVector(dim)

    def forward(self, x_BTD):
        return x_BTD * (x_BTD.square().mean({axes}, keepdim=True) + 1e-6).rsqrt() * self.gain()
'''


def run(tmp_path, capsys, name, axes):
    path = tmp_path / f"{name}.py"
    path.write_text(PLUGIN.format(name=name, axes=axes), encoding="utf8")
    code = check(path)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    return code, {row[2]: row[0] for row in rows}


def test_a_right_mechanism_is_proven(tmp_path, capsys):
    code, marks = run(tmp_path, capsys, "right", "-1")
    assert code == 0 and set(marks.values()) == {"ok"}
    assert {"causal", "tp", "sp", "fsdp", "replicate", "reshard"} <= set(marks)


def test_one_that_looks_ahead_fails_where_it_must(tmp_path, capsys):
    code, marks = run(tmp_path, capsys, "ahead", "(1, 2)")
    assert code == 1
    assert {c for c, mark in marks.items() if mark == "FAILED"} >= {"causal", "documents", "sp"}
    assert marks["gradients"] == marks["tp"] == "ok"
