"""`llmq generate`, `llmq chat` and `llmq serve`: a checkpoint speaks.

Not here: generating (talk/).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from llmq.commands.terminal import console
from llmq.errors import LlmqError
from llmq.show import Rows, labelled, lines, plain
from llmq.signals import apart, asked

if TYPE_CHECKING:
    from llmq.talk.conversation import Conversation
    from llmq.talk.speaker import Answer

_PROMPT, _MORE, _BLOCK = "> ", ". ", '"""'
_KEY = "LLMQ_API_KEY"
_Compile = Annotated[
    bool, typer.Option("--compile/--no-compile", help="On a GPU: compile for a minute, then decode by CUDA graphs.")
]
_KvBits = Annotated[int | None, typer.Option(help="8 or 4: quantize the key-value cache (not of GGUF).")]
_HELP = """\
/system TEXT   tell the model this before all turns, and begin anew; alone it tells nothing
/reset         forget what was said
/stats         tokens a second of the last answer, and memory
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer
\"\"\"            begins and ends a text of several lines"""


def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, Hub id or .gguf file, quantized or float.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    compile: _Compile = True,
    kv_bits: _KvBits = None,
) -> None:
    """Continue a prompt, greedily: a quick look at whether a checkpoint speaks.

    Example: `llmq generate ./my-llama-int4 "The capital of France is"`
    """
    from llmq.talk.speaker import Sampling, opened

    how, prompt = Sampling(max_new_tokens, temperature=0), _text(prompt)
    with opened(model, device, compiled=compile, kv_bits=kv_bits) as speaker:
        console.print(lines(prompt + "".join(speaker.answer(speaker.encode(prompt), how))))


def chat(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, Hub id or .gguf file, quantized or float.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before all turns.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token. [what the checkpoint says, else 0]")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest of this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw. [another each time]")] = None,
    context: Annotated[
        int | None, typer.Option(help="GGUF: tokens to keep room for. [the file's, at most 8192]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...; GGUF is llama.cpp's to place.")] = "auto",
    compile: _Compile = True,
    kv_bits: _KvBits = None,
) -> None:
    """Talk to a checkpoint: answers come as they are written, Ctrl-C stops one, /help lists commands.

    Example: `llmq chat ./my-llama-int4 --system "Answer in one sentence."`
    """
    from llmq.talk.conversation import BASE, Conversation
    from llmq.talk.speaker import Sampling, opened

    how, system = Sampling(max_new_tokens, temperature, top_p, seed), None if system is None else _text(system)
    with opened(model, device, context, compiled=compile, kv_bits=kv_bits) as speaker, apart():
        talk = Conversation(speaker, how, system)
        console.print(plain(f"{model}: {'/help lists commands' if speaker.chats else BASE}", "dim"), soft_wrap=True)
        last: Answer | None = None
        for said in _said():
            last = _obeyed(said, talk, last) if said.startswith("/") else _answered(said, talk) or last


def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, Hub id or .gguf file, quantized or float.")],
    host: Annotated[str, typer.Option(help="Where to listen; another than this machine wants a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="What requests must have as key; from the environment no process list shows it.", envvar=_KEY
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. [the folder's or the Hub's name]")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most. [the context's]")] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests in line; more are told to come later.")] = 16,
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.")] = 2**20,
    context: Annotated[
        int | None, typer.Option(help="GGUF: tokens to keep room for. [the file's, at most 8192]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...; GGUF is llama.cpp's to place.")] = "auto",
    compile: _Compile = True,
    kv_bits: _KvBits = None,
) -> None:
    """Answer OpenAI's clients (chat and completions), one request after the other; to serve many there is vLLM.

    Example: `llmq serve ./my-llama-int4 --port 8000`
    """
    from llmq.extras import require

    require(("starlette", "uvicorn"), "serve", "HTTP is spoken")
    from llmq.checkpoint.hub import called
    from llmq.talk.server import Limits, Service, listening
    from llmq.talk.server import serve as run
    from llmq.talk.speaker import opened

    limits = Limits(max_waiting, max_body, max_new_tokens)
    with (
        listening(host, port, api_key) as sock,
        opened(model, device, context, compiled=compile, kv_bits=kv_bits) as speaker,
        apart(),
    ):
        service = Service(speaker, name or called(model), limits)
        at = f"[{host}]" if ":" in host else host
        console.print(plain(f"{service.name} at http://{at}:{sock.getsockname()[1]}/v1; Ctrl-C ends"), soft_wrap=True)
        with suppress(KeyboardInterrupt):
            run(service, api_key, sock)


def _said() -> Iterator[str]:
    """Yield what is typed, up to /exit or the end of the input. Ctrl-C leaves what was being typed."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (has `input` edit lines)
    while True:
        try:
            said = _typed()
        except KeyboardInterrupt:
            console.print(plain("/exit or Ctrl-D leaves", "dim"), new_line_start=True)
            continue
        except EOFError:
            console.print()
            return
        if said.strip() == "/exit":
            return
        if said.strip():
            yield said


def _text(said: str) -> str:
    """Return what was typed. Raises LlmqError for bytes that are no text, which Python hands on as halves of pairs."""
    try:
        said.encode()
    except UnicodeEncodeError as e:
        raise LlmqError("what was typed is no UTF-8 text; check the terminal's or the file's encoding") from e
    return said


def _typed() -> str:
    """Return a line, or several that stand in triple quotes. Raises EOFError at the end of the input."""
    shown = sys.stdin.isatty()
    text = input(_PROMPT if shown else "")
    if not text.startswith(_BLOCK):
        return text
    text = text.removeprefix(_BLOCK)
    while _BLOCK not in text:
        text += "\n" + input(_MORE if shown else "")
    return text.partition(_BLOCK)[0]


def _answered(said: str, talk: Conversation) -> Answer | None:
    """Print the answer to what was said as it comes, and keep it; None where there is none."""
    written = []
    try:
        answer = talk.ask(_text(said))
        with asked() as stop:
            for piece in answer:
                written.append(piece)
                console.print(lines(piece), end="", soft_wrap=True)
                if stop():
                    answer.close()
                    break
    except LlmqError as e:
        console.print(labelled("error", "red", e), soft_wrap=True, new_line_start=True)
        return None
    except KeyboardInterrupt:  # a second one, in the middle of a token
        answer.close()
    cut = {None: "(stopped)", "length": "(cut: --max-new-tokens, or the context, is full)"}.get(answer.finish, "")
    console.print(Text.assemble(" " * bool(cut), plain(cut, "dim")), soft_wrap=True)
    talk.keep(said, "".join(written))
    return answer


def _obeyed(command: str, talk: Conversation, last: Answer | None) -> Answer | None:
    """Do what a command of the chat says. Returns the last answer."""
    name, _, rest = command.partition(" ")
    try:
        if name == "/system":
            talk.tell(_text(rest.strip()) or None)
        elif name == "/reset":
            talk.reset()
        elif name == "/stats":
            console.print(_stats(talk, last))
        else:
            unknown = "" if name == "/help" else f"there is no {name}, but:\n"
            console.print(lines(unknown + _HELP))
    except LlmqError as e:
        console.print(labelled("error", "red", e), soft_wrap=True)
    return last


def _stats(talk: Conversation, last: Answer | None) -> Rows:
    table = Rows("")
    if last is not None:
        room = "" if talk.speaker.context is None else f", of {talk.speaker.context:,}"
        table.add("tokens", f"{last.prompt_tokens:,} read, {last.tokens:,} written{room}")
        table.add("first token", f"{last.first:.2f} s")
        table.add("tokens a second", f"{last.rate:.1f}")
    for what, size in talk.speaker.memory().items():
        table.add(f"{what} in memory", f"{size / 1e6:,.1f} MB")
    return table
