"""Checkpoint folders that say how they must be sampled, and the checks that prove it."""
