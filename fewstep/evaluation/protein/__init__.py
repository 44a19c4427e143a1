"""Scores of protein backbones given by their CA atoms."""
