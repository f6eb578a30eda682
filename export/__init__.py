"""The bridge: a trained student becomes the one file that the daemon serves."""
