"""Local pruning: makes the candidates of every unit from calibration text. It knows nothing of search."""
