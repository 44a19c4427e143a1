"""Kernels of fewstep, each beside a plain reference that defines its result. Importing this package loads none."""
