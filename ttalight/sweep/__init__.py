"""Grids of adaptations (``ttalight sweep``): the file, the runs, the choice of hyper-parameters."""
