"""What is inside a series: one test for each case that scanners are known to send."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from daemon.geometry import Geometry
from daemon.header import read_header
from daemon.rules import DEFAULT_RULE, Rule, match_rule
from daemon.simulate import MAKERS
from daemon.stack import Stack
from daemon.words import Reason, Refusal
from tests.builders import Feed, build, build_classic_series, build_enhanced, every, little_stack, part10, stacks_in

SLICES = 56
"""Of 2.5 mm: as much as a head is wide."""


def thin_head(**overrides: object) -> list[Dataset]:
    """Small slices that cover a head, so that the default rule admits them."""
    return little_stack(SLICES, **overrides)


def renamed(images: list[Dataset], name: str, **values: object) -> list[Dataset]:
    """The same series with other SOPInstanceUIDs and attributes; a function gets the slice's number."""
    for number, ds in enumerate(images):
        ds.SOPInstanceUID = f"1.2.826.{name}.{number}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        for keyword, value in values.items():
            setattr(ds, keyword, value(number) if isinstance(value, Callable) else value)  # type: ignore[arg-type]
    return images


def codes(stacks: list[Stack], *rules: Rule) -> list[str]:
    """Rule name or refusal code of each stack."""
    found = [match_rule(stack, rules) for stack in stacks]
    return [each.code if isinstance(each, Reason) else each.name for each in found]


def code_of(stack: Stack) -> str:
    """Refusal code of the geometry."""
    assert isinstance(stack.geometry, Reason)
    return stack.geometry.code


def test_the_order_of_arrival_and_instance_numbers_do_not_matter() -> None:
    """Images are ordered by their position along the normal alone."""
    images = little_stack()
    straight = build(stacks_in(images)[0], images)
    for number, ds in enumerate(random.Random(1).sample(images, len(images))):
        ds.InstanceNumber = str(number)
    random.Random(2).shuffle(images)
    (stack,) = stacks_in(images)
    again = build(stack, images)
    np.testing.assert_array_equal(straight.voxels, again.voxels)
    np.testing.assert_allclose(straight.affine, again.affine)


def test_missing_slices_are_named() -> None:
    """A gap by position is told, with the number of slices and where."""
    images = little_stack()
    del images[4:6]
    (stack,) = stacks_in(images)
    assert code_of(stack) == "missing_slices"
    assert isinstance(stack.geometry, Reason)
    assert "2 slices are missing" in stack.geometry.text


def test_every_other_slice_missing_is_no_coarser_volume() -> None:
    """A regular pattern of missing slices is found by the announced spacing."""
    (stack,) = stacks_in(little_stack(24)[::2])
    assert code_of(stack) == "missing_slices"


def test_random_slices_of_a_grid_are_missing_slices_too() -> None:
    """Most slices missing: the announced spacing still finds the grid."""
    images = random.Random(3).sample(little_stack(40), 12)
    assert code_of(stacks_in(images)[0]) == "missing_slices"


def test_two_derived_images_under_one_uid_are_split_by_image_type() -> None:
    """The same positions twice, MEAN and MEAN MEAN: two stacks, both refused as derived."""
    first = renamed(thin_head(), "1", ImageType=["DERIVED", "SECONDARY", "MEAN"])
    second = renamed(thin_head(), "2", ImageType=["DERIVED", "SECONDARY", "MEAN", "MEAN"])
    stacks = stacks_in(first + second)
    assert [len(s.planes) for s in stacks] == [SLICES, SLICES]
    assert codes(stacks) == ["derived", "derived"]


def test_a_localizer_slice_inside_the_series_does_not_change_the_volume() -> None:
    """Same SeriesInstanceUID, number and description, another orientation and size: a stack of its own."""
    images = thin_head()
    localizer = renamed(
        build_classic_series(np.full((16, 16, 1), 9, np.uint16), (8.0, 8.0, 8.0), "axial")[:1],
        "9",
        SeriesInstanceUID=images[0].SeriesInstanceUID,
        StudyInstanceUID=images[0].StudyInstanceUID,
    )
    alone = stacks_in(images)
    stacks = stacks_in(images[:20] + localizer + images[20:])
    assert codes(stacks) == ["t1_head_3d", "localizer"]
    assert stacks[0].geometry == alone[0].geometry


def test_a_three_plane_localizer_is_refused() -> None:
    """Three orientations of a few slices each."""
    images = []
    for number, plane in enumerate(("sagittal", "coronal", "axial")):
        some = build_classic_series(np.full((16, 16, 16), 7, np.uint16), (2.5, 2.5, 2.5), plane)[:3]
        images += renamed(some, str(number))
    stacks = stacks_in(images)
    assert codes(stacks) == ["localizer"] * 3


def test_the_localizer_flag_of_ge_is_read() -> None:
    """GE tells a three-plane localizer in (0019,1017) alone."""
    images = thin_head()
    for ds in images:
        ds.private_block(0x0019, "GEMS_ACQU_01", create=True).add_new(0x17, "SS", 256)
    assert codes(stacks_in(images)) == ["localizer"]


def test_echoes_are_split_by_echo_time() -> None:
    """Multi-echo: one stack for each echo, whatever the instance numbers repeat."""
    echoes = [renamed(thin_head(), str(n), EchoTime=str(2.0 + n), EchoNumbers=str(n + 1)) for n in range(3)]
    stacks = stacks_in([ds for trio in zip(*echoes, strict=True) for ds in trio])
    assert [s.representative.frames[0].echo_time_ms for s in stacks] == [2.0, 3.0, 4.0]
    assert codes(stacks) == ["t1_head_3d"] * 3


def test_echoes_that_repeat_every_number_are_never_concatenated() -> None:
    """GE may repeat echo time and numbers between echoes: repeated positions become volumes, in the order of the run."""
    first, second = renamed(little_stack(), "1"), renamed(little_stack(), "2")
    for run, images in ((11, second), (10, first)):
        for ds in images:
            ds.private_block(0x0019, "GEMS_ACQU_01", create=True).add_new(0xA2, "SL", run)
    (stack,) = stacks_in(second + first)
    assert (stack.volumes, len(stack.planes)) == (2, 12)
    assert {s.sop_instance_uid for s in stack.instances} == {str(ds.SOPInstanceUID) for ds in first}


@pytest.mark.parametrize(
    ("image_type", "extra", "code"),
    [
        (["ORIGINAL", "PRIMARY", "M", "ND"], {}, "t1_head_3d"),
        (["ORIGINAL", "PRIMARY", "P", "ND"], {}, "phase"),
        (["ORIGINAL", "PRIMARY", "R", "ND"], {}, "phase"),
        (["ORIGINAL", "PRIMARY", "I", "ND"], {}, "phase"),
        (["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"], {}, "phase"),
        (["ORIGINAL", "PRIMARY", "OTHER"], {"ComplexImageComponent": "PHASE"}, "phase"),
    ],
)
def test_only_magnitude_is_judged(image_type: list[str], extra: dict[str, str], code: str) -> None:
    """Magnitude, phase, real and imaginary by ImageType or ComplexImageComponent."""
    assert codes(stacks_in(every(thin_head(), ImageType=image_type, **extra))) == [code]


@pytest.mark.parametrize(("kind", "code"), [(0, "t1_head_3d"), (1, "phase"), (2, "phase"), (3, "phase")])
def test_the_raw_data_type_of_ge_tells_magnitude(kind: int, code: str) -> None:
    """GE tells the component in (0043,102F) alone."""
    images = every(thin_head(), ImageType=["ORIGINAL", "PRIMARY", "OTHER"])
    for ds in images:
        ds.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x2F, "SS", kind)
    assert codes(stacks_in(images)) == [code]


def test_of_corrected_twins_the_corrected_one_is_judged() -> None:
    """ND beside DIS2D of one acquisition, in two series: DIS2D is judged, whichever came first."""
    plain = renamed(thin_head(seed="a"), "1", ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "NORM"])
    better = renamed(thin_head(seed="b"), "2", ImageType=["ORIGINAL", "PRIMARY", "M", "DIS2D", "NORM"])
    for ds in better:
        ds.StudyInstanceUID = plain[0].StudyInstanceUID
    assert codes(stacks_in(plain + better)) == ["twin", "t1_head_3d"]
    assert codes(stacks_in(better + plain)) == ["t1_head_3d", "twin"]


def test_the_normalised_twin_is_preferred() -> None:
    """NORM beside not normalised."""
    plain = renamed(thin_head(seed="a"), "1", ImageType=["ORIGINAL", "PRIMARY", "M", "ND"])
    better = renamed(thin_head(seed="b"), "2", ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "NORM"])
    for ds in better:
        ds.StudyInstanceUID = plain[0].StudyInstanceUID
    assert codes(stacks_in(plain + better)) == ["twin", "t1_head_3d"]


def test_siemens_xa_tells_the_correction_in_a_private_attribute() -> None:
    """ImageTypeText (0021,1175) is added to ImageType."""
    ds = little_stack(1)[0]
    ds.private_block(0x0021, "SIEMENS MR SDI 02", create=True).add_new(
        0x75, "LO", ["ORIGINAL", "PRIMARY", "M", "DIS3D"]
    )
    assert "DIS3D" in read_header(part10(ds)).frames[0].image_type


@pytest.mark.parametrize(
    "image_type",
    [
        ["DERIVED", "PRIMARY", "MPR"],
        ["DERIVED", "SECONDARY", "REFORMATTED"],
        ["ORIGINAL", "SECONDARY"],
        ["ORIGINAL", "PRIMARY", "MIP"],
        ["DERIVED", "PRIMARY", "M", "UNI"],
        ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"],
        ["DERIVED", "SECONDARY", "OTHER", "CSA REPORT"],
    ],
)
def test_derived_images_are_refused_unless_a_rule_admits_them(image_type: list[str]) -> None:
    """MPR, MIP, maps, reports and secondary images."""
    stacks = stacks_in(every(thin_head(), ImageType=image_type))
    assert codes(stacks) == ["derived"]
    assert codes(stacks, Rule(name="derived_too", derived=True)) == ["derived_too"]


def test_uncombined_coils_are_split_and_refused() -> None:
    """One stack for each coil element; none is the image that a radiologist reads."""
    coils = [renamed(thin_head(), str(n), ReceiveCoilName=f"H{n}") for n in (1, 2)]
    assert codes(stacks_in(coils[0] + coils[1])) == ["uncombined_coils"] * 2


def test_a_4d_series_is_judged_by_its_first_volume() -> None:
    """Repeated positions become volumes by the temporal index; they are never concatenated."""
    volumes = [renamed(little_stack(), str(n), TemporalPositionIdentifier=str(n)) for n in (1, 2, 3)]
    (stack,) = stacks_in([ds for volume in reversed(volumes) for ds in volume])
    assert (stack.volumes, len(stack.planes)) == (3, 12)
    assert {s.sop_instance_uid for s in stack.instances} == {str(ds.SOPInstanceUID) for ds in volumes[0]}


def test_diffusion_is_split_by_b_value() -> None:
    """B = 0 and b = 1000 are stacks of their own."""
    images = [renamed(little_stack(), str(n), DiffusionBValue=float(b)) for n, b in enumerate((0, 1000))]
    assert [s.representative.frames[0].b_value for s in stacks_in(images[0] + images[1])] == [0.0, 1000.0]


def test_the_partial_last_volume_of_an_aborted_4d_series_is_dropped() -> None:
    """A whole volume is judged though the last one lacks slices."""
    whole, partial = renamed(little_stack(), "1"), renamed(little_stack()[:5], "2")
    for number, images in enumerate((whole, partial)):
        every(images, AcquisitionNumber=str(number + 1))
    (stack,) = stacks_in(partial + whole)
    assert (stack.volumes, len(stack.planes)) == (2, 12)
    assert isinstance(stack.geometry, Geometry)


@pytest.mark.parametrize("word", ["MOSAIC", "VFRAME"])
def test_mosaics_are_refused(word: str) -> None:
    """Siemens mosaic and UIH grid."""
    assert codes(stacks_in(every(little_stack(3), ImageType=["ORIGINAL", "PRIMARY", "M", word]))) == ["mosaic"]


def test_two_geometries_in_one_enhanced_image_become_two_stacks() -> None:
    """Brain and cord in one file: frames are grouped by orientation and spacing."""
    rng = np.random.default_rng(0)
    ds = build_enhanced(rng.integers(1, 99, (16, 16, 32)).astype(np.uint16))
    shared = ds.SharedFunctionalGroupsSequence[0]
    measures, orientation = shared.PixelMeasuresSequence, shared.PlaneOrientationSequence
    del shared.PixelMeasuresSequence, shared.PlaneOrientationSequence
    for number, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        frame.PixelMeasuresSequence, frame.PlaneOrientationSequence = measures, orientation
        if number >= 20:
            other = Dataset()
            other.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            frame.PlaneOrientationSequence = Sequence([other])
            frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2.0 * number]
    first, second = stacks_in([ds])
    assert [len(first.planes), len(second.planes)] == [20, 12]
    for stack in (first, second):
        voxels = build(stack, [ds]).voxels
        for k, plane in enumerate(stack.planes):
            np.testing.assert_array_equal(voxels[..., k].T, ds.pixel_array[plane.frame])


def test_the_private_position_of_philips_is_not_read() -> None:
    """A second ImagePositionPatient half a voxel away inside (2005,140F) changes nothing."""
    images = little_stack()
    plain = stacks_in(images)[0].geometry
    for ds in images:
        inner = Dataset()
        inner.ImagePositionPatient = [x + 1.25 for x in ds.ImagePositionPatient]
        ds.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(0x0F, "SQ", Sequence([inner]))
    assert stacks_in(images)[0].geometry == plain


@pytest.mark.parametrize(("about_x", "about_z"), [(12.0, 0.0), (12.0, 7.0), (-30.0, 25.0)])
def test_oblique_and_double_oblique_stacks_keep_their_affine(about_x: float, about_z: float) -> None:
    """The affine of the volume is the one that was sliced; nothing is resampled."""
    a, b = np.deg2rad([about_x, about_z])
    turn_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn_z @ turn_x * 2.5
    affine[:3, 3] = [-31.0, 17.0, 5.5]
    voxels = np.random.default_rng(1).integers(1, 900, (14, 13, 12)).astype(np.uint16)
    images = build_classic_series(voxels, (2.5, 2.5, 2.5), "axial", affine=affine)
    volume = build(stacks_in(images)[0], images)
    for index in ((0, 0, 0), (3, 4, 5), (11, 12, 13)):
        world = affine @ [*index, 1.0]
        i, j, k = np.rint((np.linalg.inv(volume.affine) @ world)[:3]).astype(int)
        np.testing.assert_allclose(volume.affine @ [i, j, k, 1.0], world, atol=1e-4)
        assert volume.voxels[i, j, k] == voxels[index[::-1]]


def test_a_sheared_stack_is_refused() -> None:
    """Gantry tilt: slices move sideways as they follow each other."""
    images = little_stack()
    for number, ds in enumerate(images):
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, y + 0.3 * number, z]
    assert code_of(stacks_in(images)[0]) == "non_orthogonal"


def test_the_rescale_of_each_slice_is_applied_before_stacking() -> None:
    """Slopes that differ from slice to slice (Philips) give one intensity scale."""
    images = little_stack()
    plain = build(stacks_in(images)[0], images)
    for number, ds in enumerate(images):
        ds.RescaleSlope, ds.RescaleIntercept = str(1.0 + 0.25 * number), str(number)
    scaled = build(stacks_in(images)[0], images)
    for number in range(12):
        # Along its normal a sagittal stack runs against the order in which it was made.
        one, other = scaled.voxels[..., 11 - number], plain.voxels[..., 11 - number]
        np.testing.assert_allclose(one, other * (1 + 0.25 * number) + number, rtol=1e-6)


def test_the_private_scale_and_real_world_map_of_philips_are_not_applied() -> None:
    """Neither (2005,100E) nor RealWorldValueMapping changes the values."""
    images = little_stack()
    plain = build(stacks_in(images)[0], images)
    for ds in images:
        mapping = Dataset()
        mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 7.0, 3.0
        ds.RealWorldValueMappingSequence = Sequence([mapping])
        ds.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(0x0E, "FL", 0.007)
    np.testing.assert_array_equal(build(stacks_in(images)[0], images).voxels, plain.voxels)


def test_more_slices_than_locations_is_no_fault() -> None:
    """GE interpolation doubles the slices; LocationsInAcquisition is not compared."""
    images = thin_head(ImagesInAcquisition=str(SLICES))
    for ds in images:
        ds.NumberOfSlices = SLICES // 2
    (stack,) = stacks_in(images)
    assert stack.is_whole
    assert codes([stack]) == ["t1_head_3d"]


def test_the_whole_series_again_hours_later_changes_nothing() -> None:
    """Idempotent: no verdict, no alert, no revision."""
    images = little_stack()
    feed = Feed().send(images).wait(100)
    assert len(feed.take()) == 2
    assert feed.wait(4 * 3600).send(images, association=2).end(2).wait(500).take() == []


def test_canon_with_one_series_uid_per_slice_is_one_stack() -> None:
    """Classic Canon: the series is known by its number."""
    images = thin_head()
    MAKERS["canon"](images)
    assert len({ds.SeriesInstanceUID for ds in images}) == SLICES
    stacks = stacks_in(images)
    assert [len(s.planes) for s in stacks] == [SLICES]
    assert codes(stacks) == ["t1_head_3d"]


def test_siemens_xa_with_one_series_per_volume_gives_one_stack_per_volume() -> None:
    """MFSPLIT: each volume has its own SeriesInstanceUID and is a stack of its own."""
    volumes = [
        every(renamed(little_stack(seed=f"v{n}"), str(n)), ImageType=["ORIGINAL", "PRIMARY", "M", "MFSPLIT"])
        for n in range(3)
    ]
    assert [len(s.planes) for s in stacks_in([ds for volume in volumes for ds in volume])] == [12, 12, 12]


@pytest.mark.parametrize("maker", list(MAKERS))
def test_every_makers_t1_is_admitted_by_the_default_rule(maker: str) -> None:
    """Siemens, GE, Philips, Canon and UIH."""
    images = thin_head()
    MAKERS[maker](images)
    assert codes(stacks_in(images)) == [DEFAULT_RULE.name]


def test_a_repeated_series_with_new_uids_is_a_second_volume() -> None:
    """The same images anonymised twice are not stacked on top of each other."""
    first, second = renamed(little_stack(), "1"), renamed(little_stack(), "2")
    (stack,) = stacks_in(first + second)
    assert (stack.volumes, len(stack.planes)) == (2, 12)


def test_a_slice_off_its_place_is_non_uniform() -> None:
    """A shift of a fifth of the spacing is found wherever it is, also far from the first slice."""
    images = thin_head()
    x, y, z = (float(v) for v in images[50].ImagePositionPatient)
    images[50].ImagePositionPatient = [x + 0.5, y, z]
    assert code_of(stacks_in(images)[0]) == "non_uniform"


def test_rounded_positions_are_regular() -> None:
    """Positions rounded to hundredths over hundreds of slices do not add up to a fault."""
    images = build_classic_series(np.ones((8, 8, 300), np.uint16), (0.7, 0.7, 0.7033333))
    for ds in images:
        ds.ImagePositionPatient = [f"{float(v):.2f}" for v in ds.ImagePositionPatient]
    (stack,) = stacks_in(images)
    assert isinstance(stack.geometry, Geometry)
    assert stack.geometry.spacing_mm[2] == pytest.approx(0.70333, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"ImagePositionPatient": None}, "no_geometry"),
        ({"ImageOrientationPatient": None}, "no_geometry"),
        ({"PixelSpacing": None}, "no_geometry"),
        ({"PixelSpacing": ["0", "2"]}, "no_geometry"),
        ({"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}, "no_geometry"),
        ({"ImageOrientationPatient": ["2", "0", "0", "0", "1", "0"]}, "no_geometry"),
    ],
)
def test_geometry_that_cannot_be_used_is_named(values: dict[str, object], code: str) -> None:
    """Absent or absurd position, orientation or spacing."""
    (stack,) = stacks_in(every(little_stack(), **values))
    assert code_of(stack) == code
    with pytest.raises(Refusal, match=code):
        build(stack, little_stack())


def test_colour_is_refused() -> None:
    """RGB secondary captures under the MR class."""
    images = every(little_stack(), SamplesPerPixel=3, PhotometricInterpretation="RGB")
    assert codes(stacks_in(images)) == ["colour"]


def test_part_of_a_head_is_never_admitted() -> None:
    """60 % of the slices: the stack is too short to hold a head, in each plane."""
    for plane, slices in (("sagittal", 42), ("coronal", 52), ("axial", 44)):
        shape = {"sagittal": (8, 8, slices), "coronal": (8, slices, 8), "axial": (slices, 8, 8)}[plane]
        images = build_classic_series(np.full(shape, 5, np.uint16), (2.5, 2.5, 2.5), plane)
        assert codes(stacks_in(images)) == ["partial_coverage"], plane


def test_an_enhanced_run_of_thousands_of_frames_is_refused_without_reading_them() -> None:
    """A 4D Enhanced instance cannot hold up the headers behind it."""
    ds = build_enhanced(np.full((8, 8, 8), 5, np.uint16), NumberOfFrames="20000")
    header = read_header(part10(ds))
    assert header.frames == ()
    assert codes(stacks_in([ds])) == ["too_large"]
