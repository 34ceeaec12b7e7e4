"""The model: volume embedder, vision tower, projector and language model."""
