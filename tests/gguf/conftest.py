"""llama.cpp for the tests: the `xllamacpp` wheel to run files with, the vocabularies of the `llama-cpp-python` sdist."""

import json
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import gguf
import pytest

SDIST = "llama-cpp-python==0.3.36"
VOCABULARIES = ("llama-bpe", "llama-spm", "qwen2", "starcoder", "gpt-2")
SEPARATOR = "\n__ggml_vocab_test__\n"


class LlamaCpp:
    """A GGUF file running in llama.cpp."""

    def __init__(self, path, context=128):
        xllamacpp = pytest.importorskip("xllamacpp", reason="needs the xllamacpp wheel (pip install -e '.[test]')")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(params)

    def tokenize(self, text, special=True):
        return self._post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def generate(self, ids, n):
        answer = self._post("/completion", prompt=ids, n_predict=n, temperature=0, return_tokens=True, ignore_eos=True)
        return answer["tokens"]

    def log_probabilities(self, ids, vocab):
        answer = self._post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=vocab)
        return {p["id"]: p["logprob"] for p in answer["completion_probabilities"][0]["top_logprobs"]}

    def _post(self, path, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)


@pytest.fixture
def llama_cpp():
    """`llama_cpp(path)`: run a GGUF file."""
    return LlamaCpp


@pytest.fixture(scope="session")
def vocabularies(request):
    """The folder of llama.cpp's vocabulary files, with texts (.inp) and expected ids (.out); fetched once by pip."""
    folder = Path(request.config.cache.mkdir("llama-cpp-vocabularies"))
    wanted = [f"ggml-vocab-{n}.gguf{end}" for n in VOCABULARIES for end in ("", ".inp", ".out")]
    if not all((folder / w).is_file() for w in wanted):
        command = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), SDIST]
        fetched = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
        if fetched.returncode:
            pytest.skip(f"pip cannot fetch {SDIST}, whose vocabularies are the reference: {fetched.stderr.strip()[-200:]}")
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
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
