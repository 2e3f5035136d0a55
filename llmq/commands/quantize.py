"""`llmq quantize`: a float checkpoint in, a packed one out.

Not here: what an option means (recipe.py), the run (api.py), converting what is packed already (convert.py).
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq import launched
from llmq.commands.terminal import console, progress, warn
from llmq.readers import NAMES
from llmq.show import Rows


def quantize(
    src: Annotated[str, typer.Argument(help="Float checkpoint: a folder, org/name or org/name@REVISION.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, or OUT.gguf.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML or JSON file with any of these options.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter to add to the weights: a folder or Hub id.")] = None,
    quality: Annotated[str | None, typer.Option(help="fast, balanced or best: time against error. [balanced]")] = None,
    scheme: Annotated[str | None, typer.Option(help="Weights and inputs by name: w4a16, fp8, nvfp4, mixed ...")] = None,
    method: Annotated[str | None, typer.Option(help="Steps by name in place of a quality: awq,gptq:damp=0.01")] = None,
    weights: Annotated[str | None, typer.Option(help="Weight grid: nvfp4, int:bits=4:asym; short for int:")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight, 2 to 8.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Columns per scale, 'channel' or 'tensor'. [128]")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric or asymmetric grid. [sym]")] = None,
    range_: Annotated[str | None, typer.Option("--range", help="minmax, mse, percentile, entropy, output.")] = None,
    inputs: Annotated[str | None, typer.Option(help="Grid of the linears' inputs: fp8, nvfp4, mxfp4, mxfp8.")] = None,
    act_bits: Annotated[int | None, typer.Option(help="8: int8 inputs (W8A8), int:bits=8:group=channel.")] = None,
    act: Annotated[str | None, typer.Option(help="Activation scales: per 'token' or static per 'tensor'.")] = None,
    act_sym: Annotated[bool | None, typer.Option("--act-sym/--act-asym", help="Zero points per token. [sym]")] = None,
    act_range: Annotated[str | None, typer.Option(help="Range of static activation scales.")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="8: write static scales of the key-value cache too.")] = None,
    kv: Annotated[str | None, typer.Option(help="Those scales per 'tensor' or per 'head'. [tensor]")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Entries of the cache: 'fp8', which runtimes read, or 'int8'. [fp8]")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="gptq, awq, compressed-tensors, modelopt, mlx, gguf:Q8_0; or several: gptq,mlx."),
    ] = None,
    type_: Annotated[str | None, typer.Option("--type", help="GGUF: Q4_K_M, Q8_0, F16 ... [Q4_K_M]")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="'REGEX:bits=8' or weights=, inputs= ...; GGUF: 'REGEX:type=Q6_K'; repeatable."),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Regex of linears to leave float; repeatable.")] = None,
    on_misfit: Annotated[str | None, typer.Option(help="'skip' leaves linears float that no group divides.")] = None,
    target_bpw: Annotated[float | None, typer.Option(help="Bits per weight to spend where they help most.")] = None,
    bit_choices: Annotated[str | None, typer.Option(help="Bits that --target-bpw chooses from. [3,4,5,6,8]")] = None,
    choices: Annotated[str | None, typer.Option(help="Schemes that it chooses from instead: nvfp4,fp8,float.")] = None,
    lm_head: Annotated[bool | None, typer.Option("--lm-head/--no-lm-head", help="Quantize the output head.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Bits of the embedding, 8, or its grid; GGUF: its type, and the head's.")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="'all': every token calibrates every expert.")] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(help="A text, folder, dataset, 'varied' or 'self'; again for more: SOURCE:weight=2. [wikitext2]"),
    ] = None,
    varied: Annotated[
        float | None, typer.Option(help="Share of the samples that are texts of many kinds. [by --quality]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences. [128]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of each. [2048]")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses calibration windows. [0]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Activations in auto, float32 or bfloat16.")] = None,
    imatrix: Annotated[str | None, typer.Option(help="GGUF: weigh errors by this importance matrix.")] = None,
    imatrix_out: Annotated[str | None, typer.Option(help="GGUF: write the calibration's importance here.")] = None,
    split_max_size: Annotated[str | None, typer.Option(help="GGUF: files of at most so much, e.g. 4G.")] = None,
    runtime: Annotated[
        str | None, typer.Option("--for", help=f"Fit the grid to it, refuse what it would not load: {NAMES}.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    max_memory: Annotated[str | None, typer.Option(help="Most memory to take, e.g. 6GiB; same bytes, slower.")] = None,
    device_memory: Annotated[str | None, typer.Option(help="The same of the device's memory.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let --recipe name modules to import.")] = False,
    verify: Annotated[bool, typer.Option(help="Reopen and check what was written before it becomes OUT.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when the run has succeeded.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write OUT/report.html, a page on the run, at its end.")
    ] = False,
    log_json: Annotated[Path | None, typer.Option(help="Log every step for machines: a JSON object a line.")] = None,
) -> None:
    """Quantize a checkpoint.

    Example: `llmq quantize ./my-llama ./my-llama-int4 --method gptq --bits 4 --group-size 128 --calib text.txt`
    """
    given = {name.rstrip("_"): value for name, value in locals().copy().items() if name != "log_json"}
    from llmq.api import quantize as run

    start = time.monotonic()
    if not launched.leads():
        run(**given)
        return
    with progress(log_json) as work:
        record = run(**given, warn=warn, progress=work)
    _print_summary(out, record, time.monotonic() - start)


def _print_summary(out: Path, summary: dict[str, Any], seconds: float) -> None:
    from llmq.checkpoint.card import errors
    from llmq.progress import Memory

    size = summary["size"]
    table = Rows(out)
    table.add("size", f"{size['float_bytes'] / 1e6:,.1f} MB -> {size['bytes'] / 1e6:,.1f} MB")
    if summary["linears"]:  # none in a GGUF file of floats
        table.add("bits per quantized weight", f"{size['bits_per_weight']:.3f} (scales and zeros counted)")
        for kind, mean, worst, most in errors(summary):
            table.add(f"mean {kind}", f"{mean:.3e} (squared, relative), worst {most:.3e} {worst}")
    if left := summary["untouched"]:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        table.add(
            "matrices left as they are", f"{', '.join(left[:3])}{more} (routers, what reads images, and the like)"
        )
    if experts := summary.get("experts"):
        told = experts["tokens"]
        few = "".join(f", {len(experts[k])} with {k}" for k in ("few", "none") if experts[k])
        table.add("tokens an expert", f"{told['least']:,} to {told['most']:,}, median {told['quartiles'][1]:,}{few}")
    for kind, of in summary.get("trouble", {}).items():
        table.add(kind, f"{of['linears']} linears, the first {of['first']}: {of['says']} (see quantization.json)")
    if page := summary.get("report"):
        table.add("report", page)
    for path in summary.get("also", ()):
        table.add("and", path)
    table.add("seconds", f"{seconds:.1f}")
    table.add("peak memory", f"{Memory.held().most / 1e9:.2f} GB")
    console.print(table)
