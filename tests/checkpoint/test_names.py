"""Which tensor counts: what a folder means to llmq is what it means to transformers' from_pretrained, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

import llmq
from llmq.checkpoint import Source
from llmq.model.skeleton import Skeleton
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError

GOLDEN = Path(__file__).parents[1] / "golden"
RTN = {"method": "rtn", "group_size": "32", "bits": 8}
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(12)[None]


def saved(folder: Path, config, **changes) -> Path:
    """Save a random model; `changes` are keys of its config.json that are set afterwards."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    edit(folder, **changes)
    return folder


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def theirs(folder: Path):
    """Return the state dict that transformers makes, None where it fails or would compute another model."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
        )
    except (OSError, KeyError):
        return None
    lost = [n for n in info["unexpected_keys"] if "layers." in n or n.startswith("lm_head")]
    return None if lost or info["missing_keys"] or info["mismatched_keys"] else model.state_dict()


def ours(folder: Path):
    """Return the tensors that a plan reads, by the model's names, None where the folder is refused."""
    try:
        skeleton = Skeleton(Source(folder), torch.float32)
    except LlmqError:
        return None
    source = skeleton.source
    return {n: source.get(n if n in source else EMBEDDING) for n in skeleton.model.state_dict()}


def one_file(folder: Path, tensors) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shards(folder: Path, tensors, index: dict | None = None, junk: bool = False) -> None:
    names = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({n: torch.full_like(tensors[n], 7.0) if junk else tensors[n] for n in part}, folder / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map} if index is None else index)
    )


def stale_index(folder: Path, tensors) -> None:
    shards(folder, tensors, junk=True)
    one_file(folder, tensors)


def index_without_shards(folder: Path, tensors) -> None:
    shards(folder, tensors)
    for file in folder.glob("model-0*"):
        file.unlink()
    one_file(folder, tensors)


def shards_without_index(folder: Path, tensors) -> None:
    shards(folder, tensors)
    (folder / "model.safetensors.index.json").unlink()


def index_without_metadata(folder: Path, tensors) -> None:
    shards(folder, tensors)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))


def named_by_the_config(folder: Path, tensors) -> None:
    save_file({n: torch.zeros_like(t) for n, t in tensors.items()}, folder / "model.safetensors")
    save_file(tensors, folder / "other.safetensors")
    edit(folder, transformers_weights="other.safetensors")


def a_later_shard_wins(folder: Path, tensors) -> None:
    shards(folder, tensors)
    first = folder / "model-00001-of-00002.safetensors"
    old = load_file(folder / "model-00002-of-00002.safetensors")
    save_file(load_file(first) | {n: torch.zeros_like(t) for n, t in old.items()}, first)


FILES = (
    one_file, shards, stale_index, index_without_shards, shards_without_index, index_without_metadata,
    named_by_the_config, a_later_shard_wins,
)  # fmt: skip
HEADS = {  # what the config says, what is stored
    "own": (False, lambda t: t),
    "untied, none": (False, lambda t: without(t, HEAD)),
    "tied, none": (True, lambda t: without(t, HEAD)),
    "tied, equal": (True, lambda t: t | {HEAD: t[EMBEDDING].clone()}),
    "tied, own": (True, lambda t: t),
    "tied, the head alone": (True, lambda t: without(t, EMBEDDING)),
    "tied, nothing": (True, lambda t: without(t, EMBEDDING, HEAD)),
}
EXTRAS = {
    "none": {},
    "another part": {"visual.patch.weight": (4, 4)},
    "an old buffer": {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)},
    "a block": {"model.layers.2.mlp.up_proj.weight": (64, 32)},
    "a bias": {"model.layers.0.mlp.up_proj.bias": (64,)},
    "a bias of the head": {"lm_head.bias": (64,)},
}
DAMAGE = {
    "none": lambda t: t,
    "missing": lambda t: without(t, "model.layers.1.self_attn.k_proj.weight"),
    "no norm": lambda t: without(t, "model.norm.weight"),
    "shape": lambda t: t | {"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 16)},
    "vocabulary": lambda t: t | {EMBEDDING: torch.zeros(65, 32)},
}


def without(tensors, *names):
    return {n: t for n, t in tensors.items() if n not in names}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=16))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.sampled_from(FILES),
    prefix=st.sampled_from(["model.", "", "half"]),
    head=st.sampled_from(sorted(HEADS)),
    extra=st.sampled_from(sorted(EXTRAS)),
    damage=st.sampled_from(["none"] * 6 + sorted(DAMAGE)),
)
def test_a_folder_means_what_it_means_to_transformers(llama, tmp_path_factory, files, prefix, head, extra, damage):
    folder = tmp_path_factory.mktemp("m")
    shutil.copyfile(llama / "config.json", folder / "config.json")
    tied, stored = HEADS[head]
    edit(folder, tie_word_embeddings=tied)
    tensors = DAMAGE[damage](stored(load_file(llama / "model.safetensors")))
    tensors |= {n: torch.ones(shape) for n, shape in EXTRAS[extra].items()}
    if prefix != "model.":
        bare = [n for n in tensors if n.startswith("model.") and (not prefix or ".0." in n)]
        tensors = {n.removeprefix("model.") if n in bare else n: t for n, t in tensors.items()}
    files(folder, tensors)
    want, got = theirs(folder), ours(folder)
    assert (want is None) == (got is None)
    for name, tensor in (want or {}).items():
        assert torch.equal(got[name], tensor), name
    shutil.rmtree(folder)


@pytest.mark.parametrize("head", ["own", "tied, none", "tied, own", "tied, the head alone", "tied, equal"])
def test_what_is_written_is_the_same_model_under_the_models_names(llama, tmp_path, head):
    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    tied, stored = HEADS[head]
    edit(folder, tie_word_embeddings=tied)
    rewrite(folder, lambda t: {n.removeprefix("model."): v for n, v in stored(t).items()})
    quantize(prepare(str(folder), Recipe(**RTN), "cpu"), tmp_path / "o")
    names = set(load_file(tmp_path / "o/model.safetensors"))
    assert all(n.startswith("model.") for n in names - {HEAD}) and EMBEDDING in names
    own = head in ("own", "tied, own")
    assert (HEAD in names) == own
    assert json.loads((tmp_path / "o/config.json").read_text())["tie_word_embeddings"] == (not own)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        got = llmq.load(tmp_path / "o", dtype=torch.float32, device="cpu")(IDS).logits
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_a_renamed_tensor_is_written_under_the_name_that_every_runtime_knows(tmp_path):
    folder = saved(tmp_path / "m", GPTNeoXConfig(**SMALL))
    rewrite(folder, lambda t: {("embed_out.weight" if n == HEAD else n): v for n, v in t.items()})
    plan = prepare(str(folder), Recipe(**RTN), "cpu")
    assert HEAD in plan.source and plan.source.written(HEAD) == "embed_out.weight"
    quantize(plan, tmp_path / "o")
    assert {"embed_out.weight"} == {n for n in load_file(tmp_path / "o/model.safetensors") if "gpt_neox" not in n}
    assert not llmq.load(tmp_path / "o", device="cpu").lm_head.weight.is_meta


@pytest.mark.parametrize("golden", ["gptq_v1_w4g32_sym", "awq_w4g32", "ct_pack_w4g32_sym", "ct_int_w8a8_static"])
def test_a_packed_checkpoint_without_the_prefix_loads_and_exports(golden, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(GOLDEN / golden, tmp_path / name)
    rewrite(tmp_path / "b", lambda t: {n.removeprefix("model."): v for n, v in t.items()})
    with torch.no_grad():
        want, got = (llmq.load(tmp_path / n, dtype=torch.float32, device="cpu")(IDS).logits for n in ("a", "b"))
    assert torch.equal(want, got)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("golden", ["float", "gptq_v1_w4g32_sym"])
def test_a_config_of_more_or_fewer_blocks_is_refused_at_every_door(golden, blocks, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / golden, folder)
    edit(folder, num_hidden_layers=blocks)
    with pytest.raises(LlmqError, match=r"layers\.[12]\.\S+ (is missing|has no place)"):
        llmq.load(folder)
    if golden == "float":
        with pytest.raises(LlmqError, match=r"layers\.[12]\.\S+ (is missing|has no place)"):
            prepare(str(folder), Recipe(**RTN), "cpu")


@pytest.mark.parametrize("spoil", ["missing", "shape"])
def test_the_last_block_is_checked_before_any_work(llama, tmp_path, spoil):
    shutil.copytree(llama, tmp_path / "m")
    rewrite(tmp_path / "m", DAMAGE[spoil])
    with pytest.raises(LlmqError, match=r"model\.layers\.1\.\S+_proj\.weight is (missing|\[64, 16\], but)"):
        prepare(str(tmp_path / "m"), Recipe(**RTN), "cpu")


def test_experts_behind_a_dense_block_are_linears(tmp_path):
    config = Qwen3MoeConfig(
        **SMALL, num_key_value_heads=1, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        mlp_only_layers=[0],
    )  # fmt: skip
    plan = prepare(str(saved(tmp_path / "m", config)), Recipe(**RTN), "cpu")
    mlps = {n.rpartition(".mlp.")[2] for n in plan.linears if ".mlp." in n}
    experts = {f"experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up", "down")}
    assert mlps == {"gate_proj", "up_proj", "down_proj"} | experts


def test_a_tensor_of_no_part_of_the_model_is_warned_of_and_kept(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t | {"value.weight": torch.full((3,), 9, dtype=torch.int64)})
    plan = prepare(str(tmp_path / "m"), Recipe(**RTN), "cpu")
    assert [w for w in plan.warnings if "value.weight" in w]
    quantize(plan, tmp_path / "o")
    assert load_file(tmp_path / "o/model.safetensors")["value.weight"].tolist() == [9, 9, 9]


def test_two_tensors_for_one_place_are_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t | {"norm.weight": torch.zeros(32)})
    with pytest.raises(LlmqError, match=r"model\.norm\.weight and norm\.weight are one and the same"):
        Skeleton(Source(tmp_path / "m"), torch.float32)


WRAPPERS = {
    "gemma3": {"image_token_index": 63},
    "qwen2_5_vl": {"image_token_id": 63, "vision_start_token_id": 62, "vision_end_token_id": 61, "video_token_id": 60},
}


def wrapper(folder, kind):
    """A model that reads images around a small language model, with a head that predicts further tokens."""
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_heads": 2, "patch_size": 8}
    eyes |= {"num_hidden_layers": 1, "depth": 1, "out_hidden_size": 32, "image_size": 16}
    text = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
    if kind == "qwen2_5_vl":
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    ids = WRAPPERS[kind] | {"tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=eyes, **ids)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "awq"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_written_under_its_own_names_all_but_the_blocks_linears_as_they_were(tmp_path, kind, method):
    folder = wrapper(tmp_path / "m", kind)
    record = quantize(prepare(str(folder), Recipe(**RTN | {"format": method, "bits": 4}), "cpu"), tmp_path / "o")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in "mo")
    assert {n.rpartition(".")[0] for n in after} == {n.rpartition(".")[0] for n in before}
    kept = before.keys() & after.keys()
    assert {n for n in before if "vision" in n or "visual" in n} <= kept
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert len(record["linears"]) == 14 and any("vis" in n for n in record["untouched"])
    model = llmq.load(tmp_path / "o", dtype=torch.float32, device="cpu")
    assert type(model).__name__.endswith("ForConditionalGeneration")
    with torch.no_grad():
        got, want = model(input_ids=IDS).logits, llmq.load(folder, dtype=torch.float32)(input_ids=IDS).logits
    assert 0 < (got - want).norm() < 0.5 * want.norm()  # 4 bits of weights that are noise; other ones give 1.4


def test_tensors_that_transformers_never_builds_travel_and_are_named(tmp_path):
    config = AutoConfig.for_model(
        "qwen3_5_text", **SMALL | {"num_key_value_heads": 2, "head_dim": 16}, layer_types=["full_attention"] * 2
    )
    folder = saved(tmp_path / "m", config)
    mtp = {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(32)}
    rewrite(folder, lambda t: t | mtp)
    plan = prepare(str(folder), Recipe(**RTN | {"format": "compressed-tensors"}), "cpu")
    assert not any("mtp" in w for w in plan.warnings)
    record = quantize(plan, tmp_path / "o")
    after = load_file(tmp_path / "o/model.safetensors")
    assert all(torch.equal(after[n], t) for n, t in mtp.items())
    assert record["untouched"] == ["mtp.fc"]
    assert "mtp.fc" in json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]["ignore"]
    llmq.load(tmp_path / "o", device="cpu")
