"""GGUF files: what llama.cpp needs beside the weights, and the container itself.

architecture.py  which models, their keys, tensor names and row order     mixture.py  the type of every tensor
tokenizer.py     vocabulary, merges, special tokens, pretokenizer.py      imatrix.py  importance, exchanged with llama.cpp
container.py     staged parts -> one file or several                      reader.py   header and tensors of a file
Not here: block types (grids/), the format a recipe names (formats/gguf.py).
"""
