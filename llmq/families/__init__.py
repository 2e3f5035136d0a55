"""Families: what is to be changed of the sites that were found in a block, one file per model_type that needs it."""
