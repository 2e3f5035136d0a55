"""A plain ONNX folder of llmq (`--to onnx:qdq`) as a stateful OpenVINO model, which openvino-genai speaks from.

    python scripts/_openvino.py FOLDER OUT        in a Python that has openvino, openvino-tokenizers and transformers

OpenVINO's pipeline keeps the cache in the model: each pair past_key_values.*, present.* becomes a state, which begins
empty and is reordered by `beam_idx`. Codes stay constants of 4 or 8 bits.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation


def stateful(folder: Path) -> Any:
    """Return the model of a folder with its cache as states."""
    model = openvino.Core().read_model(folder / "model.onnx")
    inputs = {i.get_any_name(): i for i in model.inputs}
    past = {name: i for name, i in inputs.items() if name.startswith("past_key_values.")}
    beam = op.parameter(shape=[-1], dtype=np.int32, name="beam_idx")
    beam.output(0).set_names({"beam_idx"})
    model.add_parameters([beam])
    for i in past.values():
        readers = list(i.get_target_inputs())
        gathered = op.gather(i.node, beam, op.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in past})
    _begin_empty(model, inputs["input_ids"])
    return model


def _begin_empty(model: Any, ids: Any) -> None:
    """Let every state begin with no positions, for as many rows as input_ids has."""
    model.validate_nodes_and_infer_types()
    shape = op.shape_of(ids.node, output_type="i64")
    batch = op.gather(shape, op.constant([0], dtype=np.int64), op.constant(0, dtype=np.int64))
    for state in (o for o in model.get_ops() if o.get_type_name() == "ReadValue"):
        _, heads, _, d = state.get_output_partial_shape(0)
        rest = op.constant(np.array([heads.get_length(), 0, d.get_length()], np.int64))
        empty = op.broadcast(op.constant(0.0, dtype=np.float32), op.concat([batch, rest], 0))
        state.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def main() -> None:
    """Write the model, its tokenizer and detokenizer, and the files beside them."""
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    folder, out = (Path(p) for p in sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(stateful(folder), out / "openvino_model.xml", compress_to_fp16=False)
    words, back = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    openvino.save_model(words, out / "openvino_tokenizer.xml")
    openvino.save_model(back, out / "openvino_detokenizer.xml")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


if __name__ == "__main__":
    main()
