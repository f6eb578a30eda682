"""The evaluation's parts on made numbers: what is planted is found, what is missed is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from daemon.prepare import prepare
from daemon.score import BOX_CELLS, SUMS, Reduced
from daemon.words import ARTEFACTS, Maps, Volume
from export.golden import formula_head
from tests.model_builders import made_up_calibration
from training.calibrate import Sample
from training.evaluate import compute, gaps
from training.evaluation import analysis, independent, report
from training.evaluation.analysis import Row, bare_card, make_row
from training.evaluation.observe import (
    Observation,
    Runner,
    observe,
    pairwise_dice,
    reduced_of,
    severity,
    shift_cells,
)
from training.evaluation.plan import fixed_corruption, level_steps, read_severities
from training.evaluation.refusal import box_body, cylinder, noise, sphere
from training.evaluation.scans import Facts, listed, read, store

SHAPE = (180, 220, 200)


def facts(name: str, artefact: str = "clean", level: int = 0, anatomy: str = "a", group: str = "simulated") -> Facts:
    head = f"{anatomy}-00"
    return Facts(group, name, anatomy, head, artefact, artefact, level, float(level), "own" if level else "none", {})


def observation(dice: float, variances: list[float], clean_dice: float, gm_ml: float = 600.0) -> Observation:
    raw = {
        "artefact_uncertainty": sum(variances) / 3,
        "artefact_uncertainty_gm": sum(variances),
        "task_uncertainty": 0.5,
        "entropy": 0.01 + (1 - dice) * 0.1,
        "entropy_gm": 0.1,
        **{f"artefact_{a}_gm": v for a, v in zip(ARTEFACTS, variances, strict=True)},
    }
    sample = Sample("h", "a", None, raw, {"gm_ml": gm_ml}, gm_ml, 100.0, 0.1, dice, clean_dice, 600.0)
    profiles = tuple(np.ones((4, 8)) for _ in range(3))
    sums = Reduced(
        **dict.fromkeys(SUMS, 1000.0), artefact_fov=np.ones(5), artefact_region=np.ones(5), profiles=profiles
    )
    plain = {k: [p.tolist() for p in v] if k == "profiles" else np.asarray(v).tolist() for k, v in vars(sums).items()}
    return Observation(sample, plain, 20.0, 0.02, 5.0 * dice, 3.0 * dice, "x.mask")


def planted(anatomies: int = 4) -> list[Row]:
    """Scans whose own artefact variance rises as Dice falls, with a little noise."""
    rng, rows, card, severities = np.random.default_rng(0), [], bare_card(None, "planted"), read_severities()
    for k in range(anatomies):
        for artefact in ("clean", *ARTEFACTS):
            for level in (0,) if artefact == "clean" else (1, 2, 3, 4):
                loss = 0.004 if level == 0 else 0.012 * level**2
                variances = [0.02] * 5
                if level:
                    variances[ARTEFACTS.index(artefact)] += loss
                dice = 0.85 - loss + float(rng.normal(0, 0.001))
                f = facts(f"s{k}-{artefact}-{level}", artefact, level, f"s{k}")
                losses = {f.name: loss}
                rows.append(make_row(f, observation(dice, variances, 0.85), card, losses, {}, severities))
    return rows


def test_planted_relation_is_found() -> None:
    """A score that follows Dice reaches rho near -1, pooled and within each artefact, with an interval that says so."""
    found = analysis.experiment(planted(), 200)
    assert found["n"] == 84
    assert found["n_anatomies"] == 4
    assert found["refused"] == 0
    assert found["ci_low"] <= found["rho"] <= found["ci_high"] < -0.8
    assert set(found["per_artefact"]) == set(ARTEFACTS)
    assert found["measures"]["snr"]["rho"] > 0.9
    assert found["measures"]["entropy"]["aurc"] == pytest.approx(found["aurc"], abs=0.01)


def test_refused_scans_are_counted_not_dropped_in_silence() -> None:
    """A scan without Dice leaves the correlation and enters the count."""
    row = make_row(facts("r", "noise", 4), None, bare_card(None, "x"), {}, {}, read_severities())
    found = analysis.experiment([*planted(), row], 50)
    assert (found["n"], found["refused"]) == (84, 1)
    assert row.verdict == "CANNOT_JUDGE"


def test_planted_decoupling_is_diagonal() -> None:
    """Own variances that rise alone give a dominant diagonal and the right name every time."""
    parts = analysis.decoupling(planted())
    assert parts["diagonal_dominant"]
    assert parts["top1"]["value"] == 1.0
    assert parts["task_change"]["median"] == pytest.approx(1.0)
    assert np.trace(np.array(parts["confusion"])) == parts["top1"]["n"]


def test_leakage_is_seen() -> None:
    """Where noise raises the channel of motion, the matrix and the confusion show it."""
    rows = planted()
    for row in rows:
        assert row.observation is not None
        if row.facts.artefact == "noise":
            row.observation.sample.raw["artefact_motion_gm"] = 5.0
    parts = analysis.decoupling(rows)
    assert not parts["diagonal_dominant"]
    assert parts["confusion"][0][4] == sum(parts["confusion"][0]) > 0


def test_error_bars_count_their_coverage() -> None:
    """Eq. 8's interval covers where the error is inside 1.96 of its deviations, and only there."""
    rows = []
    for i, gm_ml in enumerate((600.0, 630.0, 700.0, 500.0)):
        f = Facts(**{**asdict(facts(f"v{i}")), "gm_ml": 600.0})
        rows.append(
            make_row(f, observation(0.8, [0.1] * 5, 0.8, gm_ml), bare_card(None, "x"), {}, {}, read_severities())
        )
    bars = analysis.error_bars(rows, [])
    assert bars["eq8_coverage"]["hits"] == 2
    assert bars["bias_ml"] == pytest.approx(7.5)
    assert "coverage" not in bars, "without a calibration the product has no interval"


def test_metrics_have_the_agreed_keys() -> None:
    """Others rely on these names."""
    metrics = compute({"simulated": planted(), "ladder": []}, bare_card(None, "x"), 50)
    for key in ("rho", "ci_low", "ci_high", "n", "n_anatomies", "per_artefact", "aurc"):
        assert key in metrics["simulated"]
    assert {"matrix", "confusion"} <= set(metrics["decoupling"])
    assert metrics["decision"] == {"calibrated": False}
    json.dumps(metrics, allow_nan=False)


def test_a_missed_goal_is_reported_with_its_value() -> None:
    """Every goal stands in the report, reached or not."""
    metrics = {**compute({"simulated": planted()}, bare_card(None, "x"), 50), "model": "<m>", "made": {"date": "today"}}
    metrics["simulated"]["rho"] = -0.5
    html = report.page(metrics, {"a figure": "data:image/png;base64,AAAA"})
    assert "not reached" in html
    assert "-0.500" in html
    assert "not measured" in html
    assert "&lt;m&gt;" in html, "names are escaped"
    assert "http" not in html, "the page loads nothing"
    assert all(goal.text in report.markdown(metrics) for goal in analysis.goals(metrics))


def test_gaps_are_differences_to_the_simulated_experiment() -> None:
    """What the other simulator costs and what the other anatomy costs stand apart."""
    metrics = {"simulated": {"rho": -0.9}, "independent": {"rho": -0.8}, "real_own": {"rho": -0.85}}
    assert gaps(metrics) == {"simulator": pytest.approx(0.1), "anatomy": pytest.approx(0.05), "both": None}


def test_severities_are_named_by_the_lost_dice() -> None:
    """Mild below 0.02, visible from 0.05, by the fixed reference; unknown where that was not run."""
    severities = read_severities()
    f = facts("x", "noise", 1)
    names = [severity(f, {"x": loss}, severities) for loss in (0.0, 0.019, 0.02, 0.049, 0.05, 0.5)]
    assert names == ["mild", "mild", "moderate", "moderate", "visible", "visible"]
    assert severity(f, {}, severities) == "unknown"
    assert severity(facts("x"), {}, severities) == "clean"


def test_the_severity_file_gives_the_promised_number_of_scans() -> None:
    """Four subjects, two heads, clean and five artefacts at four severities are 168 scans; all draws differ."""
    severities = read_severities()
    steps = level_steps(severities, (1, 2), 0)
    assert 4 * 2 * (1 + len(steps)) == 168
    assert len({s.seed for s in steps}) == len(steps)
    assert severities["heads"]["simulated"] >= 2


@pytest.mark.parametrize("kind", ["noise", "spike", "blur", "fold", "lines", "regular", "motion"])
def test_a_stated_strength_is_the_strength(kind: str) -> None:
    """The same seed gives the same place and trajectory; only the strength differs."""

    def record(strength: float) -> str:
        return repr(fixed_corruption(kind, strength, np.random.default_rng(7), SHAPE).record())

    low, high = (3.0, 6.0) if kind in ("noise", "blur", "regular") else (0.2, 0.4)
    assert record(low) == record(low) != record(high)
    weak, strong = (fixed_corruption(kind, s, np.random.default_rng(7), SHAPE) for s in (low, high))
    if kind == "motion":
        assert weak.motion is not None
        assert strong.motion is not None
        assert np.asarray(strong.motion.rotations_deg) == pytest.approx(2 * np.asarray(weak.motion.rotations_deg))
    if kind == "spike":
        assert weak.spike is not None
        assert weak.spike.magnitude == 0.2


def test_an_unknown_kind_is_named() -> None:
    """An option string never falls through to a default."""
    with pytest.raises(ValueError, match="got 'fog'"):
        fixed_corruption("fog", 1.0, np.random.default_rng(0), SHAPE)
    with pytest.raises(ValueError, match="got 'fog'"):
        independent.corrupt(formula_head(), "fog", 1.0, 0)


def test_a_scan_comes_back_as_it_was_prepared(tmp_path: Path) -> None:
    """What networks see is what the daemon would have prepared, to half precision; the label volume is kept."""
    head = formula_head()
    grey = Volume(((head.voxels > 0.5) & (head.voxels < 0.75)).astype(np.float32), head.affine)
    stored = store(tmp_path, facts("one"), head, grey, None)
    scan, prepared = read(tmp_path, stored), prepare(head)
    assert np.abs(scan.prepared.image - prepared.image).max() < 2e-3
    assert np.array_equal(scan.prepared.native_mask, prepared.native_mask)
    assert np.array_equal(scan.prepared.head_mask, prepared.head_mask)
    assert scan.truth().sum() > 0
    assert stored.gm_ml > 100
    assert list(listed(tmp_path, "simulated")) == [stored]


def test_a_refusal_is_a_fact(tmp_path: Path) -> None:
    """A volume that preparation refuses is on record with its reason, and cannot be read as a scan."""
    stored = store(tmp_path, facts("noise"), noise(np.random.default_rng(0)), None, None)
    assert stored.refused
    with pytest.raises(ValueError, match=stored.refused):
        read(tmp_path, stored)


@pytest.mark.parametrize("body", [sphere, box_body, cylinder])
def test_bodies_have_the_size_of_a_head(body: Callable[[np.random.Generator], Volume]) -> None:
    """Shapes to be refused must not be refused for their size alone."""
    volume = body(np.random.default_rng(1))
    assert 900 < (volume.voxels > 0.5).sum() * 0.008 < 9000


def test_a_network_is_run_once_per_scan(tmp_path: Path) -> None:
    """What was seen is kept; clean twins are seen before their artefacts."""
    head, calls = formula_head(), []
    grey = Volume(((head.voxels > 0.5) & (head.voxels < 0.75)).astype(np.float32), head.affine)
    store(tmp_path, facts("a-00-clean"), head, grey, None)
    store(tmp_path, facts("a-00-blur", "blur", 2), Volume(head.voxels * 1.0, head.affine), grey, None)

    def maps(prepared):  # type: ignore[no-untyped-def]
        calls.append(prepared)
        p = ((prepared.image > 0.5) & (prepared.image < 0.75)).astype(np.float32) * 0.9 + 0.05
        return Maps(p, np.full(p.shape, 0.3, np.float32), np.full((5, *p.shape), 0.1, np.float32))

    runner = Runner("r", maps, 1.0)
    first = observe(runner, tmp_path, tmp_path / "seen", "simulated")
    again = observe(runner, tmp_path, tmp_path / "seen", "simulated")
    assert len(calls) == 2
    assert first == again
    blurred = first["a-00-blur"]
    assert blurred.sample.clean_dice == first["a-00-clean"].sample.dice
    acquired = calls[0].native_mask.sum() / BOX_CELLS
    assert blurred.sample.raw["artefact_uncertainty"] == pytest.approx(0.5 * acquired)
    assert reduced_of(blurred).artefact_fov.shape == (5,)
    assert blurred.reference_snr is not None
    assert blurred.reference_snr > 1


def test_pairwise_dice_of_packed_masks() -> None:
    """The mean over pairs equals a loop over unpacked masks."""
    rng = np.random.default_rng(8)
    masks = [rng.random(64) < 0.5 for _ in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([2 * (masks[i] & masks[j]).sum() / (masks[i].sum() + masks[j].sum()) for i, j in pairs])
    assert pairwise_dice([np.packbits(m) for m in masks]) == pytest.approx(expected)


def test_a_mask_moves_with_its_box() -> None:
    """A reference of one box lies at the same place of the patient in another."""
    mask = np.zeros((6, 6, 6), dtype=bool)
    mask[2, 3, 4] = True
    moved = shift_cells(mask, np.zeros(3), np.array([2.0, -2.0, 0.0]), (6, 6, 6))
    assert np.argwhere(moved > 0).tolist() == [[1, 4, 4]]


@pytest.mark.parametrize("kind", ["noise", "spike", "blur", "ghosting", "motion"])
def test_independent_artefacts_grow_with_their_strength(kind: str) -> None:
    """The other simulator changes the image, more so when told to, and the same way for the same seed."""
    if kind != "motion":
        pytest.importorskip("torchio")
    head = formula_head()
    strengths = read_severities()["independent"][kind]
    errors = []
    for strength in (strengths[0], strengths[-1]):
        out = independent.corrupt(head, kind, strength, 3)
        assert out.voxels.min() >= 0
        assert np.isfinite(out.voxels).all()
        errors.append(float(np.abs(out.voxels - head.voxels).mean()))
    assert 0 < errors[0] < errors[1]
    again = independent.corrupt(head, kind, strengths[-1], 3)
    assert np.array_equal(again.voxels, out.voxels)


def test_independent_motion_leaves_the_head_in_place() -> None:
    """The centre of k-space is taken at rest, so labels of the clean scan stay valid."""
    head = formula_head()
    moved = independent.corrupt(head, "motion", 3.0, 5)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in head.voxels.shape), indexing="ij"))
    centres = [(grid * v.voxels).sum(axis=(1, 2, 3)) / v.voxels.sum() for v in (head, moved)]
    assert np.abs(centres[0] - centres[1]).max() < 0.5


def test_a_decision_without_scans_is_not_measured() -> None:
    """A calibrated student evaluated on no scan of a set gives no figures, and no error."""
    card = bare_card(made_up_calibration(), "x")
    assert analysis.decision([], card) == {"calibrated": False, "n": 0}
