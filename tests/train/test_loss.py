"""Head and cross-entropy in pieces against PyTorch's on whole logits."""

from __future__ import annotations

import pytest
import torch

from edgetune.train import loss
from edgetune.train.loss import LossHead, install

IGNORED = -100


def head(bias: bool, smoothing: float) -> tuple[LossHead, torch.nn.Linear]:
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 50, bias=bias, dtype=torch.float64)

    class Model:
        def get_output_embeddings(self) -> torch.nn.Linear:
            return made

    made = torch.nn.Linear(8, 50, bias=bias, dtype=torch.float64)
    made.load_state_dict(plain.state_dict())
    found = install(Model(), smoothing)
    assert found is not None and install(Model(), smoothing) is found
    return found, plain


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients(smoothing: float, bias: bool, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_FLOATS", 50 * 16)  # many pieces
    fast, plain = head(bias, smoothing)
    for module in (fast, plain):
        module.requires_grad_(trains)
    x = torch.randn(2, 60, 8, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    targets = torch.randint(0, 50, (2, 60))
    targets[0, :7] = IGNORED
    fast.targets = targets
    found = fast(ours)
    assert found.shape == (1, 1, 1)
    wanted = torch.nn.functional.cross_entropy(
        plain(theirs).flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing
    )
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)  # summed in float32
    (found.sum() / 3).backward()
    (wanted / 3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
    for mine, other in zip(fast.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) is not trains
        if trains:
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-5)


def test_evaluation_counts_what_is_right_and_does_not_smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_FLOATS", 50 * 16)
    fast, plain = head(False, 0.1)
    fast.eval()
    x, targets = torch.randn(40, 8, dtype=torch.float64), torch.randint(0, 50, (40,))
    logits = plain(x)
    targets[:10] = logits[:10].argmax(-1)
    fast.targets = targets
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert float(fast(x)) == pytest.approx(float(wanted), rel=1e-5)
    assert fast.correct == int((logits.argmax(-1) == targets).sum()) >= 10


def test_without_targets_it_is_the_head() -> None:
    fast, plain = head(True, 0.0)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x))


def test_no_loss_from_no_learned_token() -> None:
    fast, _ = head(False, 0.0)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    fast.targets = torch.full((4,), IGNORED)
    out = fast(x)
    out.sum().backward()
    assert float(out) == 0 and x.grad is not None and not x.grad.any()
