"""What a user gave to a command: the file of --json, and what is scored; what of it would count for nothing is refused.

Not here: the options themselves, nor what a library refuses (recipe.py, evaluation/).
"""

from pathlib import Path

from llmq.checkpoint.place import check_file, user_path
from llmq.errors import LlmqError


def place_of_json(file: Path | None, *, overwrite: bool, replaces: bool = False) -> Path | None:
    """Return where --json writes, None without it.

    replaces: whether --overwrite has something else to replace.
    Raises LlmqError where that place cannot be written, and for --overwrite with nothing to replace.
    """
    if file is None:
        if overwrite and not replaces:
            raise LlmqError("--overwrite replaces a file that is asked for; give --json FILE, or leave it out")
        return None
    place = user_path(file)
    check_file(place, "--json", b"{", overwrite=overwrite)
    return place


def scored(text: Path | None, dataset: str | None, convention: str | None) -> dict[str, str]:
    """Return the dataset and the convention that are scored, where these are left open those of `evaluate_all`.

    Raises LlmqError for a text and a dataset at once.
    """
    if text is not None and dataset is not None:
        raise LlmqError(f"--text {text} is scored in place of a dataset; leave out --dataset {dataset}, or --text")
    return {
        "dataset": "wikitext2" if dataset is None else dataset,
        "convention": "gptq" if convention is None else convention,
    }
