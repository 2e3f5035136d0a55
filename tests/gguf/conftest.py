"""The vocabularies that the `llama-cpp-python` sdist carries."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from llmq.gguf.reader import GgufFile

SDIST = "llama-cpp-python==0.3.36"
VOCABULARIES = ("llama-bpe", "llama-spm", "qwen2", "qwen35", "starcoder", "gpt-2")
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="session")
def vocabularies(request):
    """The folder of llama.cpp's vocabulary files, with texts (.inp) and expected ids (.out); fetched once by pip."""
    folder = Path(request.config.cache.mkdir("llama-cpp-vocabularies"))
    wanted = [f"ggml-vocab-{n}.gguf{end}" for n in VOCABULARIES for end in ("", ".inp", ".out")]
    if not all((folder / w).is_file() for w in wanted):
        command = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), SDIST]
        fetched = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
        if fetched.returncode:
            pytest.skip(
                f"pip cannot fetch {SDIST}, whose vocabularies are the reference: {fetched.stderr.strip()[-200:]}"
            )
        (sdist,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(sdist) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in wanted:
                    (folder / name).write_bytes(tar.extractfile(member).read())
        sdist.unlink()
    return folder


@pytest.fixture
def expected(vocabularies):
    """`expected(name)`: the texts of a vocabulary and the ids that llama.cpp's authors expect for each."""
    return lambda name: _expected(vocabularies, name)


@pytest.fixture
def keys():
    """`keys(path)`: the keys of a GGUF file, without those of its container."""
    return _keys


def _expected(folder, name):
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    return [(t, [int(i) for i in line.split()]) for t, line in zip(texts, lines, strict=True)]


def _keys(path):
    file = GgufFile(path)  # test_reader.py shows that it reads as gguf-py does, which takes minutes for these
    names = file.keys()
    values = {k: file.value(k) for k in names}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
