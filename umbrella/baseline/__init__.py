"""The baseline: a small 3D CNN trained on the same splits, volume store, metrics and report as the language model."""
