"""Packages that come with an extra of llmq-quant: asked for where used, missing with the command that helps."""

from collections.abc import Sequence
from importlib.util import find_spec

from llmq.errors import LlmqError


def require(packages: Sequence[str], extra: str, what: str) -> None:
    """Raise LlmqError for the first of these packages that is not there. what: what needs it, "--to onnx is written".

    packages: as they are imported. Nothing is imported here.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise LlmqError(
            f"{what} by the package {missing[0]}, which is not installed: pip install 'llmq-quant[{extra}]'"
        )
