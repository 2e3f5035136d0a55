"""GGUF files: what llama.cpp needs beside the weights, and the container itself.

architecture.py   which models, their keys, tensor names and row order; rope.py: rotary embedding by value
tokenizer.py      vocabulary, merges, special tokens; pretokenizer.py: which rule cuts text
mixture.py        the type of every tensor
imatrix.py        importance, exchanged with llama.cpp
container.py      staged parts -> one file or several; reader.py: a file opened
sink.py           OUT while it is made; seal.py: a checksum of the whole file
Not here: block types (grids/), the format a recipe names (formats/gguf.py).
"""
