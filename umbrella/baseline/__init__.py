"""What the field would use without a language model: a small 3D CNN on the same splits, store, metrics and report."""
