"""The commands of `llmq`, a file for those of one kind; cli.py runs them."""
