"""From a float checkpoint to a packed one: the plan (plan.py), the run (run.py), one block (block.py), the report."""
