"""`rescan demo`: made-up scans of a made-up head, pushed to a daemon of its own. Nothing is downloaded."""
