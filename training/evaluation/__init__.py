"""The paper's experiments and harder ones: scans made once, networks run over them, numbers with intervals, one report."""
