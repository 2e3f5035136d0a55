"""`python -m llmq`: the command line."""

from llmq.cli import main

if __name__ == "__main__":
    main()
