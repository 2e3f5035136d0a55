"""`llmq push` against a Hub of our own on 127.0.0.1: what arrives is what lies here, or one line says why not."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants

import llmq
from llmq import cli
from llmq.sharing.parcel import _spoken_paths, parcel
from llmq.sharing.upload import check_repository

TOKEN = "hf_s3cretTOKEN"  # noqa: S105
LARGE = (".safetensors", ".gguf")
SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat]\nbase_model: not/this\n---\n# The source\n"


class Hub(ThreadingHTTPServer):
    """It keeps what it is sent. answers: a status for a path that begins so, in place of what it would do."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.branches, self.large, self.committed, self.paths = {}, [], {}, {}, []
        self.answers = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        self.handle_any(b"")

    def do_POST(self):
        self.handle_any(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    do_PUT = do_POST  # noqa: N815

    def handle_any(self, body):
        hub, path = self.server, self.path
        hub.paths.append(path)
        status = next((s for start, s in hub.answers.items() if path.startswith(start)), None)
        if status == "break":
            self.connection.close()
        elif status is not None:
            self.say(status, {"error": f"no, see {hub.url}/x?signature=SIGNED"})
        elif path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = body
            self.say(200, {})
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.say(401, {"error": "Invalid credentials"})
        else:
            self.say(*self.api(path, body))

    def api(self, path, body):  # noqa: PLR0911
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            found = name in hub.repositories
            hub.repositories.setdefault(name, asked.get("visibility") == "private")
            return (409 if found else 200), {"url": f"{hub.url}/{name}"}
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return 200, {"warnings": [], "errors": []}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [
                o | {"actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in objects
            ]}  # fmt: skip
        name = "/".join(path.split("/")[3:5])
        verb = path.split("/")[5] if path.count("/") > 4 else ""
        if verb == "branch":
            hub.branches.append(path.split("/")[6])
            return 200, {}
        if verb == "preupload":
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            return 200, {"files": [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(LARGE)], "shouldIgnore": False} for f in files
            ]}  # fmt: skip
        if verb == "commit":
            self.keep(path.split("/")[6], [json.loads(line) for line in body.splitlines()])
            return 200, {"success": True, "commitOid": "c0ffee", "commitUrl": f"{hub.url}/{name}/commit/c0ffee"}
        return 200, {"id": name, "private": hub.repositories[name], "sha": "c0ffee"}

    def keep(self, branch, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.committed[branch, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.committed[branch, value["path"]] = self.server.large[value["oid"]]

    def say(self, status, values):
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder and a GGUF file of one model whose card has a licence."""
    from _tiny import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    where = tmp_path_factory.mktemp("made")
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(where / "src")
    make_tokenizer(bos=True).save_pretrained(where / "src")
    (where / "src/README.md").write_text(SOURCE_CARD)
    llmq.quantize(where / "src", where / "int4", group_size=32, method="rtn", warn=lambda _: None)
    llmq.quantize(where / "src", where / "m.gguf", type="Q8_0", method="rtn", warn=lambda _: None)
    return where


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made / "int4", tmp_path / "int4")


def content(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def push(out, **options):
    cli.push(str(out), "me/int4", **({"private": False, "branch": None, "yes": True} | options))


def test_what_arrives_is_what_lies_here(out, hub, capsys):
    before = content(out)
    push(out, private=True)
    arrived = {name: data for (branch, name), data in hub.committed.items() if branch == "main"}
    assert arrived == before == content(out)
    assert hub.repositories == {"me/int4": True} and not hub.branches
    assert hub.large.keys() == {hashlib.sha256(before["model.safetensors"]).hexdigest()}
    printed = capsys.readouterr()
    assert "/commit/c0ffee" in printed.out and TOKEN not in printed.out + printed.err
    about = ModelCard(arrived["README.md"].decode()).data
    assert about.license == "apache-2.0" and about.language == ["en"] and "chat" in about.tags


def test_a_dry_run_sends_nothing_and_shows_everything(out, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (out / "evaluation.json").write_text("{}")
    (out / "timings.json").write_text("{}")
    push(out, yes=False, branch="v2")
    assert not hub.paths
    printed = capsys.readouterr().out
    for name, data in content(out).items():
        assert (f"{len(data):,} bytes" in printed) or name == "timings.json"
    assert "license: apache-2.0" in printed and "vllm serve MODEL" in printed and "nothing was sent" in printed
    assert "branch v2" in printed and "not sent: timings.json" in printed


def test_a_branch_is_made(out, hub):
    push(out, branch="v2")
    assert hub.branches == ["v2"] and {branch for branch, _ in hub.committed} == {"v2"}


def test_a_gguf_file_goes_with_a_card_of_its_keys(made, hub):
    cli.push(str(made / "m.gguf"), "me/gguf", private=False, branch=None, yes=True)
    arrived = {name: data for (_, name), data in hub.committed.items()}
    assert arrived.keys() == {"m.gguf", "README.md"} and arrived["m.gguf"] == (made / "m.gguf").read_bytes()
    card = ModelCard(arrived["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert card.data.tags == ["gguf", "llmq", "chat"] and card.data.get("base_model") is None
    assert "llama-cli -m m.gguf" in card.text and "8.5 bits" in card.text and "OUT.gguf --recipe" in card.text
    assert str(made) not in card.text


def test_paths_of_this_machine_are_told_before_others_read_them(made, tmp_path, hub, capsys, prose):
    (tmp_path / "my").mkdir()
    (tmp_path / "my/text.txt").write_text(prose(600))
    calib = {"samples": 2, "seq_len": 32, "calib": tmp_path / "my/text.txt"}
    llmq.quantize(made / "src", tmp_path / "out", group_size=32, quality="fast", warn=lambda _: None, **calib)
    push(tmp_path / "out", yes=False)
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"recipe.yaml says {tmp_path}/my/text.txt" in printed and "quantization.json says" in printed
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


def test_scales_in_base64_are_no_paths(tmp_path):
    scales = base64.b64encode(bytes.fromhex("fbf000") * 40).decode()
    assert "+/AA+/AA" in scales  # which reads as path after path
    fold = {"step": "awq", "block": 0, "scale": scales, "producer": "/home/me/model"}
    (tmp_path / "quantization.json").write_text(json.dumps({"transforms": [fold]}))
    assert list(_spoken_paths(tmp_path)) == ["quantization.json says /home/me/model, for everyone to read"]


def refused(out, match, **options):
    before = content(out) if out.is_dir() else None
    with pytest.raises(llmq.LlmqError, match=match) as e:
        push(out, **options)
    assert TOKEN not in str(e.value) and "SIGNED" not in str(e.value) and "\n" not in str(e.value)
    assert before is None or before == content(out)


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/repos/create", 401, "does not accept the token .401.; log in by `hf auth login`"),
        ("/api/repos/create", 403, "the token may not write to me/int4"),
        ("/api/models/me/int4/preupload", 403, "the token may not write to me/int4"),
        ("/api/models/me/int4/preupload", 404, "no me/int4 that this token may see"),
        ("/large/", 403, "the token may not write"),
        ("/api/models/me/int4/commit", 412, "the Hub refuses it .412"),
        ("/api/models/me/int4/commit", "break", "the connection to the Hub broke off"),
    ],
)
def test_what_the_hub_refuses_is_one_line(out, hub, path, status, said):
    hub.answers[path] = status
    refused(out, said)
    assert not hub.committed


def test_without_a_token_or_a_connection(out, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(out, "the connection to the Hub broke off")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused(out, "there is no token of the Hub; log in by `hf auth login`, or set HF_TOKEN")


def test_a_public_repository_does_not_become_private(out, hub):
    hub.repositories["me/int4"] = False
    refused(out, "is there already and public", private=True)
    assert not hub.committed


def test_what_is_not_finished_or_was_changed_is_not_sent(out, made, hub, tmp_path):
    refused(made / "src", "is no finished checkpoint of llmq .it has no quantization.json.")
    refused(tmp_path / "nothing", "is no folder or .gguf file")
    (out / "config.json").write_text("{}")
    refused(out, "config.json is not as written: its checksum differs")
    (out / "config.json").unlink()
    refused(out, "config.json is missing")
    shutil.copyfile(made / "m.gguf", tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", "m.gguf is not as it was written")
    assert not hub.paths


def test_a_file_that_came_or_leads_out_is_not_sent(out, hub, tmp_path):
    (out / "notes.txt").write_text("mine")
    refused(out, "notes.txt is not among the files that were written")
    (out / "notes.txt").unlink()
    (tmp_path / "secret").write_text("x")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused(out, "is a link to")
    assert not hub.paths


@pytest.mark.parametrize("name", ["int4", "a/b/c", "../up", "me/a--b", "me/" + "x" * 100, "me/x.git"])
def test_a_name_that_no_repository_has(name):
    with pytest.raises(llmq.LlmqError):
        check_repository(name)


def test_exported_and_decoded_folders_go_too(made, tmp_path):
    llmq.dequantize(made / "int4", tmp_path / "float", warn=lambda _: None)
    found = parcel(str(tmp_path / "float"))
    assert {"dequantization.json", "README.md", "model.safetensors"} <= found.files.keys()
    assert ModelCard(found.card).data.license == "apache-2.0"
