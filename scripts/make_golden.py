"""Make the golden checkpoints of tests/golden: one tiny float model, quantized by the peers and read back by them.

The peers exclude each other's dependencies, so each subcommand runs in an environment of its own;
tests/golden/README.md gives the environments, their versions and the commands. Weights, calibration ids and input ids
are seeded. A checkpoint folder keeps the peer's config files and weights as the peer wrote them; `read` adds
`logits.safetensors` with `input_ids` int64 [1, 16] and the `logits` float32 [1, 16, 128] that the peer computes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VOCAB = 128
KEPT = ("config.json", "quantize_config.json", "model.safetensors")

# name: arguments of gptqmodel.QuantizeConfig
GPTQMODEL = {
    "gptq_v1_w4g32_sym": {"bits": 4, "group_size": 32},
    "gptq_v1_w8g32_sym": {"bits": 8, "group_size": 32},
    "gptq_v1_w4_perchannel": {"bits": 4, "group_size": -1, "act_group_aware": False},
    "gptq_v1_w4g32_desc_act": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq_v1_w3g32": {"bits": 3, "group_size": 32},
    "gptq_v1_w2g32": {"bits": 2, "group_size": 32},
    "gptq_v1_w4g32_asym": {"bits": 4, "group_size": 32, "sym": False},
    "gptq_v2_w4g32_sym": {"bits": 4, "group_size": 32, "format": "gptq_v2"},
    "gptq_v2_w4g32_asym": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "awq_gptqmodel_w4g32": {"bits": 4, "group_size": 32, "sym": False, "quant_method": "awq", "format": "gemm"},
}
# name: group size
AUTOAWQ = {"awq_w4g32": 32, "awq_w4g64": 64}

INT4_GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT8_TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
# name: config_groups of llmcompressor's QuantizationModifier
LLMCOMPRESSOR = {
    "ct_pack_w4g32_sym": {"group_0": {"targets": ["Linear"], "weights": INT4_GROUP}},
    "ct_pack_w4g32_asym": {"group_0": {"targets": ["Linear"], "weights": INT4_GROUP | {"symmetric": False}}},
    "ct_pack_w8_channel_sym": {"group_0": {"targets": ["Linear"], "weights": INT8_CHANNEL}},
    "ct_pack_w3g32": {"group_0": {"targets": ["Linear"], "weights": INT4_GROUP | {"num_bits": 3}}},
    "ct_int_w8a8_dynamic": {
        "group_0": {"targets": ["Linear"], "weights": INT8_CHANNEL, "input_activations": INT8_TOKEN},
    },
    "ct_int_w8a8_static": {
        "group_0": {"targets": ["Linear"], "weights": INT8_CHANNEL, "input_activations": INT8_TENSOR},
    },
    "ct_mixed": {
        "group_0": {"targets": ["re:.*(q|k|v|o|gate|up)_proj$"], "weights": INT4_GROUP},
        "group_1": {"targets": ["re:.*down_proj$"], "weights": INT8_CHANNEL},
    },
}
# name: arguments of auto_round.AutoRound
AUTOROUND = {"auto_round_w4g32_sym": {"sym": True}, "auto_round_w4g32_asym": {"sym": False}}
WRITERS = {"gptqmodel": GPTQMODEL, "autoawq": AUTOAWQ, "llmcompressor": LLMCOMPRESSOR, "autoround": AUTOROUND}


def make_float(root: Path) -> None:
    """Write a random two-layer Llama in bfloat16 and, since GPTQModel loads no folder without one, a tokenizer.

    Rows differ in mean and columns (by the norms before them) in scale, so that zero points and act-order matter. The
    tokenizer has one token per ASCII character.
    """
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # k_proj and v_proj then have 64 rows: AWQ's clip search takes multiples of 64 only
        vocab_size=VOCAB,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(torch.exp(0.4 * noise))
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                offset = 0.3 * torch.randn(parameter.shape[0], 1, generator=generator)
                parameter.copy_((noise + offset) / math.sqrt(parameter.shape[1]))
    out = root / "float"
    model.bfloat16().save_pretrained(out)
    vocabulary = ["<unk>", "<s>", "</s>"] + [chr(code) for code in range(3, VOCAB)]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token=vocabulary[0]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(out)
    (out / "generation_config.json").unlink()


def calibration_ids() -> list[list[int]]:
    """Return 16 rows of 64 seeded token ids."""
    return torch.randint(0, VOCAB, (16, 64), generator=torch.Generator().manual_seed(3)).tolist()


def write_gptqmodel(source: Path, out: Path, settings: dict) -> None:
    """Quantize with GPTQModel."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it GPTQModel 7.7.0 does not start on two cores
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration_ids()]
    # with offloading, the name of a temporary folder would end up in the config
    model = GPTQModel.load(str(source), QuantizeConfig(offload_to_disk=False, **settings))
    model.quantize(rows, batch_size=4)
    model.save(str(out))


def write_autoawq(source: Path, out: Path, group_size: int) -> None:
    """Quantize with AutoAWQ."""
    from awq import AutoAWQForCausalLM

    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu")
    settings = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    model.quantize(None, settings, calib_data=calibration_ids(), max_calib_samples=16, max_calib_seq_len=64)
    model.save_quantized(str(out))


def write_llmcompressor(source: Path, out: Path, config_groups: dict) -> None:
    """Quantize with llmcompressor: round to nearest between minimum and maximum."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = calibration_ids()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(source),
        recipe=QuantizationModifier(config_groups=config_groups, ignore=["lm_head"]),
        dataset=dataset,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)


def write_autoround(source: Path, out: Path, settings: dict) -> None:
    """Quantize with auto-round in its own format: round to nearest, without calibration."""
    from auto_round import AutoRound

    # it takes every .safetensors file beside the weights for one of their shards
    alone = shutil.copytree(source, out.parent / "float", ignore=shutil.ignore_patterns("logits.safetensors"))
    quantizer = AutoRound(str(alone), bits=4, group_size=32, iters=0, disable_opt_rtn=True, **settings)
    quantizer.quantize_and_save(str(out), format="auto_round")


def write(writer: str, root: Path, names: list[str]) -> None:
    """Quantize ROOT/float once per name and keep only the config files and the weights."""
    function: Callable = globals()[f"write_{writer}"]
    for name in names or WRITERS[writer]:
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # GPTQModel leaves logs/ behind
            written = Path(scratch) / name
            function(root / "float", written, WRITERS[writer][name])
            (root / name).mkdir(exist_ok=True)
            for file in KEPT:
                if (written / file).exists():
                    shutil.copyfile(written / file, root / name / file)
        print(f"wrote {name}", flush=True)


def load_stock(folder: Path) -> torch.nn.Module:
    """Load with stock transformers in float32; GPTQ and AWQ with GPTQModel's kernel that works on every CPU."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    options = {}
    if config.get("quant_method") == "gptq":
        options["quantization_config"] = GPTQConfig(bits=config["bits"], backend="gptq_torch")
    elif config.get("quant_method") == "awq":
        options["quantization_config"] = AwqConfig(backend="torch_awq")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)


def load_packed_asymmetric(folder: Path) -> torch.nn.Module:
    """Load with compressed-tensors' own decompressor in float32.

    Stock transformers takes packed zero points only with `dequantize=True`, which rounds weights to the scales' dtype.
    """
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text())
    scheme = QuantizationScheme(**config.pop("quantization_config")["config_groups"]["group_0"])
    state: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, parameter = name.rpartition(".")
        if parameter in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
            modules.setdefault(module, {})[parameter] = tensor.float() if parameter == "weight_scale" else tensor
        else:
            state[name] = tensor.float()
    for module, tensors in modules.items():
        state[f"{module}.weight"] = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    model.load_state_dict(state)
    return model


def read(root: Path, names: list[str]) -> None:
    """Store the logits that this environment's reader computes in float32."""
    input_ids = torch.randint(0, VOCAB, (1, 16), generator=torch.Generator().manual_seed(5))
    for name in names:
        load = load_packed_asymmetric if name == "ct_pack_w4g32_asym" else load_stock
        with torch.no_grad():
            logits = load(root / name).eval()(input_ids).logits
        if logits.dtype != torch.float32 or not logits.isfinite().all():
            raise SystemExit(f"{name}: logits are not finite float32")
        save_file({"input_ids": input_ids, "logits": logits.contiguous()}, root / name / "logits.safetensors")
        print(f"read {name}", flush=True)


def main() -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("float", help="write ROOT/float").add_argument("root", type=Path)
    for writer, entries in WRITERS.items():
        command = commands.add_parser(writer, help="write " + ", ".join(entries))
        command.add_argument("root", type=Path)
        command.add_argument("names", nargs="*", help="all of them by default")
    reader = commands.add_parser("read", help="store logits.safetensors in ROOT/NAME")
    reader.add_argument("root", type=Path)
    reader.add_argument("names", nargs="+")
    args = parser.parse_args()
    root = args.root.resolve()
    if args.command == "float":
        make_float(root)
    elif args.command == "read":
        read(root, args.names)
    else:
        write(args.command, root, args.names)


if __name__ == "__main__":
    main()
