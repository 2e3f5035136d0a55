"""Checkpoints on disk: found (hub.py), read tensor by tensor (source.py), written part by part (sink.py)."""

from llmq.checkpoint.hub import resolve as resolve
from llmq.checkpoint.journal import Journal as Journal
from llmq.checkpoint.sink import Sink as Sink
from llmq.checkpoint.source import Source as Source
from llmq.checkpoint.source import read_config as read_config
