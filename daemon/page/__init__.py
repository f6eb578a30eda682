"""The page beside the console: what the technologist sees, and the physicist's view of the same results."""
