"""Algorithms: solvers (floats to codes) and transforms (floats to floats), one file each."""
