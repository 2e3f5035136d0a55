"""Grids: the values a weight may take, one file each."""
