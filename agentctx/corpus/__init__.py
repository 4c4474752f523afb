"""Collections that a local model has read once: indexed, searched and answered from."""
