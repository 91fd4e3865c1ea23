"""Calibration from out-of-fold predictions: slopes, temperatures, intervals, abstention, suspect labels."""
