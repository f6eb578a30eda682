"""Makes the networks: anatomy, artefacts, the cascade, its evaluation and calibration. Needs torch."""
