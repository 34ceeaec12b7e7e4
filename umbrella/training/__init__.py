"""Training: loss, optimizer, step, checkpoints, and the Ray Train worker loop."""
