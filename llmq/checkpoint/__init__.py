"""Checkpoints on disk: read tensor by tensor (source.py); written part by part, moved into place whole (sink.py)."""

from llmq.checkpoint.sink import Sink as Sink
from llmq.checkpoint.source import Source as Source
from llmq.checkpoint.source import read_config as read_config
from llmq.checkpoint.source import resolve as resolve
