"""From conversations to batches: rendering, masking, batching, and the Ray Data pipeline."""
