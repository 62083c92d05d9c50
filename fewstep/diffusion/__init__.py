"""Diffusion as mathematics: processes, parameterisations, grids, solvers, guidance, likelihoods. No networks."""
