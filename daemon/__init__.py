"""Rescan's daemon: from a pushed series to a published verdict. Never imports torch, `training` or `export`."""

import os

__version__ = "0.1.0"

NOTICE = (
    "Research and quality-assurance software. Not a medical device: not cleared or approved by the FDA, not CE-marked. "
    "Never the sole basis of a decision about a patient; a qualified person must review the images."
)

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime uploads usage data unless told before it is imported
