"""How well a model predicts: a text cut into windows (windows.py), perplexity and divergence on them (scores.py)."""
