"""A model that speaks: one way to generate text, which `llmq generate`, `chat` and `serve` share.

    speaker.py        what is asked: prompts as token ids, an answer piece by piece
    in_torch.py       a checkpoint folder, by transformers; in_llama_cpp.py: a GGUF file, by xllamacpp
    words.py          pieces of text out of tokens; where a stop string ends them
    conversation.py   the turns of a chat
    protocol.py       OpenAI's requests and answers; server.py: over HTTP, one after the other

It is for looking at a model, not for serving many: vLLM does that.
"""
