"""What a report shows: one file for each plot or table, found by its name; the base of all is _plot.py."""
