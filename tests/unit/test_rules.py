"""Selection rules: what is admitted, what is refused with which code, and mistakes in a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from daemon import rules as ruling
from daemon.header import MATCHABLE
from daemon.reasons import REASONS
from daemon.rules import DEFAULT_RULE, Rule, RuleError, default_rule, load_rules, match_rule, rule_from_dict
from daemon.stack import Stack
from daemon.words import Reason
from tests.builders import little_stack, stacks_in


def stack(**overrides: object) -> Stack:
    """One stack that covers a head, made with these attributes."""
    (found,) = stacks_in(little_stack(56, **overrides))
    return found


def outcome(made: Stack, *rules: Rule) -> str:
    """Rule name or refusal code."""
    found = match_rule(made, rules)
    return found.code if isinstance(found, Reason) else found.name


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "t1_head_3d"),
        ({"MRAcquisitionType": None}, "t1_head_3d"),
        ({"MRAcquisitionType": "2D"}, "two_dimensional"),
        ({"ScanningSequence": "SE"}, "no_rule"),
        ({"ScanningSequence": ["EP", "GR"]}, "no_rule"),
        ({"AngioFlag": "Y"}, "no_rule"),
        ({"BodyPartExamined": "KNEE"}, "no_rule"),
        ({"BodyPartExamined": "CSPINE"}, "no_rule"),
        ({"BodyPartExamined": "NECK"}, "no_rule"),
        ({"BodyPartExamined": "HEADNECK"}, "t1_head_3d"),
        ({"BodyPartExamined": "BRAIN"}, "t1_head_3d"),
        ({"BodyPartExamined": "SCHAEDEL"}, "t1_head_3d"),
        ({"BodyPartExamined": ""}, "t1_head_3d"),
        ({"DiffusionBValue": 1000.0}, "no_rule"),
        ({"EchoTime": "28"}, "no_rule"),
        ({"InversionTime": "2500"}, "no_rule"),
        (
            {
                "ScanningSequence": "GR",
                "SequenceVariant": "SP",
                "InversionTime": None,
                "RepetitionTime": "25",
                "FlipAngle": "30",
            },
            "t1_head_3d",
        ),
        (
            {
                "ScanningSequence": "GR",
                "SequenceVariant": "SP",
                "InversionTime": None,
                "RepetitionTime": "25",
                "FlipAngle": "4",
            },
            "no_rule",
        ),
        (
            {"ScanningSequence": "GR", "SequenceVariant": "SP", "InversionTime": None, "RepetitionTime": "400"},
            "no_rule",
        ),
        ({"ScanningSequence": None, "SequenceVariant": None, "RepetitionTime": None, "EchoTime": None}, "t1_head_3d"),
        ({"PixelSpacing": ["3", "3"]}, "thick_slices"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    ],
)
def test_the_default_rule_admits_t1_weighted_3d_heads_alone(overrides: dict[str, Any], expected: str) -> None:
    """Gradient echoes with inversion or spoiling; what the header does not tell is no evidence against a series."""
    assert outcome(stack(**overrides)) == expected


def test_the_first_rule_that_admits_wins() -> None:
    """Rules are tried in their order."""
    made = stack()
    special = Rule(name="special", description="(?i)mprage", required_dice=0.9)
    assert outcome(made, special, DEFAULT_RULE) == "special"
    assert outcome(made, Rule(name="other", description="(?i)flair"), DEFAULT_RULE) == "t1_head_3d"


def test_the_reason_of_the_nearest_rule_is_told() -> None:
    """A rule that fails at its end says more than one that fails at once."""
    far, near = Rule(name="far", scanner="mr9"), Rule(name="near", orientation=("axial",))
    found = match_rule(stack(), (far, near))
    assert isinstance(found, Reason)
    assert found.code == "no_rule"
    assert "its slices are sagittal" in found.text


@pytest.mark.parametrize(
    ("rule", "admitted"),
    [
        (Rule(name="r", scanner="^mr1$"), True),
        (Rule(name="r", scanner="^mr2$"), False),
        (Rule(name="r", description="(?i)mprage sag"), True),
        (Rule(name="r", manufacturer="SIEMENS"), False),
        (Rule(name="r", image_type=("NORM",)), True),
        (Rule(name="r", image_type=("!NORM",)), False),
        (Rule(name="r", image_type=("DIS3D",)), False),
        (Rule(name="r", orientation=("sagittal", "axial")), True),
        (Rule(name="r", orientation=("coronal",)), False),
        (Rule(name="r", slices=(100.0, 300.0)), False),
        (Rule(name="r", echo_time_ms=(2.0, 3.0)), True),
        (Rule(name="r", echo_time_ms=(4.0, 5.0)), False),
        (Rule(name="r", flip_angle_deg=(10.0, 20.0)), False),
        (Rule(name="r", inversion_time_ms=(800.0, 1000.0)), True),
        (Rule(name="r", repetition_time_ms=(100.0, 200.0)), False),
        (Rule(name="r", slice_spacing_mm=(0.5, 1.0)), False),
        (Rule(name="r", pixel_spacing_mm=(2.4, 2.6)), True),
        (Rule(name="r", attributes={"BodyPartExamined": "HEAD"}), True),
        (Rule(name="r", attributes={"BodyPartExamined": "BRAIN"}), False),
        (Rule(name="r", attributes={"MagneticFieldStrength": (2.5, 3.5)}), True),
        (Rule(name="r", attributes={"MagneticFieldStrength": (1.0, 2.0)}), False),
        (Rule(name="r", attributes={"SequenceName": "tfl"}), False),
    ],
)
def test_each_condition_of_a_rule(rule: Rule, admitted: bool) -> None:
    """Expressions, words, ranges and orientation."""
    assert (outcome(stack(), rule) == "r") is admitted


def test_switches_open_what_the_default_closes() -> None:
    """2D, phase, short and differently weighted series can be admitted by a rule that says so."""
    made = stack(MRAcquisitionType="2D", ImageType=["ORIGINAL", "PRIMARY", "P"], ScanningSequence="SE")
    assert outcome(made) == "phase"
    assert outcome(made, Rule(name="r", magnitude=False)) == "two_dimensional"
    assert outcome(made, Rule(name="r", magnitude=False, three_d=False)) == "no_rule"
    assert outcome(made, Rule(name="r", magnitude=False, three_d=False, t1_weighted=False)) == "r"
    (short,) = stacks_in(little_stack(30))
    assert outcome(short) == "partial_coverage"
    assert outcome(short, Rule(name="r", head_coverage=False)) == "r"


def test_every_code_that_a_rule_can_tell_has_its_sentence() -> None:
    """The one list of reasons holds what this module names."""
    source = ruling.__file__
    assert source is not None
    for code in (
        "derived",
        "phase",
        "mosaic",
        "colour",
        "localizer",
        "twin",
        "uncombined_coils",
        "two_dimensional",
        "no_rule",
    ):
        assert REASONS[code].endswith(".")


def test_a_rule_from_the_configuration() -> None:
    """Every kind of key."""
    rule = rule_from_dict(
        {
            "name": "mprage_3t",
            "required_dice": 0.88,
            "description": "(?i)mprage",
            "orientation": ["sagittal"],
            "slice_spacing_mm": [0.7, 1.3],
            "image_type": ["NORM", "!DERIVED"],
            "outputs": ["pictures"],
            "derived": True,
            "attributes": {"MagneticFieldStrength": [2.5, 3.5], "StationName": "MR1"},
        }
    )
    assert rule.required_dice == 0.88
    assert rule.slice_spacing_mm == (0.7, 1.3)
    assert rule.attributes["MagneticFieldStrength"] == (2.5, 3.5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "requird_dice": 0.9}, "rules[1].requird_dice: unknown key; did you mean required_dice?"),
        ({"name": "a", "required_dice": 1.5}, "rules[1].required_dice: got 1.5; it must lie between 0 and 1"),
        ({"required_dice": 0.9}, "rules[1].name: got None"),
        ({"name": "A b"}, "rules[1].name: got 'A b'"),
        ({"name": "a", "description": "("}, "rules[1].description: got '(', no regular expression"),
        ({"name": "a", "slices": [5]}, "rules[1].slices: got [5]; write [lowest, highest]"),
        ({"name": "a", "slices": [5, 2]}, "rules[1].slices: got [5, 2]; the first must not exceed the second"),
        (
            {"name": "a", "orientation": ["saggital"]},
            "rules[1].orientation: got 'saggital'; use sagittal, coronal, axial",
        ),
        ({"name": "a", "derived": "yes"}, "rules[1].derived: got 'yes'; expected bool"),
        (
            {"name": "a", "attributes": {"BodyPartExamned": "x"}},
            "rules[1].attributes.BodyPartExamned: no such attribute; did you mean BodyPartExamined?",
        ),
        ({"name": "a", "outputs": ["video"]}, "rules[1].outputs: got 'video'; use pictures"),
    ],
)
def test_mistakes_name_the_key_and_the_value(entry: dict[str, Any], message: str) -> None:
    """One line, with the nearest key where one is near."""
    with pytest.raises(RuleError) as error:
        rule_from_dict(entry)
    assert str(error.value).startswith(message)


def test_names_are_unique_and_no_rules_mean_the_default_one() -> None:
    """Metrics and calibration go by the name."""
    with pytest.raises(RuleError, match="stands twice"):
        load_rules([{"name": "a"}, {"name": "a"}])
    assert load_rules([]) == (DEFAULT_RULE,)
    assert default_rule(()) is DEFAULT_RULE
    assert default_rule((Rule(name="first"), DEFAULT_RULE)).name == "first"


def test_every_matchable_attribute_is_a_dicom_keyword() -> None:
    """A rule cannot name what DICOM does not have."""
    from pydicom.datadict import tag_for_keyword

    assert all(tag_for_keyword(keyword) is not None for keyword in MATCHABLE)


def test_a_rule_for_another_model_does_not_match() -> None:
    """Told with both names; where no model is known yet, the rule's model is left aside."""
    made, rule = stack(), Rule(name="r", model="student_7t")
    assert match_rule(made, (rule,)) is rule
    assert match_rule(made, (rule,), "student_7t") is rule
    found = match_rule(made, (rule,), "student_3t")
    assert isinstance(found, Reason)
    assert "asks for the model student_7t, and student_3t is served" in found.text
    assert match_rule(made, (rule, DEFAULT_RULE), "student_3t") is DEFAULT_RULE


def test_what_cannot_be_an_image_keeps_its_own_reason() -> None:
    """Unreadable headers and other storage classes are not called coloured or unmatched."""
    from daemon.series import stacks_of
    from daemon.words import Refusal
    from tests.builders import instance_of

    stored, _ = instance_of(little_stack(1)[0])
    (unreadable,) = stacks_of([(stored, Refusal("bad_header", "x"))])
    assert outcome(unreadable) == "bad_header"
    assert outcome(stack(PhotometricInterpretation=None)) == "t1_head_3d"
    assert outcome(stack(PhotometricInterpretation="PALETTE COLOR")) == "colour"
