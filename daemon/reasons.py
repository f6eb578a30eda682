"""Every reason and advice code with its default sentence: the one list behind results, metric labels, page and docs.

A sentence may be told with the numbers of the case instead; the code stays. Nothing here names a patient or a UID.
"""

from __future__ import annotations

REFUSALS: dict[str, str] = {
    # What it is, by the header
    "unsupported_sop": "This is not an MR image; only MR, Enhanced MR and Legacy Converted Enhanced MR are judged.",
    "bad_header": "The header cannot be read.",
    "colour": "The image is in colour; only greyscale images are judged.",
    "mosaic": "Many slices are tiled into one image (mosaic); such images are not judged.",
    "localizer": "This is a localizer.",
    "derived": "This is a derived image, not one that the scanner acquired.",
    "phase": "This is not a magnitude image (phase, real, imaginary or a map).",
    "uncombined_coils": "This is the image of a single coil element, not the combined image.",
    "two_dimensional": "This is a 2D acquisition; the model knows 3D acquisitions only.",
    "thick_slices": "The slices or pixels are too large for the model.",
    "twin": "The same acquisition came in a preferred form (distortion-corrected or normalised), which is judged.",
    "no_rule": "No selection rule matches this series.",
    # Geometry
    "no_geometry": "Position, orientation or spacing of the slices is missing or unusable.",
    "too_few_slices": "There are too few slices to make a volume.",
    "missing_slices": "Slices are missing inside the volume.",
    "non_uniform": "The slices are not evenly spaced.",
    "non_orthogonal": "The slices are sheared: their axes are not at right angles.",
    "too_large": "The volume is too large to be read safely.",
    "partial_coverage": "Only part of the head lies in the field of view.",
    # Pixels
    "bad_pixels": "The pixel data cannot be decoded.",
    "unsupported_encoding": "The pixel data is encoded in a way that is not read (transfer syntax).",
    "no_signal": "The image is empty.",
    # The image itself
    "not_a_head": "The image does not look like a whole head.",
    "unsupported_contrast": "The contrast is not that of a T1-weighted head.",
    # The daemon
    "not_calibrated": "The model has no calibration: its scores have no meaning yet.",
    "scorer_failed": "Scoring failed; the log tells where.",
    "scorer_crashed": "Scoring crashed repeatedly; the series was set aside.",
}
"""Codes that make `CANNOT_JUDGE`. A refusal is never an alert."""

VERDICT_REASONS: dict[str, str] = {
    "good_enough": "The grey-matter segmentation of this scan is predicted to be good enough.",
    "dice_below_required": "The grey-matter segmentation of this scan is predicted to miss the requirement.",
    "worse_than_clean": "The scan is more uncertain than nearly all clean scans.",
    "incomplete": "Fewer images have come than the header announces.",
    "grey_matter_only": "Only grey matter is judged.",
    "artefact_noise": "It looks most like noise.",
    "artefact_spike": "It looks most like an RF spike.",
    "artefact_blur": "It looks most like blur or missing resolution.",
    "artefact_wrap": "It looks most like wrap-around or undersampling ghosts.",
    "artefact_motion": "It looks most like patient motion.",
}
"""Codes beside `PASS`, `REVIEW` and `RESCAN`."""

REASONS: dict[str, str] = {**REFUSALS, **VERDICT_REASONS}

ADVICE: dict[str, str] = {
    "advice_noise": "Check that the head coil is plugged in, selected and closed around the head, then repeat the scan.",
    "advice_spike": "Repeat the scan once. If the stripes come back, call the service engineer: look for sparking, loose metal, lamps.",
    "advice_blur": "Check matrix, partial Fourier and acceleration against the protocol, then repeat the scan.",
    "advice_wrap": "Enlarge the field of view or the phase oversampling, check the phase direction and the head's position, then repeat.",
    "advice_motion": "Talk to the patient, pad the head, and repeat the scan; use the fast or motion-corrected protocol if there is one.",
    "advice_repeat": "Look at the images; repeat the scan while the patient is still on the table.",
    "advice_look": "Look at the images before the patient leaves: the scan is at the border.",
    "advice_send_all": "Send the missing images again; the verdict is then renewed.",
    "advice_by_hand": "Judge this scan by eye.",
}
"""What to do about it."""

COMPLETENESS: dict[str, str] = {
    "counted": "as many images as the header announces, and a closed geometry",
    "released": "the association was released, the geometry is regular, and nothing came for a while",
    "quiet": "nothing came for the provisional quiet time",
    "quiet_final": "nothing came for the final quiet time",
    "timeout": "the longest time that a stack may stay open has passed",
    "score_now": "a person asked for the verdict",
    "mpps": "the scanner's procedure step lists exactly these images (not used yet)",
    "file": "read from files: nothing more will come",
}
"""Evidence codes: why a stack was called complete."""
