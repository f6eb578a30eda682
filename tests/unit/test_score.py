"""Maps -> scores: each formula against an oracle written another way."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage, stats

from daemon.card import Bound
from daemon.score import (
    BOX_CELLS,
    RAW_SCORES,
    SCORES,
    VOXEL_ML,
    comparable_scores,
    gate_features,
    predicted_dice,
    raw_scores,
    reduce_maps,
    score_maps,
    volume_error_ml,
)
from daemon.words import ARTEFACTS, Maps
from tests.model_builders import made_up_calibration, made_up_card, made_up_head, made_up_maps


def test_eq9_is_the_mean_of_the_summed_variances_over_the_box() -> None:
    """Oracle: plain sums over native cells, over the cells of the box; what lies in the padding never counts."""
    head = made_up_head()
    maps = made_up_maps(head)
    maps.artefact_variance[:, ~head.native_mask] = 1e3
    values = [maps.artefact_variance[i][head.native_mask] for i in range(5)]
    expected = sum(float(np.sum(v, dtype=np.float64)) for v in values) / BOX_CELLS
    assert score_maps(maps, head, made_up_card()).flat()["artefact_uncertainty"] == pytest.approx(expected, rel=1e-6)


def test_the_region_is_grey_matter_grown_by_one_cell() -> None:
    """Oracle: SciPy's dilation with a 3 x 3 x 3 cube, and means taken by labels."""
    head = made_up_head()
    maps = made_up_maps(head, seed=3)
    gm = (maps.gm_probability > 0.5) & head.native_mask
    region = ndimage.binary_dilation(gm, np.ones((3, 3, 3))) & head.native_mask
    scores = score_maps(maps, head, made_up_card())
    for i, name in enumerate(ARTEFACTS):
        expected = ndimage.mean(maps.artefact_variance[i].astype(float), region.astype(int), 1)
        assert scores.artefacts[name]["uncertainty"] == pytest.approx(expected, rel=1e-6)
    assert scores.flat()["task_uncertainty"] == pytest.approx(0.05, rel=1e-5)


def test_entropy_is_that_of_a_bernoulli_variable() -> None:
    """Oracle: SciPy's entropy."""
    head = made_up_head()
    maps = made_up_maps(head)
    p = maps.gm_probability[head.native_mask].astype(float)
    expected = stats.entropy(np.stack([p, 1 - p])).sum() / BOX_CELLS
    assert raw_scores(reduce_maps(maps, head))["entropy"] == pytest.approx(expected, rel=1e-3)


def test_expected_cross_entropy_is_counted_per_grey_matter() -> None:
    """Oracle: entropy of every cell plus half its artefact variances, over the sum of p; no grey matter is no error."""
    head = made_up_head()
    maps = made_up_maps(head)
    native = head.native_mask
    p = maps.gm_probability[native].astype(float)
    doubt = stats.entropy(np.stack([p, 1 - p])).sum() + maps.artefact_variance[:, native].sum(dtype=np.float64) / 2
    assert raw_scores(reduce_maps(maps, head))["cross_entropy_per_gm"] == pytest.approx(doubt / p.sum(), rel=1e-3)
    nothing = dataclasses.replace(maps, gm_probability=np.zeros_like(head.image))
    assert math.isfinite(raw_scores(reduce_maps(nothing, head))["cross_entropy_per_gm"])


def test_expected_dice_is_that_of_truths_drawn_from_the_probability() -> None:
    """Oracle: Dice of the predicted mask with 200 truths, every voxel a coin; without grey matter all of it is lost."""
    head = made_up_head()
    maps = made_up_maps(head)
    p = maps.gm_probability[head.native_mask].astype(float)
    rng = np.random.default_rng(2)
    drawn = [rng.random(p.shape) < p for _ in range(200)]
    dice = [2 * (truth & (p > 0.5)).sum() / (truth.sum() + (p > 0.5).sum()) for truth in drawn]
    assert raw_scores(reduce_maps(maps, head))["expected_dice_loss"] == pytest.approx(1 - np.mean(dice), abs=1e-3)
    nothing = dataclasses.replace(maps, gm_probability=np.zeros_like(head.image))
    assert raw_scores(reduce_maps(nothing, head))["expected_dice_loss"] == 1.0


def test_volume_is_the_sum_of_probabilities_and_its_error_the_root_of_their_variances() -> None:
    """Oracle: 300 draws of every voxel as a coin, whose volume spreads by that much."""
    head = made_up_head()
    maps = made_up_maps(head)
    reduced = reduce_maps(maps, head)
    p = maps.gm_probability[head.native_mask].astype(float)
    rng = np.random.default_rng(1)
    partly = p[(p > 1e-3) & (p < 1 - 1e-3)]
    draws = [(rng.random(partly.size) < partly).sum() * VOXEL_ML for _ in range(300)]
    scores = score_maps(maps, head, made_up_card()).flat()
    assert scores["gm_volume_ml"] == pytest.approx(p.sum() * 0.008, rel=1e-6)
    assert volume_error_ml(reduced.gm_variance, 1.0) == pytest.approx(np.std(draws), rel=0.15)
    assert volume_error_ml(0.0, 3.0) == 0.0


def test_snr_and_cnr_are_those_of_the_made_head() -> None:
    """The shell is 0.6 +- 0.02 with partial volume, the core 1.0: CNR is |SNR_GM - mean_WM / sd_GM| (Eq. 11)."""
    head = made_up_head()
    maps = made_up_maps(head)
    values = head.image[(maps.gm_probability > 0.5) & head.native_mask].astype(float)
    scores = score_maps(maps, head, made_up_card()).flat()
    assert scores["snr"] == pytest.approx(values.mean() / values.std(), rel=1e-6)
    assert scores["cnr"] == pytest.approx(abs(scores["snr"] - 1.0 / values.std()), rel=0.02)


def test_what_is_unknown_is_absent() -> None:
    """Without grey matter there is no SNR, no CNR; without a calibration no predicted Dice; never NaN, never -1."""
    head = made_up_head()
    nothing = dataclasses.replace(made_up_maps(head), gm_probability=np.zeros_like(head.image))
    scores = score_maps(nothing, head, made_up_card())
    assert {"snr", "cnr", "predicted_dice", "gm_affected_share"}.isdisjoint(scores.flat())
    assert all("score" not in parts for parts in scores.artefacts.values())
    assert all(math.isfinite(v) for v in [*scores.flat().values(), *scores.gates.values()])
    region = reduce_maps(nothing, head)
    assert region.region_cells == head.head_mask.sum()


@pytest.mark.parametrize("name", ["gm_probability", "task_variance", "artefact_variance"])
def test_a_map_that_is_not_finite_is_an_error(name: str) -> None:
    """A broken engine must not become a number."""
    head = made_up_head()
    maps = made_up_maps(head)
    getattr(maps, name)[..., 3, 3, 3] = np.nan
    with pytest.raises(ValueError, match=f"{name}: holds values that are not finite"):
        score_maps(maps, head, made_up_card())


def test_maps_of_another_shape_are_an_error() -> None:
    """The message shows both shapes."""
    head = made_up_head()
    maps = made_up_maps(head)
    with pytest.raises(ValueError, match=r"expected shape \(40, 48, 44\), got \(40, 48, 43\)"):
        score_maps(dataclasses.replace(maps, task_variance=maps.task_variance[:, :, 1:]), head, made_up_card())


def test_predicted_dice_falls_with_the_risk_and_its_bounds_stay_in_range() -> None:
    """Interpolated between the knots, constant beyond; each bin has its own offsets, clipped to 0..1."""
    bounds = [
        {"risk_upto": -2.0, "low": -0.1, "high": 0.2, "scans": 60},
        {"risk_upto": 1e9, "low": -0.5, "high": 0.3, "scans": 60},
    ]
    calibration = made_up_calibration(bounds=bounds)
    assert predicted_dice(-9.0, calibration) == {
        "predicted_dice": 0.9,
        "predicted_dice_low": pytest.approx(0.8),
        "predicted_dice_high": 1.0,
    }
    assert predicted_dice(-2.0, calibration)["predicted_dice"] == pytest.approx(0.6)
    assert predicted_dice(5.0, calibration)["predicted_dice_low"] == 0.0
    assert calibration.bounds[0] == Bound(-2.0, -0.1, 0.2, 60)


def test_comparable_scores_read_a_clean_scan_as_zero_and_a_typical_artefact_as_a_half() -> None:
    """With the identity as unmixing, an excess of 1 in the logarithm is the typical visible artefact."""
    raw = dict.fromkeys(RAW_SCORES, math.exp(-6.0))
    raw["artefact_motion_gm"] = math.exp(-5.0)
    scores = comparable_scores(raw, made_up_calibration())
    assert scores["motion"] == pytest.approx(0.5, rel=1e-6)
    assert scores["noise"] == pytest.approx(0.0, abs=1e-6)


def test_unmixing_takes_out_what_leaks() -> None:
    """Noise that also lifts the motion channel by half is named noise alone, once the leakage is inverted."""
    leakage = np.eye(5)
    leakage[4, 0] = 0.5
    raw = dict.fromkeys(RAW_SCORES, math.exp(-6.0))
    raw |= {"artefact_noise_gm": math.exp(-4.0), "artefact_motion_gm": math.exp(-5.0)}
    scores = comparable_scores(raw, made_up_calibration(artefact_unmixing=np.linalg.inv(leakage).tolist()))
    assert scores["noise"] == pytest.approx(2 / 3, rel=1e-6)
    assert scores["motion"] == pytest.approx(0.0, abs=1e-6)


def test_the_worst_slices_are_where_the_artefact_is() -> None:
    """A disturbed slab high in the head is found in the axial plane and named in words."""
    head = made_up_head()
    maps = made_up_maps(head)
    maps.artefact_variance[4, :, :, 33] += 1.0
    worst = score_maps(maps, head, made_up_card()).slices[0]
    assert (worst.plane, worst.index, worst.place) == ("axial", 33, "upper third of the head")
    assert worst.position_mm == 66.0


def test_the_affected_share_counts_grey_matter_above_the_level() -> None:
    """Half of grey matter disturbed is a share of about a half."""
    head = made_up_head()
    maps = made_up_maps(head, variance=0.01)
    maps.artefact_variance[2, : head.image.shape[0] // 2] += 1.0
    share = score_maps(maps, head, made_up_card(made_up_calibration())).flat()["gm_affected_share"]
    assert share == pytest.approx(0.5, abs=0.02)


def test_every_score_has_a_definition() -> None:
    """What is published is defined: text, unit, range, good end; and every value lies in its range."""
    head = made_up_head()
    flat = score_maps(made_up_maps(head), head, made_up_card(made_up_calibration())).flat()
    assert set(flat) == set(SCORES)
    for name, value in flat.items():
        low, high = SCORES[name].low, SCORES[name].high
        assert low is None or value >= low
        assert high is None or value <= high
        assert SCORES[name].good in ("low", "high", "none")
        assert len(SCORES[name].text) > 20


def test_gate_features_describe_the_head() -> None:
    """The shell of 16 to 13 cells radius: extents in mm, centred, brighter inside."""
    head = made_up_head()
    features = gate_features(reduce_maps(made_up_maps(head), head), head)
    assert features["gm_off_centre_mm"] < 1.0
    assert 50 < features["gm_width_mm"] < 64
    assert features["gm_level"] == pytest.approx(0.6, abs=0.02)
    assert features["bright_ratio"] > 1.5
    assert 0 < features["gm_below_vertex_mm"] <= 8


def test_gate_features_tell_doubt_about_the_image_from_artefacts() -> None:
    """An artefact raises the logarithm of its own part and leaves that of the task where it was; none is finite too."""
    head = made_up_head()
    clean, bad = (gate_features(reduce_maps(made_up_maps(head, v, "blur"), head), head) for v in (0.0, 0.5))
    assert bad["log_artefact_blur_gm"] > clean["log_artefact_blur_gm"] + 1.0
    assert bad["log_task_uncertainty"] == clean["log_task_uncertainty"]
    assert all(math.isfinite(v) for v in clean.values())


def test_more_artefact_never_scores_better(subtests: pytest.Subtests) -> None:
    """Scaling any artefact's variance up raises every uncertainty made of it and lowers predicted Dice."""
    head = made_up_head()
    card = made_up_card(made_up_calibration())
    for artefact in ARTEFACTS:
        with subtests.test(artefact=artefact):
            found = [score_maps(made_up_maps(head, v, artefact), head, card) for v in (0.01, 0.3, 1.0)]
            risks = [s.risk for s in found]
            assert risks == sorted(risks)
            assert found[0].flat()["predicted_dice"] >= found[2].flat()["predicted_dice"]
            own = [s.artefacts[artefact]["score"] for s in found]
            assert own == sorted(own)


def test_padding_changes_nothing() -> None:
    """Whatever stands in cells outside the field of view, the scores are the same."""
    head = made_up_head()
    maps = made_up_maps(head)
    other = Maps(maps.gm_probability.copy(), maps.task_variance.copy(), maps.artefact_variance.copy())
    other.gm_probability[~head.native_mask] = 0.9
    other.task_variance[~head.native_mask] = 9.0
    other.artefact_variance[:, ~head.native_mask] = 9.0
    card = made_up_card(made_up_calibration())
    assert score_maps(maps, head, card).flat() == score_maps(other, head, card).flat()
