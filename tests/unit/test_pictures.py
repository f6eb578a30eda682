"""The pictures of the worst slices: right slice, right side, right layer, and nothing half written."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daemon.page.routes import _PICTURE_NAME
from daemon.pictures import (
    FULL_FACTOR,
    LAYERS,
    Pictures,
    draw,
    opacity,
    png_grey,
    png_layer,
    read_manifest,
    read_picture,
    remove_older,
    write,
)
from daemon.prepare import prepare
from daemon.score import WorstSlice
from daemon.words import Volume
from tests.browser.phantom import head_maps, head_pictures, head_volume


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def alpha(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))[..., 3]


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return head_pictures()


def test_png_files_say_what_went_in() -> None:
    """Another decoder reads back every grey level and every opacity."""
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert np.array_equal(pixels(png_grey(ramp)), ramp)
    layer = Image.open(io.BytesIO(png_layer(ramp, (1, 2, 3)))).convert("RGBA")
    assert np.array_equal(np.asarray(layer)[..., 3], ramp)
    assert set(map(tuple, np.asarray(layer)[..., :3].reshape(-1, 3).tolist())) == {(1, 2, 3)}


def test_every_plane_has_every_layer_of_the_same_size(pictures: Pictures) -> None:
    """Layers fit on their grey image, and every file can be asked for by the page."""
    for plane in pictures.manifest["planes"]:
        size = (plane["height"], plane["width"])
        assert pixels(pictures.files[f"{plane['plane']}.png"]).shape == size
        for layer in LAYERS:
            assert alpha(pictures.files[f"{plane['plane']}-{layer}.png"]).shape == size
    assert all(_PICTURE_NAME.fullmatch(name) for name in pictures.files)


def test_the_uncertain_artefact_shows_where_it_is_and_the_others_do_not(pictures: Pictures) -> None:
    """The ball of motion variance lies on the patient's right, front, top: left, top in the axial picture."""
    shown = alpha(pictures.files["axial-motion.png"]).astype(float)
    rows, columns = np.indices(shown.shape)
    assert np.average(columns, weights=shown) < shown.shape[1] / 2
    assert np.average(rows, weights=shown) < shown.shape[0] / 2
    assert shown.sum() > 3 * alpha(pictures.files["axial-wrap.png"]).sum()


@pytest.mark.parametrize(
    ("mark_mm", "edge"),
    [((45, 0, 60), ("axial", "left")), ((0, 55, 60), ("axial", "top")), ((0, 55, 60), ("sagittal", "left"))],
)
def test_sides_are_where_the_letters_say(mark_mm: tuple[float, float, float], edge: tuple[str, str]) -> None:
    """A bright mark on the patient's right (or front) appears at the edge that carries R (or A)."""
    volume = head_volume()
    marked = volume.voxels.copy()
    at = np.round(np.linalg.inv(volume.affine) @ [*mark_mm, 1])[:3].astype(int)
    marked[tuple(slice(i - 3, i + 4) for i in at)] = 3000
    prepared = prepare(volume)
    index = np.round(np.linalg.inv(prepared.affine) @ [*mark_mm, 1])[:3].astype(int)
    worst = [WorstSlice(p, int(index[a]), 0, 1, "") for a, p in enumerate(("sagittal", "coronal", "axial"))]
    maps = head_maps(prepared)
    plain = draw(volume, prepared, maps, worst).files[f"{edge[0]}.png"]
    spotted = draw(Volume(marked, volume.affine), prepared, maps, worst).files[f"{edge[0]}.png"]
    rows, columns = np.nonzero(np.abs(pixels(spotted).astype(int) - pixels(plain)) > 20)
    height, width = pixels(plain).shape
    assert len(rows) > 0
    assert (columns.mean() / width if edge[1] == "left" else rows.mean() / height) < 0.5


def test_the_picture_is_the_same_however_the_volume_is_stored() -> None:
    """Stored back to front and with swapped axes, the same head gives the same picture."""
    volume = head_volume()
    turned = np.ascontiguousarray(np.flip(volume.voxels, 0).transpose(2, 0, 1))
    affine = volume.affine @ np.array(
        [[-1, 0, 0, volume.voxels.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    )
    affine = affine[:, [2, 0, 1, 3]]
    prepared = prepare(volume)
    maps = head_maps(prepared)
    worst = [WorstSlice("axial", 62, 0, 1, "")]
    first = draw(volume, prepared, maps, worst)
    second = draw(Volume(turned, affine), prepare(Volume(turned, affine)), maps, worst)
    assert np.abs(pixels(first.files["axial.png"]).astype(int) - pixels(second.files["axial.png"])).max() <= 1


def test_opacity_begins_at_the_level_and_grows_with_the_variance() -> None:
    """Nothing up to the level, everything at eight times it, never falling between."""
    shown = opacity(np.array([0.0, 0.5, 1.0, 2.0, 4.0, FULL_FACTOR, 1e6], np.float32), 1.0)
    assert shown[:3].tolist() == [0, 0, 0]
    assert shown[-2:].tolist() == [255, 255]
    assert np.all(np.diff(shown.astype(int)) >= 0)


def test_a_slice_outside_the_volume_is_black() -> None:
    """A box that reaches beyond the field of view gives black, not an error."""
    volume = head_volume()
    prepared = prepare(volume)
    above = replace(prepared, box=replace(prepared.box, start_mm=(*prepared.box.start_mm[:2], 400.0)))
    drawn = draw(volume, above, head_maps(prepared), [WorstSlice("axial", 90, 0, 1, "")])
    assert pixels(drawn.files["axial.png"]).max() == 0


def test_pictures_are_written_whole_read_back_and_removed(tmp_path: Path, pictures: Pictures) -> None:
    """What was written is read; a second write changes nothing; old ones go."""
    folder = tmp_path / "pictures"
    write(pictures, folder, "abc-1")
    write(pictures, folder, "abc-1")
    assert read_manifest(folder, "abc-1") == pictures.manifest
    assert read_picture(folder, "abc-1", "axial.png") == pictures.files["axial.png"]
    assert [p.name for p in folder.iterdir()] == ["abc-1"]
    os.utime(folder / "abc-1", (100, 100))
    assert remove_older(folder, 101.0) == 1
    assert read_manifest(folder, "abc-1") is None
    assert remove_older(tmp_path / "nothing", 101.0) == 0


@pytest.mark.parametrize("name", ["..", "a/b", "", "a.b", "x" * 200])
def test_an_identifier_that_could_be_a_path_is_refused(tmp_path: Path, name: str, pictures: Pictures) -> None:
    """Neither written nor read."""
    with pytest.raises(ValueError, match="picture_id"):
        write(pictures, tmp_path, name)
    assert read_manifest(tmp_path, name) is None
    assert read_picture(tmp_path, name, "axial.png") is None
    assert read_picture(tmp_path, "abc", "../../ledger.db") is None
