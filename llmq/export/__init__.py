"""A quantized checkpoint in another file format, its codes kept; one file each."""
