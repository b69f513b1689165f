"""From calibration activations to candidates. Knows nothing of search."""
