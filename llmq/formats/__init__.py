"""Formats: bits on disk, one file per quant_method."""
