"""A checkpoint folder that speaks, by transformers: every format that llmq loads, and float ones.

transformers' own `generate` runs, compiled on a GPU, with whatever cache the model has or a quantized one, in a
coroutine (greenlet) that hands each token out and waits: whoever reads sets the pace, and an answer that is closed is
computed no further. What the cache holds is kept: the next turn of a chat begins where the last one ended.
A chat template is a stranger's program, so that it runs in a child process with limits (guard/confined.py).
Not here: loading (loading.py), text out of tokens (words.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from llmq.checkpoint.hub import called
from llmq.guard.confined import Confined
from llmq.integrations.cache import QuantizedCache, check_bits
from llmq.integrations.compiled import compile_for_generation, compiles, is_compiled
from llmq.loading import load, load_tokenizer
from llmq.model.pretrained import check_ids, foreign
from llmq.talk.speaker import Message, Piece, Sampling, Speaker
from llmq.talk.words import Decoded

_ROOM = 4096  # tokens that a static cache has room for at the least
_COLD = 1e-6  # a temperature below which only the likeliest token is left, and logits divided by it overflow


class InTorch(Speaker):
    """A checkpoint folder or Hub id. Raises LlmqError as `load` and `load_tokenizer` do.

    compiled: on a GPU, compile it at its first tokens, where its architecture can be (integrations/compiled.py).
    kv_bits: of its key-value cache, 8 or 4; None is one in floats.
    """

    def __init__(self, model: str, device: str = "auto", *, compiled: bool = True, kv_bits: int | None = None) -> None:
        if kv_bits is not None:
            check_bits(kv_bits)
        self.name = called(model)
        self._tokenizer: Any = load_tokenizer(model)
        self._model: Any = load(model, device=device)
        if compiled and self._model.device.type == "cuda" and compiles(self._model):
            compile_for_generation(self._model)
        text = self._model.config.get_text_config(decoder=True)
        self.context = getattr(text, "max_position_embeddings", None)
        self.chats = bool(self._tokenizer.chat_template)
        self.weights = sum(t.nbytes for t in [*self._model.parameters(), *self._model.buffers()])
        self._renders: Confined | None = None
        self._render: Any = None
        self._kv_bits = kv_bits
        if kv_bits is not None:
            self._grown()  # says at once what it cannot hold
        self._cache: Any = None
        self._room = 0  # tokens that a static cache has room for
        self._held: list[int] = []  # the ids whose keys and values the cache has

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        """End the child that renders."""
        if self._renders is not None:
            self._renders.__exit__()
            self._renders = self._render = None

    def encode(self, text: str) -> list[int]:
        """See `Speaker.encode`."""
        with foreign(f"{self.name}: its tokenizer cannot cut the prompt"):
            return list(self._tokenizer(text)["input_ids"])

    def templated(self, messages: Sequence[Message]) -> list[int]:
        """See `Speaker.templated`."""
        if self._renders is None:
            self._renders = Confined(self._filled, f"{self.name}: its chat template")
            self._render = self._renders.__enter__()
        try:
            text = self._render(list(messages))
        except BaseException:
            self.__exit__(None, None, None)  # it may be gone, or still at work
            raise
        with foreign(f"{self.name}: its tokenizer cannot cut the chat"):
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _filled(self, messages: Any) -> str:
        with foreign(f"{self.name}: its chat template refuses these messages"):
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    def pieces(self, ids: Sequence[int], how: Sampling) -> Iterator[Piece]:
        """See `Speaker.pieces`. Raises LlmqError at once for ids of which the model has no embedding."""
        check_ids(ids, self._model)
        return self._pieces(ids, how)

    def _pieces(self, ids: Sequence[int], how: Sampling) -> Iterator[Piece]:
        ends = self._ends()
        words = Decoded(lambda some: str(self._tokenizer.decode(some, skip_special_tokens=True)), ids)
        tokens = self._tokens(list(ids), how, ends)
        try:
            for n, token in enumerate(tokens, 1):
                finish = "stop" if token in ends else "length" if n == how.max_new_tokens else None
                text = words.add(token)
                yield Piece(text + words.add(None) if finish else text, finish=finish)
        finally:
            tokens.close()

    def memory(self) -> dict[str, int]:
        """See `Speaker.memory`."""
        layers = getattr(self._cache, "layers", [])
        kept = [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)]
        held = getattr(self._cache, "nbytes", sum(t.nbytes for t in kept))  # a quantized one counts for itself
        return super().memory() | {"key-value cache": held}

    def _ends(self) -> list[int]:
        """Return the ids that end an answer: the checkpoint's, and what the tokenizer calls the end of a text."""
        said = self._model.generation_config.eos_token_id
        every = [*(said if isinstance(said, list) else [said]), self._tokenizer.eos_token_id]
        return [i for i in dict.fromkeys(every) if i is not None]

    def _tokens(self, ids: list[int], how: Sampling, ends: list[int]) -> Generator[int, None, None]:
        """Yield the ids that follow, each when it is asked for."""
        cache = self._taken(ids, how.max_new_tokens)
        handed: list[int] = []
        running = greenlet(lambda: self._generate(ids, how, ends, cache, _Handing(getcurrent().parent)))
        whole = False
        try:
            while (token := running.switch()) is not None:
                handed.append(token)
                yield token
            whole = True
        except GeneratorExit:
            running.throw(GreenletExit)
            whole = True
        finally:  # an interrupt within a forward leaves layers that hold more than others
            self._cache = cache if whole else None
            self._held = [*ids, *handed][: int(cache.get_seq_length())] if whole and cache is not None else []

    def _generate(self, ids: list[int], how: Sampling, ends: list[int], cache: Any, streamer: _Handing) -> None:
        torch.manual_seed(secrets.randbits(32) if how.seed is None else how.seed)
        given = torch.tensor([ids], device=self._model.device)
        with foreign(f"{self.name}: transformers cannot generate"):
            self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                past_key_values=cache,
                cache_implementation=None,  # it is the one above
                streamer=streamer,
                max_new_tokens=how.max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                **self._choosing(how),
            )

    def _choosing(self, how: Sampling) -> dict[str, Any]:
        """Return what tells `generate` how to choose, by the checkpoint's own settings where nothing is said."""
        own = self._model.generation_config
        sampled = how.temperature is not None or how.top_p is not None or bool(own.do_sample)
        coldest = how.temperature is not None and how.temperature < _COLD
        if coldest or how.top_p == 0 or not sampled:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        told = {"temperature": how.temperature, "top_p": how.top_p}
        return {"do_sample": True, **{key: value for key, value in told.items() if value is not None}}

    def _taken(self, ids: list[int], new: int) -> Any:
        """Return a cache: the last one where the prompt goes on from what that holds; None has `generate` make one.

        It is nobody else's until this answer has ended. A compiled model's is static, and the same tensors for as long
        as answers fit, since other ones would be captured in other graphs.
        """
        cache, held, self._cache, self._held = self._cache, self._held, None, []
        goes_on = cache is not None and 0 < len(held) < len(ids) and ids[: len(held)] == held
        if is_compiled(self._model):
            return self._static(cache, len(ids) + new, goes_on)
        return cache if goes_on else self._grown()

    def _grown(self) -> Any:
        """Return an empty cache that grows, None where `generate` is to make one."""
        from transformers import DynamicCache

        if self._kv_bits is not None:
            return QuantizedCache.for_model(self._model, self._kv_bits)
        return DynamicCache(config=self._model.config) if self._model._supports_default_dynamic_cache() else None

    def _static(self, cache: Any, length: int, goes_on: bool) -> Any:
        """Return a static cache with room for so many tokens, the last one if it has it, emptied unless it goes on."""
        from transformers import StaticCache

        if cache is None or length > self._room:
            self._room = max(_ROOM, 1 << (length - 1).bit_length())
            if self._kv_bits is not None:
                return QuantizedCache.for_model(self._model, self._kv_bits, max_cache_len=self._room)
            return StaticCache(config=self._model.config, max_cache_len=self._room)
        if not goes_on:
            cache.reset()
        return cache


class _Handing:
    """What `generate` gives tokens to: hands each on, and waits until the next is asked for."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._begun = False

    def put(self, ids: Tensor) -> None:
        """Hand an id on; the first call has the prompt."""
        if self._begun:
            self._reader.switch(int(ids.reshape(-1)[0]))
        self._begun = True

    def end(self) -> None:
        """Do nothing: that `generate` returns says it."""
