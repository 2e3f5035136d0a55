"""Ranges: which interval a grid covers, one file each."""
