"""What a process writes, seen by Python's own audit events, so that a fuzzer knows what went outside its folder."""

import os
import sys
from pathlib import Path
from typing import Any


class Watch:
    """Sees every file that this process opens for writing, makes, moves or removes, by Python's audit events."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        writes = event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate")
        if event == "open":
            mode, flags = args[1], args[2]
            writes = bool(mode and set(mode) & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(args[0], str | bytes | os.PathLike):
            path = _where(os.fsdecode(args[0]), args[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1)
            compiled = "/__pycache__" in path or "/torchinductor_" in path  # where compilers keep what they made
            if not compiled and not path.startswith((*self.allowed, "/dev/", "/proc/")):
                self.seen.append(f"{event} {path}")


def _where(path: str, folder: int) -> str:
    """Return an absolute path; folder: the open folder that a relative one starts from, -1 for the current one."""
    base = Path.cwd() if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink()
    return str(base / path)
