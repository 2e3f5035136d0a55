"""What a checkpoint of any kind is as floats: its tensors one by one, or a folder that transformers loads.

    source = decoded("./my-llama-int4", torch.float32)       .names(), .get(name)
    with as_folder("my-llama.gguf", "bfloat16") as folder:   the file's weights, decoded, until the block ends
        llmq.load(folder)

Not here: how a weight is decoded (checkpoint/decoding.py, _from_gguf.py), a float checkpoint that stays (float.py).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import as_floats
from llmq.checkpoint.place import is_gguf, user_path
from llmq.export._experts import join
from llmq.export._from_gguf import Floats
from llmq.export._run import export
from llmq.progress import Progress


def decoded(name: str, dtype: torch.dtype) -> Source:
    """Return the tensors of a checkpoint, packed ones decoded to `dtype` as they are read; floats as they are stored.

    Raises LlmqError for what llmq does not decode.
    """
    if is_gguf(name):
        return Floats(user_path(name), dtype)
    source = Source(resolve(name))
    if source.quantization is not None:
        source.warnings += [*as_floats(source, dtype), *join(source)]
    return source


@contextmanager
def as_folder(name: str | Path, dtype: str = "bfloat16", progress: Progress | None = None) -> Iterator[str]:
    """Yield what `llmq.load` opens: a GGUF file decoded into a temporary folder (in TMPDIR), anything else as it is.

    dtype: of what is decoded. Raises LlmqError where the file is not decoded, or the disk has no room.
    """
    if not is_gguf(name):
        yield str(name)
        return
    with tempfile.TemporaryDirectory(prefix="llmq-decoded-") as room:
        out = Path(room) / Path(name).stem
        export(str(name), out, f"float:{dtype}", check=False, progress=progress)
        yield str(out)
