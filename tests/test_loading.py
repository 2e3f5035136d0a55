"""llmq.load against the peers' own readers, and against bad checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import llmq
from llmq.runtime.linear import QuantLinear
from llmq.types import LlmqError

GOLDEN = sorted(p.parent for p in (Path(__file__).parent / "golden").glob("*/logits.safetensors"))


TOLERANCE = {"float": 2e-5, "ct": 2e-5, "ct_int": 0.1, "gptq": 5e-3, "awq": 1e-2}
"""By the start of a golden's name, of logits up to 4.6. GPTQModel rounds to float16; one activation that falls on the
other side of a rounding edge moves int8 logits by up to 0.08. The tests after the first take these allowances away."""


def tolerance(folder: Path) -> float:
    return TOLERANCE[max((k for k in TOLERANCE if folder.name.startswith(k)), key=len)]


def method(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return config and config["quant_method"]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_method_has_a_golden_checkpoint():
    assert {method(p) for p in GOLDEN} == {None, "gptq", "awq", "compressed-tensors"}


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_logits_equal_those_of_the_peers_reader(folder):
    want = load_file(folder / "logits.safetensors")
    model = llmq.load(folder, dtype=torch.float32, device="cpu", backend="reference")
    assert not model.training
    with torch.no_grad():
        got = model(want["input_ids"]).logits
    torch.testing.assert_close(got, want["logits"], rtol=0, atol=tolerance(folder))


class Float16Linear(nn.Module):
    """What GPTQModel 7.7's torch linears compute for a float32 `x`: GPTQ rounds the weight, AWQ everything."""

    def __init__(self, W: torch.Tensor, whole: bool) -> None:
        super().__init__()
        self.W, self.whole = W.half(), whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.half(), self.W).to(x.dtype) if self.whole else F.linear(x, self.W.to(x.dtype))


@pytest.mark.parametrize("folder", [p for p in GOLDEN if method(p) in ("gptq", "awq")], ids=lambda p: p.name)
def test_all_that_is_left_is_the_peers_rounding_to_float16(folder):
    want = load_file(folder / "logits.safetensors")
    model = llmq.load(folder, dtype=torch.float32, device="cpu", backend="reference")
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, Float16Linear(module.dequantize(), whole=method(folder) == "awq"))
    with torch.no_grad():
        got = model(want["input_ids"]).logits
    # a float16 product sums in another order on another CPU: 2e-3 with AMX, 3e-3 with AVX2 alone
    torch.testing.assert_close(got, want["logits"], rtol=0, atol=5e-3 if method(folder) == "awq" else 2e-5)


def test_a_float_checkpoint_is_transformers_own(tiny_checkpoint, tiny_llama):
    folder = tiny_checkpoint(shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, ids = llmq.load(folder), torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits.cpu(), tiny_llama()(ids).logits)


def test_dtype_is_the_checkpoints_unless_given(tiny_checkpoint):
    folder = tiny_checkpoint(dtype=torch.bfloat16)
    assert llmq.load(folder).dtype == torch.bfloat16
    assert llmq.load(folder, dtype=torch.float16).dtype == torch.float16
    assert llmq.load(str(folder), dtype="float32", device="cpu").dtype == torch.float32


def test_the_tokenizer_comes_along(tiny_checkpoint, tokenizer_bos):
    assert llmq.load_tokenizer(tiny_checkpoint())("the war").input_ids == tokenizer_bos("the war").input_ids


def test_mappings_and_log_level_are_as_before():
    from transformers.quantizers import auto
    from transformers.utils import logging

    def state():
        mappings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
        return [list(m.items()) for m in mappings], logging.get_verbosity()

    before = state()
    llmq.load(GOLDEN[0])
    assert state() == before
    with pytest.raises(LlmqError):
        llmq.load(GOLDEN[0] / "nothing")
    assert state() == before


def test_importing_llmq_imports_nothing_heavy():
    out = python("import sys, llmq; print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])")
    assert out == "[]"


def test_importing_llmq_changes_no_mapping():
    out = python(
        "from transformers.quantizers import auto\n"
        "maps = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING\n"
        "before = [list(m.items()) for m in maps]\n"
        "import llmq, llmq.loading, llmq.integrations.transformers\n"
        "print(llmq.load.__module__, before == [list(m.items()) for m in maps])\n"
    )
    assert out == "llmq.loading True"


def test_the_package_says_what_it_exports():
    assert set(llmq.__all__) <= set(dir(llmq))
    assert all(getattr(llmq, name) for name in llmq.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = llmq.nonsense


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_norm(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BAD = {
    "no_config": (no_config, r"no config\.json"),
    "pickle": (pickle_only, r"safetensors|save_pretrained"),
    "truncated": (truncated, r"model\.safetensors.*truncated"),
    "remote_code": (lambda d: edit(d, auto_map={"AutoModel": "modeling_x.X"}), "auto_map"),
    "unknown_method": (lambda d: edit(d, quantization_config={"quant_method": "os.path"}), r"'os\.path'.*gptq, awq"),
    "no_method": (lambda d: edit(d, quantization_config={}), r"quant_method is missing.*gptq, awq"),
    "unknown_model": (lambda d: edit(d, model_type="zork"), "zork"),
    "bad_config": (lambda d: edit(d, hidden_size="wide"), "hidden_size"),
    "missing_tensor": (without_norm, r"tensor model\.norm\.weight is missing"),
    "other_shape": (lambda d: edit(d, vocab_size=96), r"weight is \[320, 64\], but .* asks for \[96, 64\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_gets_one_line(name, tiny_checkpoint, caplog):
    spoil, message = BAD[name]
    folder = tiny_checkpoint()
    spoil(folder)
    with pytest.raises(LlmqError, match=message) as caught:
        llmq.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not caplog.records


@pytest.mark.parametrize("path", ["/no/such/folder", "no-such-folder", __file__])
def test_a_path_that_is_no_folder_is_refused(path):
    with pytest.raises(LlmqError, match="folder"):
        llmq.load(path)


def test_a_hub_id_that_cannot_be_read_is_refused(monkeypatch):
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach\nthe Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(LlmqError, match=r"some/model.*Hub.*cannot reach"):
        llmq.load("some/model")


@pytest.mark.parametrize("device", ["gpu0", "cuda:7"])
def test_an_unusable_device_is_refused(device, tiny_checkpoint):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(LlmqError, match=device):
        llmq.load(tiny_checkpoint(), device=device)


def edited(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_tokenizer(folder):
    for file in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        file.unlink()


TOKENIZERS = {
    "has no tokenizer": without_tokenizer,
    "has no tokenizer (tok": lambda f: (f / "tokenizer.json").unlink(),
    "is no tokenizer of transformers": lambda f: edited(f / "tokenizer_config.json", tokenizer_class="LlamaModel"),
    "tokenizer_class 3": lambda f: edited(f / "tokenizer_config.json", tokenizer_class=3),
    "chat_template is": lambda f: (
        (f / "chat_template.jinja").unlink(), edited(f / "tokenizer_config.json", chat_template=3)
    ),
    "no tokenizer that transformers can load: ": lambda f: (f / "tokenizer.json").write_text("version https://git-lfs"),
    "no tokenizer that transformers can load: Type": lambda f: edited(
        f / "tokenizer_config.json", added_tokens_decoder={"5": 3}
    ),
    "neither a file nor a folder": lambda f: (
        (f / "tokenizer.json").unlink(), (f / "tokenizer.json").symlink_to("away.json")
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", TOKENIZERS)
def test_a_tokenizer_that_is_missing_or_broken_gets_one_line(message, tiny_checkpoint):
    folder = tiny_checkpoint()
    TOKENIZERS[message](folder)
    with pytest.raises(LlmqError, match=f"^{folder}.*{re.escape(message)}") as error:
        llmq.load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "phi"])
def test_no_empty_tokenizer_is_made_where_files_are_missing(model_type, tiny_checkpoint):
    """transformers makes one of many a model_type: text then has no tokens, or unknown ones alone."""
    folder = tiny_checkpoint()
    without_tokenizer(folder)
    edited(folder / "config.json", model_type=model_type)
    with pytest.raises(LlmqError, match="has no tokenizer"):
        llmq.load_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    with pytest.raises(LlmqError, match=r"merges\.txt|no tokenizer"):
        llmq.load_tokenizer(folder)


def test_entries_of_another_machine_do_not_matter(tiny_checkpoint):
    folder, ids = tiny_checkpoint(), None
    gone = "/gone/away"
    for change in (
        {},
        {"tokenizer_file": f"{gone}/tokenizer.json", "vocab_file": f"{gone}/vocab.json", "merges_file": None},
        {"name_or_path": gone, "special_tokens_map_file": f"{gone}/special_tokens_map.json"},
        {"tokenizer_class": "ATokenizerOfTheFuture"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}},
    ):
        edited(folder / "tokenizer_config.json", **change)
        found = llmq.load_tokenizer(folder)("The first city")["input_ids"]
        assert ids in (None, found) and found
        ids = found
