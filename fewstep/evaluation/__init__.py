"""Scores of generated samples, each with the protocol it was measured under."""
