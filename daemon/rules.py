"""Which series are judged: selection rules on what the header says.

A rule admits a series or refuses it with the code of the first condition that fails. Rules are tried in their order and
the first that admits wins; where none does, the reason of the one that came furthest is told. NIfTI has no header, so it
passes the header's conditions.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daemon.geometry import PLANE_NAMES, Geometry
from daemon.header import MATCHABLE, SUPPORTED, Header
from daemon.reasons import REASONS
from daemon.stack import Stack
from daemon.words import MAX_SPACING_MM, Reason

Range = tuple[float, float]
"""Lowest and highest value, both included."""

OUTPUTS = ("pictures",)
"""What a rule may ask for beside the result: pictures of the worst slices."""


class RuleError(Exception):
    """A rule that cannot be used; the message is one line that names the rule, the key and the value."""


def _key(default: Any, text: str) -> Any:
    """A key of a rule with its help text."""
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Rule:
    """One `[[rules]]` entry: conditions, and what is asked of the series that meet them.

    A condition on a number that the header does not tell is met: absence is no evidence against a series. A condition on
    a text that the header does not tell is not met.
    """

    name: str = _key("", "name in results and metrics")
    required_dice: float | None = _key(None, "Dice that the measurement needs; the model's own where absent")
    model: str | None = _key(None, "name of the model that the rule is for; any where absent")
    outputs: tuple[str, ...] = _key(OUTPUTS, f"what is made beside the result: {', '.join(OUTPUTS)}")
    scanner: str | None = _key(None, "regular expression on the configured name of the scanner")
    description: str | None = _key(None, "regular expression on SeriesDescription or ProtocolName")
    manufacturer: str | None = _key(None, "regular expression on Manufacturer")
    image_type: tuple[str, ...] = _key((), "words that ImageType must hold; a word after ! must be absent")
    derived: bool = _key(False, "admit derived images")
    magnitude: bool = _key(True, "admit magnitude images alone")
    three_d: bool = _key(True, "admit 3D acquisitions alone")
    t1_weighted: bool = _key(True, "admit gradient echoes alone, inversion-prepared or spoiled with T1 weighting")
    orientation: tuple[str, ...] = _key((), f"planes: {', '.join(PLANE_NAMES)}; any where empty")
    slices: Range | None = _key((16.0, 2048.0), "number of slices")
    slice_spacing_mm: Range | None = _key((0.3, MAX_SPACING_MM), "distance between slices")
    pixel_spacing_mm: Range | None = _key((0.2, MAX_SPACING_MM), "distance between rows and between columns")
    echo_time_ms: Range | None = _key(None, "EchoTime")
    repetition_time_ms: Range | None = _key(None, "RepetitionTime")
    inversion_time_ms: Range | None = _key(None, "InversionTime")
    flip_angle_deg: Range | None = _key(None, "FlipAngle")
    head_coverage: bool = _key(True, "refuse stacks that are too short to hold a head")
    attributes: Mapping[str, str | Range] = _key(dict, "DICOM keyword = regular expression or [lowest, highest]")


DEFAULT_RULE = Rule(name="t1_head_3d")
"""3D T1-weighted heads: MPRAGE, BRAVO, TFE, FSPGR, MP-RAGE and their like."""

HEAD_COVERAGE_MM = {"sagittal": 120.0, "coronal": 150.0, "axial": 115.0}
"""Least extent along the slices that can hold a whole adult or child brain: it is about 140 mm wide, 170 mm long and
120 to 150 mm high from the vertex down (Lancaster 2007: MNI brain 136 x 172 mm)."""

HEAD_PARTS = re.compile(r"(?i)head|brain|skull|neuro|orbit|iac|pituitary|\bear|eye|face")
OTHER_BODY_PARTS = re.compile(
    r"(?i)spine|neck|knee|hip|pelvi|abdom|chest|thora|heart|card|breast|shoulder|elbow|wrist|hand|ankle|foot|leg|arm\b"
    r"|prostate|liver|whole.?body"
)
"""BodyPartExamined that names something else. What names a head as well ("HEADNECK"), or nothing known, passes."""

MAX_T1_ECHO_MS = 15.0
"""Echo times of T1-weighted gradient echoes are 1 to 10 ms; susceptibility-weighted and T2* images begin at about 18 ms."""

MAX_T1_INVERSION_MS = 1700.0
"""Inversion times of T1-weighted series are 400 to 1300 ms; the second image of MP2RAGE begins at about 2000 ms."""

MAX_SPOILED_REPETITION_MS = 60.0
MIN_SPOILED_FLIP_DEG = 8.0
"""A spoiled gradient echo without inversion is T1-weighted with a short repetition time and a flip angle above the Ernst
angle of grey matter (about 7 degrees at 7 ms and T1 = 1.3 s); below it the contrast is proton density."""

FEWEST_LOCALIZER_SLICES = 16
"""A series of several orientations with fewer slices in each is a localizer."""

# --- Matching ---------------------------------------------------------------------------------------------------------


def match_rule(stack: Stack, rules: Sequence[Rule], model: str | None = None) -> Rule | Reason:
    """The first rule that admits a stack.

    Args:
        stack: with its geometry, or why it has none.
        rules: in the order of preference; empty means the default rule alone.
        model: name of the model that is served; None leaves the rules' `model` aside.

    Returns:
        The rule, or why the stack is refused: what no rule could admit first, then what the nearest rule misses.
    """
    refused = what_it_is(stack)
    if refused is not None:
        return refused
    nearest: tuple[int, Reason] | None = None
    for rule in rules or (DEFAULT_RULE,):
        failed = first_failure(stack, rule)
        if failed is None and rule.model not in (None, model) and model is not None:
            failed = len(CONDITIONS), _no_rule(rule, f"it asks for the model {rule.model}, and {model} is served")
        if failed is None:
            return rule
        if nearest is None or failed[0] > nearest[0]:
            nearest = failed
    assert nearest is not None
    return nearest[1]


def what_it_is(stack: Stack) -> Reason | None:
    """Why no rule whatever can admit a stack, None if one might."""
    header = stack.representative
    words = header.frames[0].image_type if header.frames else ()
    is_image = header.sop_class_uid in SUPPORTED
    if isinstance(stack.geometry, Reason) and (stack.geometry.code in _WHATEVER_THE_RULE or not is_image):
        return stack.geometry
    if header.samples_per_pixel != 1 or (header.photometric and not header.photometric.startswith("MONOCHROME")):
        return _reason("colour")
    if "MOSAIC" in words or "VFRAME" in words:
        return _reason("mosaic")
    if "LOCALIZER" in words or _looks_like_localizer(stack):
        return _reason("localizer")
    return None


_WHATEVER_THE_RULE = ("too_large",)


def _looks_like_localizer(stack: Stack) -> bool:
    return stack.orientations > 1 and len(stack.planes) < FEWEST_LOCALIZER_SLICES


def first_failure(stack: Stack, rule: Rule) -> tuple[int, Reason] | None:
    """The first condition of a rule that a stack does not meet, with its place in the order; None if it meets all."""
    for place, condition in enumerate(CONDITIONS):
        reason = condition(stack, rule)
        if reason is not None:
            return place, reason
    return None


def default_rule(rules: Sequence[Rule]) -> Rule:
    """The rule for what has no header to match: the first."""
    return rules[0] if rules else DEFAULT_RULE


# --- Conditions, in the order in which they are told ------------------------------------------------------------------


def _is_from_scanner(stack: Stack, rule: Rule) -> Reason | None:
    if rule.scanner is None or re.search(rule.scanner, stack.scanner):
        return None
    return _no_rule(rule, f"it is for the scanner {rule.scanner!r}")


def _is_described(stack: Stack, rule: Rule) -> Reason | None:
    facts = stack.representative.attributes
    texts = [str(facts.get(name, "")) for name in ("SeriesDescription", "ProtocolName")]
    if rule.description is not None and not any(re.search(rule.description, text) for text in texts):
        return _no_rule(rule, "its description does not match")
    if rule.manufacturer is not None and not re.search(rule.manufacturer, str(facts.get("Manufacturer", ""))):
        return _no_rule(rule, "its manufacturer does not match")
    return None


def _has_attributes(stack: Stack, rule: Rule) -> Reason | None:
    facts = stack.representative.attributes
    for keyword, wanted in rule.attributes.items():
        value = facts.get(keyword)
        if isinstance(wanted, str):
            if value is None or not re.search(wanted, str(value)):
                return _no_rule(rule, f"{keyword} does not match")
        elif not isinstance(value, float) or not wanted[0] <= value <= wanted[1]:
            return _no_rule(rule, f"{keyword} lies outside {wanted[0]:g} to {wanted[1]:g}")
    return None


def _is_original(stack: Stack, rule: Rule) -> Reason | None:
    words = _image_type(stack)
    if not rule.derived and words[:1] == ("DERIVED",):
        return _reason("derived")
    if not rule.derived and ("SECONDARY" in words[1:2] or _DERIVED_WORDS.intersection(words)):
        return _reason("derived")
    return None


_DERIVED_WORDS = frozenset(
    (
        *("ADC", "FA", "TRACE", "TRACEW", "T1 MAP", "T2 MAP", "T1_MAP", "T2_MAP", "SUBTRACTION", "AVERAGE", "UNI"),
        *("MPR", "MIP", "MINIP", "PROJECTION", "PROJECTION IMAGE", "PROJECTION_IMAGE"),
        *("CSA REPORT", "CSA MPR", "CSA RESAMPLED", "CSA_REPORT", "CSA_MPR", "CSA_RESAMPLED"),
    )
)
"""Words of ImageType that name a derived image whatever its first value says."""


def _is_magnitude(stack: Stack, rule: Rule) -> Reason | None:
    component = _component(stack)
    if rule.magnitude and component not in ("", "M"):
        return _reason("phase")
    return None


def _has_image_type(stack: Stack, rule: Rule) -> Reason | None:
    words = _image_type(stack)
    for wanted in rule.image_type:
        absent = wanted.startswith("!")
        if (wanted.removeprefix("!").upper() in words) is absent:
            return _no_rule(rule, f"ImageType {'holds' if absent else 'lacks'} {wanted.removeprefix('!').upper()}")
    return None


def _is_combined(stack: Stack, rule: Rule) -> Reason | None:  # noqa: ARG001  (one signature for all conditions)
    coil = stack.representative.frames[0].coil
    alone = coil.startswith("C:") or (stack.coils > 1 and _COIL_ELEMENT.fullmatch(coil))
    return _reason("uncombined_coils") if alone else None


_COIL_ELEMENT = re.compile(r"[A-Z]{1,4}\d{1,2}")
"""A single coil element among several, such as "H12"; groups read "HE1-4". Siemens marks uncombined images as "C:H1"."""


def _is_three_d(stack: Stack, rule: Rule) -> Reason | None:
    return _reason("two_dimensional") if rule.three_d and stack.representative.acquisition_type == "2D" else None


def _is_fine_enough(stack: Stack, rule: Rule) -> Reason | None:
    frame = stack.representative.frames[0]
    for spacing in frame.pixel_spacing_mm or ():
        if not _within(spacing, rule.pixel_spacing_mm):
            return _too_coarse("pixels are", spacing, rule.pixel_spacing_mm)
    between = stack.geometry.spacing_mm[2] if isinstance(stack.geometry, Geometry) else frame.thickness_mm
    if between is not None and not _within(between, rule.slice_spacing_mm):
        return _too_coarse("slices lie", between, rule.slice_spacing_mm)
    return None


def _too_coarse(what: str, value: float, limits: Range | None) -> Reason:
    low, high = limits or (0.0, 0.0)
    return Reason("thick_slices", f"The {what} {value:.2f} mm apart; {low:g} to {high:g} mm are admitted.")


def _is_t1_weighted(stack: Stack, rule: Rule) -> Reason | None:
    if not rule.t1_weighted:
        return None
    missed = not_t1(stack.representative)
    return None if missed is None else _no_rule(rule, missed)


def not_t1(header: Header) -> str | None:
    """Why the header does not describe a T1-weighted gradient echo of a head, None if it does or does not tell."""
    frame, words, facts = header.frames[0], header.scanning, header.attributes
    if "EP" in words or "SE" in words:
        return "it is not a gradient echo"
    if facts.get("AngioFlag") == "Y" or str(facts.get("TimeOfFlightContrast", "")).upper() == "YES":
        return "it is an angiogram"
    part = str(facts.get("BodyPartExamined", ""))
    if OTHER_BODY_PARTS.search(part) and not HEAD_PARTS.search(part):
        return "it shows another part of the body"
    if frame.b_value:
        return "it is diffusion-weighted"
    if {"PERFUSION", "ASL", "PERFUSION_FFE"}.intersection(frame.image_type):
        return "it shows perfusion"
    if frame.echo_time_ms is not None and frame.echo_time_ms > MAX_T1_ECHO_MS:
        return f"its echo time of {frame.echo_time_ms:g} ms is not that of a T1 weighting"
    if frame.inversion_time_ms is not None and frame.inversion_time_ms > MAX_T1_INVERSION_MS:
        return f"its inversion time of {frame.inversion_time_ms:g} ms is not that of a T1 weighting"
    return _weak_spoiled(header)


def _weak_spoiled(header: Header) -> str | None:
    """A gradient echo without preparation is T1-weighted only with a short repetition time and a large flip angle."""
    prepared = "IR" in header.scanning or "MP" in header.variant or header.frames[0].inversion_time_ms is not None
    if prepared or not header.scanning:
        return None
    repetition, flip = header.repetition_time_ms, header.flip_angle_deg
    if repetition is not None and repetition > MAX_SPOILED_REPETITION_MS:
        return (
            None
            if repetition > 1000 and (flip or 0) < 20
            else f"its repetition time is {repetition:g} ms without inversion"
        )
    if flip is not None and flip < MIN_SPOILED_FLIP_DEG:
        return f"its flip angle of {flip:g} degrees without inversion gives no T1 weighting"
    return None


def _has_numbers(stack: Stack, rule: Rule) -> Reason | None:
    header, frame = stack.representative, stack.representative.frames[0]
    for name, value in (
        ("echo_time_ms", frame.echo_time_ms),
        ("inversion_time_ms", frame.inversion_time_ms),
        ("repetition_time_ms", header.repetition_time_ms),
        ("flip_angle_deg", header.flip_angle_deg),
    ):
        if value is not None and not _within(value, getattr(rule, name)):
            return _no_rule(rule, f"{name} is {value:g}")
    return None


def _has_geometry(stack: Stack, rule: Rule) -> Reason | None:
    if isinstance(stack.geometry, Reason):
        return stack.geometry
    if rule.orientation and stack.geometry.plane not in rule.orientation:
        return _no_rule(rule, f"its slices are {stack.geometry.plane}")
    if not _within(float(stack.geometry.slices), rule.slices):
        return Reason(
            "too_few_slices", f"There are {stack.geometry.slices} slices; {_words(rule.slices)} are admitted."
        )
    return None


def _covers_a_head(stack: Stack, rule: Rule) -> Reason | None:
    if not rule.head_coverage or not isinstance(stack.geometry, Geometry):
        return None
    least = HEAD_COVERAGE_MM[stack.geometry.plane]
    if stack.geometry.extent_mm >= least:
        return None
    text = f"The {stack.geometry.plane} slices cover {stack.geometry.extent_mm:.0f} mm; a head needs {least:.0f} mm."
    return Reason("partial_coverage", text)


def _is_preferred_twin(stack: Stack, rule: Rule) -> Reason | None:  # noqa: ARG001
    return _reason("twin") if stack.better_twin else None


CONDITIONS: tuple[Callable[[Stack, Rule], Reason | None], ...] = (
    _is_from_scanner,
    _is_described,
    _has_attributes,
    _is_original,
    _is_magnitude,
    _has_image_type,
    _is_combined,
    _is_three_d,
    _is_t1_weighted,
    _is_fine_enough,
    _has_numbers,
    _has_geometry,
    _covers_a_head,
    _is_preferred_twin,
)


def _image_type(stack: Stack) -> tuple[str, ...]:
    return stack.representative.frames[0].image_type


def _component(stack: Stack) -> str:
    return stack.representative.frames[0].component


def _within(value: float, limits: Range | None) -> bool:
    return limits is None or limits[0] <= value <= limits[1]


def _words(limits: Range | None) -> str:
    return "any number" if limits is None else f"{limits[0]:g} to {limits[1]:g}"


def _reason(code: str) -> Reason:
    return Reason(code, REASONS[code])


def _no_rule(rule: Rule, why: str) -> Reason:
    return Reason("no_rule", f"No selection rule matches this series; not {rule.name}: {why}.")


# --- From the configuration -------------------------------------------------------------------------------------------


def load_rules(entries: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Rules from the configuration, the default rule where there are none.

    Raises:
        RuleError: a rule that cannot be used.
    """
    rules = tuple(rule_from_dict(entry, number) for number, entry in enumerate(entries, 1))
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise RuleError(f"rules: name {name!r} stands twice; each must be unique")
    return rules or (DEFAULT_RULE,)


def rule_from_dict(entry: Mapping[str, Any], number: int = 1) -> Rule:
    """One rule from a TOML table.

    Args:
        entry: key -> value as in `[[rules]]`.
        number: its place, for messages.

    Raises:
        RuleError: an unknown key (with the nearest known one), or a value that cannot be used.
    """
    fields = {f.name: f for f in dataclasses.fields(Rule)}
    where = f"rules[{number}]"
    for key in entry:
        if key not in fields:
            raise RuleError(f"{where}.{key}: unknown key{_nearest(key, tuple(fields))}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RuleError(f"{where}.name: got {name!r}; use 1 to 64 of a-z 0-9 _ -")
    return Rule(**{key: _convert(key, value, f"{where}.{key}") for key, value in entry.items()})


_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_REGEXES = ("scanner", "description", "manufacturer")
_RANGES = (
    *("slices", "slice_spacing_mm", "pixel_spacing_mm"),
    *("echo_time_ms", "repetition_time_ms", "inversion_time_ms", "flip_angle_deg"),
)
_SWITCHES = ("derived", "magnitude", "three_d", "t1_weighted", "head_coverage")
_CHOICES = {"orientation": PLANE_NAMES, "outputs": OUTPUTS}


def _convert(key: str, value: Any, path: str) -> Any:
    if key in _REGEXES:
        return _regex(value, path)
    if key in _RANGES:
        return _range(value, path)
    if key in _SWITCHES:
        return _typed(bool, value, path)
    if key == "required_dice":
        return _dice(value, path)
    if key in ("orientation", "outputs", "image_type"):
        return _choices(value, _CHOICES.get(key), path)
    if key == "attributes":
        return _attributes(value, path)
    return _typed(str, value, path)


def _attributes(value: Any, path: str) -> dict[str, str | Range]:
    found: dict[str, str | Range] = {}
    for keyword, wanted in _typed(dict, value, path).items():
        if keyword not in MATCHABLE:
            raise RuleError(f"{path}.{keyword}: no such attribute{_nearest(keyword, MATCHABLE)}")
        place = f"{path}.{keyword}"
        found[keyword] = _regex(wanted, place) if isinstance(wanted, str) else _range(wanted, place)
    return found


def _regex(value: Any, path: str) -> str:
    text = _typed(str, value, path)
    try:
        re.compile(text)
    except re.error as error:
        raise RuleError(f"{path}: got {text!r}, no regular expression ({error}); mend it") from None
    return str(text)


def _range(value: Any, path: str) -> Range:
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise RuleError(f"{path}: got {value!r}; write [lowest, highest]")
    low, high = float(numbers[0]), float(numbers[1])
    if not low <= high:
        raise RuleError(f"{path}: got {value!r}; the first must not exceed the second")
    return low, high


def _dice(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise RuleError(f"{path}: got {value!r}; it must lie between 0 and 1")
    return float(value)


def _choices(value: Any, known: tuple[str, ...] | None, path: str) -> tuple[str, ...]:
    words = tuple(_typed(str, word, path) for word in _typed(list, value, path))
    for word in words:
        if known is not None and word not in known:
            raise RuleError(f"{path}: got {word!r}; use {', '.join(known)}")
    return words


def _typed(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, kind):
        raise RuleError(f"{path}: got {value!r}; expected {kind.__name__}")
    return value


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
