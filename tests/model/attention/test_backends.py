"""Every backend against the reference, which tests/model/mixers holds to the formula."""

import sys
import types

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from core.errors import UserError
from model.attention import Bias, Scores, attend, flash, flex

TOKENS = 63
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
DOCUMENTS = torch.tensor([[0] * 30 + [1] * 20 + [2] * 13, [0] * 63])
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "window on both sides": {"window": 7},
    "documents": {"causal": True, "documents": DOCUMENTS},
    "documents and window": {"window": 5, "documents": DOCUMENTS},
    "bias": {"causal": True, "bias": 1},
    "bias per sample": {"bias": 2, "documents": DOCUMENTS},
    "softcap and scale": {"causal": True, "softcap": 1.5, "scale": 0.7},
    "softcap and bias": {"softcap": 1.5, "bias": 1},
}


def tensors(queries=TOKENS, groups=2, dtype=torch.float32, learn=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, groups, TOKENS, 8), (2, groups, TOKENS, 8))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype).requires_grad_(learn) for x in made]


def scores(case, queries=TOKENS):
    options = dict(CASES[case])
    if rows := options.pop("bias", None):
        bias = torch.randn(rows, 4, queries, TOKENS, generator=torch.Generator().manual_seed(1))
        options["bias"] = bias.requires_grad_()
    return Scores(**options)


def results(backend, case, queries=TOKENS, groups=2):
    """The output and the gradients of queries, keys, values and bias."""
    inputs, asked = tensors(queries, groups), scores(case, queries)
    out = attend(*inputs, asked, backend)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = [x.grad for x in inputs]
    return [out.detach(), *grads, *([] if asked.bias is None else [asked.bias.grad])]


@pytest.fixture
def flex_learns_on_cpu(monkeypatch):
    """PyTorch refuses, for want of a fast kernel, gradients that its plain form can compute."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_check", lambda *_: None)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_flex_is_the_reference(case, groups, flex_learns_on_cpu):
    for ours, expected in zip(
        results("flex", case, groups=groups), results("reference", case, groups=groups), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("case", [case for case in CASES if "softcap" not in case])
def test_sdpa_is_the_reference(case, groups):
    for ours, expected in zip(
        results("sdpa", case, groups=groups), results("reference", case, groups=groups), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("case", ["plain", "causal", "window", "bias"])
@pytest.mark.parametrize("queries", [1, 5])
def test_the_newest_queries_alone(backend, case, queries):
    """As in decoding: keys end where the queries end."""
    with torch.no_grad():
        inputs, asked = tensors(queries, learn=False), scores(case, queries)
        ours, expected = (attend(*inputs, asked, name) for name in (backend, "reference"))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
@pytest.mark.parametrize("case", [{"causal": True}, {"window": 7}, {"causal": True, "window": 4}])
def test_queries_from_the_middle(backend, case):
    q, k, v = tensors(learn=False)
    whole = attend(q, k, v, Scores(**case), "reference")
    some = attend(q[:, :, 20:31], k, v, Scores(first=20, **case), backend)
    torch.testing.assert_close(some, whole[:, :, 20:31])
    one = attend(q[:, :, 20:21], k, v, Scores(first=20, **case), backend)
    torch.testing.assert_close(one, whole[:, :, 20:21])


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
def test_a_bias_made_from_positions(backend):
    q, k, v = tensors(learn=False)
    at = torch.arange(TOKENS)[None]
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def form(slopes_H, queries_BT, keys_BS):
        distance = (queries_BT[:, :, None] - keys_BS[:, None]).abs()
        return -slopes_H[:, None, None] * distance[:, None]

    given = attend(q, k, v, Scores(bias=form(slopes, at, at)), "reference")
    made = attend(q, k, v, Scores(position=Bias(slopes, form, at, at)), backend)
    torch.testing.assert_close(made, given)
    part = Bias(slopes, form, at, at).between(range(3, 5), range(10), slopes[:2])
    torch.testing.assert_close(part, form(slopes, at, at)[:, :2, 3:5, :10])


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
def test_a_query_that_sees_nothing_gets_zeros(backend):
    documents = torch.full((2, TOKENS), 5)
    asked = Scores(documents=documents, key_documents=torch.zeros_like(documents))
    assert not attend(*tensors(learn=False), asked, backend).any()


def test_masks_are_made_once_a_forward():
    scratch = {}
    for _ in range(2):
        for backend in ("reference", "flex"):
            attend(*tensors(learn=False), Scores(causal=True, scratch=scratch), backend)
        attend(*tensors(), Scores(causal=True, window=3, scratch=scratch), "reference")
    assert len(scratch) == 3


def test_flex_says_what_it_cannot_do():
    with pytest.raises(UserError, match="no gradients on a CPU"):
        attend(*tensors(), Scores(), "flex")
    with pytest.raises(UserError, match="no dropout"):
        attend(*tensors(), Scores(dropout=0.1), "flex")
    with pytest.raises(UserError, match="computes in float32"):
        attend(*tensors(dtype=torch.float64), Scores(), "flex")


class FakeFlash(types.ModuleType):
    """The package's two functions, in its layouts and by its documentation, as plain math."""

    def flash_attn_func(self, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap):
        left, right = window_size
        assert dropout_p == 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        s = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        t = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        u = torch.arange(k.shape[2])[None]
        hidden = (u > t) & causal
        hidden = hidden | ((u < t - left) if left >= 0 else False)
        hidden = hidden | ((u > t + right) if right >= 0 else False)
        return (s.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    def flash_attn_varlen_func(self, q, k, v, starts, key_starts, longest, key_longest, **options):
        assert starts.dtype == torch.int32 and torch.equal(starts, key_starts)
        bounds = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        assert longest == key_longest == max(end - start for start, end in bounds)
        pieces = [
            self.flash_attn_func(*(x[None, start:end] for x in (q, k, v)), **options)[0]
            for start, end in bounds
        ]
        return torch.cat(pieces)


@pytest.fixture
def fake_flash(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FakeFlash("flash_attn"))
    return monkeypatch


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("case", [case for case in CASES if "bias" not in case])
def test_flash_is_called_as_documented(case, groups, fake_flash):
    fake_flash.setattr(flash, "_check", lambda *_: None)
    for ours, expected in zip(
        results("flash", case, groups=groups),
        results("reference", case, groups=groups),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_flash_wants_documents_in_one_piece(fake_flash):
    fake_flash.setattr(flash, "_check", lambda *_: None)
    torn = DOCUMENTS.clone()
    torn[0, -1] = 0
    with pytest.raises(UserError, match="stand together"):
        attend(*tensors(), Scores(documents=torn), "flash")


def test_flash_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match="package flash-attn, which is not installed"):
        attend(*tensors(), Scores(), "flash")


def test_flash_says_what_it_cannot_take(fake_flash):
    with pytest.raises(UserError, match="runs on GPUs, these tensors are on cpu"):
        attend(*tensors(), Scores(), "flash")

    def refuses(message, width=8, dtype=torch.bfloat16, **asked):
        """Tensors that say they are on a GPU."""
        q = types.SimpleNamespace(shape=(2, 4, 63, width), dtype=dtype, is_cuda=True)
        with pytest.raises(UserError, match=message):
            attend(q, q, q, Scores(**asked), "flash")

    refuses(r"not torch\.float32; set", dtype=torch.float32)
    refuses("multiple of 8 up to 256 channels, these have 12", width=12)
    refuses("these have 264", width=264)
    refuses("adds no bias", bias=torch.zeros(1))
    refuses("keys end where the queries end", first=3)
    refuses("between two packings", key_documents=DOCUMENTS)
