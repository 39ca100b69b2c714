"""A float model in few bits without training: fits of codes and scales, and compensation on calibration text."""
