"""Pure functions of tensors: paths, clocks, guidance, solvers, losses, divergences."""
