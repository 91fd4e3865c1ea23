"""Calibration from out-of-fold predictions: slopes, temperatures, intervals, abstention, reports."""
