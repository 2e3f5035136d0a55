"""Which folder a name means, and what a folder is called: Hub ids at a revision, and the Hub's own cache."""

import os

import huggingface_hub
import pytest

from llmq.checkpoint import hub
from llmq.checkpoint.hub import Origin, origin, resolve
from llmq.types import LlmqError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path):
    folder = tmp_path / "hub/models--org--Tiny-Llama/snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def test_a_folder_of_the_cache_is_called_by_its_repository(snapshot, tmp_path, monkeypatch):
    want = Origin("org/Tiny-Llama", COMMIT)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    (snapshot / "sub").mkdir()
    for spelling in (f"{snapshot}", f"{snapshot}/", f"{snapshot}/.", f"{link}", f"{link}/", f"{snapshot}/sub/.."):
        assert origin(resolve(spelling)) == want
    monkeypatch.chdir(snapshot)
    assert origin(resolve(".")) == want == origin(resolve("./"))
    monkeypatch.chdir(snapshot / "sub")
    assert origin(resolve("..")) == want == origin(resolve("."))
    bare = tmp_path / f"models--gpt2/snapshots/{COMMIT}"
    bare.mkdir(parents=True)
    assert origin(bare) == Origin("gpt2", COMMIT)


def test_another_folder_is_called_by_its_own_name(tmp_path, monkeypatch):
    for name in ("plain", "a@b", "snapshots", COMMIT, "models--org--name"):
        folder = tmp_path / name
        folder.mkdir()
        assert resolve(str(folder)) == folder and origin(folder) == Origin(name) == origin(folder / ".")
    (tmp_path / "alias").symlink_to(tmp_path / "plain")
    assert origin(tmp_path / "alias") == Origin("alias")
    monkeypatch.chdir(tmp_path / "plain")
    assert origin(resolve(".")) == Origin("plain")
    assert origin(resolve("../a@b/")) == Origin("a@b")
    odd = tmp_path / os.fsdecode(b"odd\xff\n---\nname")
    odd.mkdir()
    assert origin(odd).name.isprintable()


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        (f"org/name@{COMMIT}", "org/name", COMMIT),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("org/name@v1@2", "org/name", "v1@2"),
    ],
)
def test_a_revision_is_asked_of_the_hub(name, repository, revision, snapshot, monkeypatch, tmp_path):
    asked = []

    def download(repo, *, revision, allow_patterns):
        assert {"*.json", "*.safetensors", "additional_chat_templates/*.jinja"} <= set(allow_patterns)
        asked.append((repo, revision))
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(name) == snapshot and asked == [(repository, revision)]


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "org/name@main").mkdir(parents=True)
    assert resolve("org/name@main").samefile(tmp_path / "org/name@main")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/name@", "names no revision; write org/name, or"),
        ("org", "is not a folder"),
        ("a/b/c", "is not a folder"),
        ("a/b/c@d", "is not a folder"),
        ("./org@x", "is not a folder"),
        ("@main", "is not a folder"),
        ("org/na me@x", "is not a folder"),
        ("org/na\nme", "is not a folder"),
        ("x" * 5000, "cannot open x"),
        ("~nobody-of-that-name/x", "cannot open ~"),
        ("org/\0", "is not a folder"),
        ("", "is not a folder"),
        (__file__, "is a file"),
    ],
)
def test_names_that_mean_nothing_are_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LlmqError, match=message) as error:
        resolve(name)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_repository():
    assert hub.is_repository("org/na-me_1.5") and not any(
        hub.is_repository(n) for n in ("name", "a/b/c", "../a", "a/b\n", "a/b: c", None, 3, "a b/c")
    )
