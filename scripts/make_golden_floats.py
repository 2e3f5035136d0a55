"""Make the golden checkpoints of small floats in tests/golden: the float model there, by compressed-tensors itself.

    python scripts/make_golden_floats.py tests/golden [NAME ...]

The library's own functions do all that changes a byte: `calculate_qparams` and `generate_gparam` on the minimum and
maximum of the weights, in the dtype of the model, and its compressors. What runtimes fuse gets one global scale, as
llm-compressor does it. Inputs are fixed by the largest magnitude of calibration. Beside the files of the library lies
`logits.safetensors`, what a Llama of the decoded weights computes with the library's forward in float32.
tests/golden/README.md gives the environment and its versions.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from make_golden import KEPT, VOCAB, calibration_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

ALL = ["Linear"]
MLP, ATTENTION = [r"re:.*(gate|up|down)_proj$"], [r"re:.*(q|k|v|o)_proj$"]
BLOCK = [32, 64]  # neither dimension of the float model is a multiple of the preset's 128
SCHEMES = {  # name: the library's presets and what each is for
    "ct_fp8_static": {"FP8": ALL},
    "ct_fp8_dynamic": {"FP8_DYNAMIC": ALL},
    "ct_fp8_block": {"FP8_BLOCK": ALL},
    "ct_nvfp4": {"NVFP4": ALL},
    "ct_mxfp4": {"MXFP4": ALL},
    "ct_mxfp8a16": {"MXFP8A16": ALL},
    "ct_mixed_floats": {"NVFP4A16": MLP, "FP8_DYNAMIC": ATTENTION},
}
FUSED = re.compile(r"(?P<of>.*)\.(?:(?P<qkv>[qkv]_proj)|(?P<gated>(gate|up)_proj))$")


def scheme(preset: str, targets: list[str]) -> Any:
    """Return a preset of the library, its blocks made small."""
    found = preset_name_to_scheme(preset, targets)
    if found.weights.block_structure:
        found.weights = found.weights.model_copy(update={"block_structure": BLOCK})
        found.input_activations = found.input_activations.model_copy(update={"group_size": BLOCK[1]})
    return found


def largest_inputs(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return the largest magnitude of every linear's input over the calibration."""
    found = dict.fromkeys(linears, torch.zeros(()))

    def see(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = torch.maximum(found[name], inputs[0].abs().max().float())

        return hook

    hooks = [module.register_forward_pre_hook(see(name)) for name, module in linears.items()]
    with torch.no_grad():
        model(torch.tensor(calibration_ids()))
    for hook in hooks:
        hook.remove()
    return found


def grouped(W: Tensor, args: QuantizationArgs) -> tuple[Tensor, Any]:
    """Return a weight with what shares a scale along some dimensions, and those."""
    if args.strategy == "block":
        n, k = args.block_structure
        return W.unflatten(1, (-1, k)).unflatten(0, (-1, n)), (1, 3)
    if args.strategy in ("group", "tensor_group"):
        return W.unflatten(-1, (-1, args.group_size)), -1
    return (W.reshape(1, -1), -1) if args.strategy == "tensor" else (W[:, None], -1)


def place(linears: dict[str, nn.Module], largest: dict[str, Tensor]) -> None:
    """Give every linear the scales of its weight and of its input."""
    together: dict[str, list[str]] = {}
    for name in linears:
        found = FUSED.match(name)
        part = found and ("qkv" if found["qkv"] else "gated")
        together.setdefault(f"{found['of']} {part}" if found else name, []).append(name)
    for names in together.values():
        weights = torch.cat([linears[n].weight.data.flatten() for n in names]).float()
        for name in names:
            module = linears[name]
            args, inputs = module.quantization_scheme.weights, module.quantization_scheme.input_activations
            whole = None
            if args.strategy == "tensor_group":
                whole = generate_gparam(weights.min(), weights.max())
                module.weight_global_scale.data = whole
            values, dims = grouped(module.weight.data, args)
            low, high = values.amin(dims), values.amax(dims)
            scale = calculate_qparams(low, high, args, global_scale=whole)[0]
            module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
            top = largest[name]
            if hasattr(module, "input_scale"):
                module.input_scale.data = calculate_qparams(-top[None], top[None], inputs)[0].to(module.weight.dtype)
            if hasattr(module, "input_global_scale"):
                module.input_global_scale.data = generate_gparam(-top, top)
            module.quantization_status = QuantizationStatus.FROZEN


def write(root: Path, name: str) -> None:
    """Quantize ROOT/float and keep the config and the weights in ROOT/NAME."""
    model = AutoModelForCausalLM.from_pretrained(root / "float", dtype=torch.bfloat16)
    groups = {f"group_{i}": scheme(*chosen) for i, chosen in enumerate(SCHEMES[name].items())}
    targets = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    largest = largest_inputs(model, targets)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    place(targets, largest)
    with tempfile.TemporaryDirectory() as scratch:
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(scratch)
        compressor.update_config(scratch)
        (root / name).mkdir(exist_ok=True)
        for file in KEPT:
            if (Path(scratch) / file).exists():
                shutil.copyfile(Path(scratch) / file, root / name / file)
    read(root / name)


def decoded(module: nn.Module, stored: dict[str, Tensor]) -> Tensor:
    """Return a weight in float32 by the library's `dequantize`; its compressors round to bfloat16."""
    codes, scale, args = stored.get("weight"), stored["weight_scale"], module.quantization_scheme.weights
    if codes is None:
        packed = stored["weight_packed"]
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    scale = decompress_mx_scale(scale).float() if scale.dtype == torch.uint8 else scale.float()
    whole = stored.get("weight_global_scale")
    return dequantize(codes.float(), scale, args=args, dtype=torch.float32, global_scale=whole)


def read(folder: Path) -> None:
    """Store the logits that the library computes in float32, with inputs rounded as the config says.

    transformers itself would run FP4 in bfloat16 alone.
    """
    config = AutoConfig.from_pretrained(folder)
    said = config.quantization_config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float().eval()
    keys = ("config_groups", "ignore", "format", "quantization_status")
    apply_quantization_config(model, QuantizationConfig(**{key: said[key] for key in keys}))
    stored = load_file(folder / "model.safetensors")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, local = name.rpartition(".")
        modules.setdefault(module, {})[local] = tensor
    for name, tensors in modules.items():
        module = model.get_submodule(name)
        quantized = "weight_scale" in tensors
        module.weight = nn.Parameter(decoded(module, tensors) if quantized else tensors["weight"].float())
        for local in tensors.keys() & {"input_scale", "input_global_scale"}:
            setattr(module, local, nn.Parameter(tensors[local].float()))
        if quantized:
            module.quantization_status = QuantizationStatus.COMPRESSED
    input_ids = torch.randint(0, VOCAB, (1, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(input_ids).logits
    if logits.dtype != torch.float32 or not logits.isfinite().all():
        raise SystemExit(f"{folder}: logits are not finite float32")
    save_file({"input_ids": input_ids, "logits": logits.contiguous()}, folder / "logits.safetensors")
    print(f"wrote {folder.name}", flush=True)


def main() -> None:
    """Make those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *SCHEMES], help="all of them by default")
    args = parser.parse_args()
    for name in args.names or SCHEMES:
        write(args.root.resolve(), name)


if __name__ == "__main__":
    main()
