"""Families: which linears of a block read one activation, one file per model_type."""
