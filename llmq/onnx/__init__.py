"""What an ONNX file of a language model needs: the graph as a file, the decoder's blocks, two dialects of operators.

    graph.py          nodes and tensors, of which large ones go to a file beside the graph as they come
    packing.py        codes, scales and zeros of a solved linear as either kind of quantized operator stores them
    architecture.py   what a model computes, by value: windows, rotary tables, norms, multipliers, or a refusal by name
    decoder.py        the model as nodes, in whichever dialect
    dialect.py        what both dialects share: embedding, head, float linears, quantized inputs
    genai.py, qdq.py  the dialects: for onnxruntime-genai, and plain ONNX
    convolution.py    beside them, for nets of pictures: docs/learn, chapter 3

Not here: which checkpoint, and what lies in the folder beside the graph (export/onnx.py).
"""
