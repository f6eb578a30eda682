"""Each loss against an oracle written another way (NumPy, float64)."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training tests need the training extra")

from training import loss as L  # noqa: E402


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn((2, 2, 4, 5, 6), generator=g, dtype=torch.float64),
        "labels": (torch.rand((2, 4, 5, 6), generator=g) > 0.5).long(),
        "variance": torch.rand((2, 4, 5, 6), generator=g, dtype=torch.float64) * 2,
    }


def numpy_ce(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    other = np.exp(logits[:, 0]) + np.exp(logits[:, 1])
    chosen = np.where(labels == 1, logits[:, 1], logits[:, 0])
    return np.log(other) - chosen


@pytest.mark.parametrize("form", L.LIKELIHOODS)
def test_likelihood_matches_the_oracle(batch: dict[str, torch.Tensor], form: str) -> None:
    """Each likelihood equals its formula in plain NumPy."""
    eps = 0.05
    f, y, s2 = batch["logits"].numpy(), batch["labels"].numpy(), batch["variance"].numpy() + eps
    ce = numpy_ce(f, y)
    expected = {
        "paper": ce / s2 + 0.5 * np.log(s2),
        "exact": numpy_ce(f / s2[:, None], y),
        "faithful": ce,
    }[form]
    got, plain = L.heteroscedastic(batch["logits"], batch["labels"], batch["variance"], eps, form)
    assert np.allclose(got.numpy(), expected, atol=1e-12)
    assert np.allclose(plain.numpy(), ce, atol=1e-12)


def test_minimum_of_equation_4() -> None:
    """Over sigma^2, CE / (s2 + eps) + 0.5 log(s2 + eps) is least at s2 + eps = 2 CE."""
    eps = 0.05
    logits = torch.tensor([[0.3, -0.4]], dtype=torch.float64).reshape(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 20001)
    labels = torch.zeros((1, 1, 1, 20001), dtype=torch.long)
    s2 = torch.linspace(0.0, 4.0, 20001, dtype=torch.float64).reshape(1, 1, 1, -1)
    value, ce = L.heteroscedastic(logits, labels, s2, eps, "paper")
    best = float(s2.flatten()[value.flatten().argmin()])
    assert best + eps == pytest.approx(2 * float(ce.flatten()[0]), abs=3e-4)


def test_faithful_variance_has_the_same_minimum() -> None:
    """In the task stage the faithful form's loss is least at s2 + eps = 2 CE too."""
    eps = 0.05
    logits = torch.tensor([[0.3, -0.4]]).reshape(1, 2, 1, 1, 1)
    labels, ones = torch.zeros((1, 1, 1, 1), dtype=torch.long), torch.ones(1, 1, 1, 1)
    ce = float(torch.nn.functional.cross_entropy(logits, labels))
    values = torch.linspace(0.2, 2.0, 1801)
    losses = []
    for v in values:
        s = torch.log(v).reshape(1, 1, 1, 1, 1)
        losses.append(L.combine(logits, s, labels, ones, None, eps, "faithful").total)
    assert float(values[int(torch.stack(losses).argmin())]) + eps == pytest.approx(2 * ce, abs=2e-3)


def best_own(logits: torch.Tensor, clean_ce: torch.Tensor | None) -> float:
    """The own variance, of 1901 tried, for which the loss is least."""
    labels, ones = torch.zeros((1, 6, 6, 6), dtype=torch.long), torch.ones(1, 6, 6, 6)
    target = torch.full((1, 1, 6, 6, 6), 0.3)
    values = torch.linspace(0.001, 2.0, 2000)
    losses = []
    for v in values:
        s = torch.log(torch.tensor([0.3, float(v)])).reshape(1, 2, 1, 1, 1).expand(1, 2, 6, 6, 6)
        losses.append(L.combine(logits, s, labels, ones, target, 0.05, "faithful", own=1, clean_ce=clean_ce).total)
    return float(values[int(torch.stack(losses).argmin())])


def test_own_variance_takes_what_the_artefact_adds() -> None:
    """A teacher's own variance does best at 2 CE minus 2 CE of the clean twin; nothing, where that is less or clean."""
    logits = torch.tensor([[0.3, -0.4]]).reshape(1, 2, 1, 1, 1).expand(1, 2, 6, 6, 6)
    ce = torch.nn.functional.cross_entropy(logits, torch.zeros((1, 6, 6, 6), dtype=torch.long), reduction="none")
    assert best_own(logits, ce - 0.15) == pytest.approx(0.3, abs=2e-3)
    assert best_own(logits, ce + 0.15) == pytest.approx(0.0, abs=2e-3)
    assert best_own(logits, None) == pytest.approx(0.0, abs=2e-3)


def test_excess_is_a_local_mean() -> None:
    """One wrong voxel is spread over its 5x5x5 neighbourhood, each cross entropy cut at its maximum."""
    ce, clean = torch.zeros(1, 9, 9, 9), torch.zeros(1, 9, 9, 9)
    ce[0, 4, 4, 4] = 100.0
    added = L.excess(ce, clean)
    assert float(added[0, 4, 4, 4]) == pytest.approx(2 * L.CE_MAX / 125)
    assert float(added[0, 2, 2, 2]) == pytest.approx(2 * L.CE_MAX / 125)
    assert float(added[0, 1, 4, 4]) == 0.0


@pytest.mark.parametrize("form", ["paper", "exact"])
def test_gradients(batch: dict[str, torch.Tensor], form: str) -> None:
    """Analytic gradients of the variance agree with finite differences."""
    variance = batch["variance"].clone().requires_grad_(True)
    logits = batch["logits"]
    assert torch.autograd.gradcheck(
        lambda v: L.heteroscedastic(logits, batch["labels"], v, 0.05, form)[0].sum(), (variance,)
    )


def test_faithful_teaches_the_segmentation_as_plain_cross_entropy(batch: dict[str, torch.Tensor]) -> None:
    """With the faithful form, the gradient of the logits is that of the cross entropy, whatever the variance."""
    logits = batch["logits"].clone().requires_grad_(True)
    value, ce = L.heteroscedastic(logits, batch["labels"], batch["variance"], 0.05, "faithful")
    faithful = torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]
    assert torch.allclose(faithful, torch.autograd.grad(ce.sum(), logits)[0])


def test_unknown_form_is_named() -> None:
    """An unknown likelihood is an error that shows it."""
    z = torch.zeros(1, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="gaussian"):
        L.heteroscedastic(z, torch.zeros(1, 1, 1, 1, dtype=torch.long), z[:, 0], 0.05, "gaussian")  # type: ignore[arg-type]


def oracle_consistency(p: np.ndarray, t: np.ndarray) -> float:
    """Eq. 7 with loops, unit weights."""
    total = 0.0
    for c in range(p.shape[1]):
        a, b = p[:, c], t[:, c]
        grads = [np.abs(np.diff(a, axis=x) - np.diff(b, axis=x)).mean() for x in (1, 2, 3)]
        total += np.abs(a - b).mean() + sum(grads) / 3 + 0.1 * oracle_ssim(a, b).mean()
    return total


def oracle_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for n, i, j, k in np.ndindex(a.shape):
        window = tuple(slice(max(0, v - 1), v + 2) for v in (i, j, k))
        x, y = a[(n, *window)], b[(n, *window)]
        mx, my = x.mean(), y.mean()
        vx, vy, cov = (x * x).mean() - mx**2, (y * y).mean() - my**2, (x * y).mean() - mx * my
        ssim = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        out[n, i, j, k] = np.clip((1 - ssim) / 2, 0, 1)
    return out


def test_consistency_matches_the_oracle() -> None:
    """Eq. 7: L1 on variances, L1 on their gradients, 0.1 SSIM with a 3x3x3 mean filter."""
    rng = np.random.default_rng(1)
    p, t = rng.random((2, 3, 4, 5, 6)), rng.random((2, 3, 4, 5, 6))
    got = L.consistency(torch.tensor(p), torch.tensor(t), torch.ones((2, 4, 5, 6), dtype=torch.float64))
    assert float(got) == pytest.approx(oracle_consistency(p, t), rel=1e-6)


def test_mean_consistency_is_least_at_the_mean() -> None:
    """A constant variance that stands for targets 0, 0, 0 and 2 does best at their mean, not at their median."""
    target = torch.tensor([0.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 1, 4)
    ones = torch.ones(1, 1, 1, 4)
    values = torch.linspace(0.05, 2.0, 391)
    losses = [L.mean_consistency(torch.log(v).expand(target.shape), target, ones, torch.ones(1)) for v in values]
    assert float(values[int(torch.stack(losses).argmin())]) == pytest.approx(0.5, abs=0.006)


def test_consistency_of_equals_is_zero() -> None:
    """Equal variances cost nothing."""
    p = torch.rand((1, 2, 6, 6, 6))
    assert float(L.consistency(p, p, torch.ones((1, 6, 6, 6)))) == pytest.approx(0.0, abs=1e-6)


def test_outside_the_field_of_view_nothing_counts(batch: dict[str, torch.Tensor]) -> None:
    """Voxels of weight zero change no part of the loss."""
    weight = torch.ones_like(batch["variance"])
    weight[:, 2:] = 0.0
    log_variance = batch["variance"].log().unsqueeze(1)
    first = L.combine(batch["logits"], log_variance, batch["labels"], weight, None, 0.05, "paper")
    changed = batch["logits"].clone()
    changed[:, :, 2:] += 5.0
    second = L.combine(changed, log_variance, batch["labels"], weight, None, 0.05, "paper")
    assert float(first.total) == pytest.approx(float(second.total))
