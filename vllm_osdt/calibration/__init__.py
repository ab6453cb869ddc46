"""Calibration: record one request of a task, turn its confidences into thresholds, keep them by task."""
