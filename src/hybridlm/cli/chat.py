"""`hybridlm chat MODEL`: a conversation in the terminal.

What was said stays in the engine's prefix cache, so each turn reads only what is new. A model without a chat template
was never taught to answer: then what is typed is a text, the model continues it, and says so first.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlm.cli._common import (
    ContextOption,
    DeviceOption,
    DraftOption,
    KVOption,
    MinPOption,
    ModelArgument,
    PenaltyOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    count,
    note,
    open_engine,
    peak_rss_bytes,
    printable,
    size,
)
from hybridlm.engine.chat import turn_end
from hybridlm.errors import HybridLMError

if TYPE_CHECKING:
    from hybridlm.engine import Engine, Generation

HELP = """\
/help              this list
/reset             forget the conversation
/system TEXT       set the system message and start over; without TEXT, show it
/regenerate        another answer to the last message
/save FILE         write the conversation as JSON
/load FILE         go on from a saved one
/stats             speed, memory and what the last answer reused
/exit              leave; so does Ctrl-D
A line that ends in \\ goes on in the next one; lines between two \"\"\" are one message.
Ctrl-C stops the answer and keeps what was said of it."""


def command(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of an answer; to the "
                                                   "end of the context when left out.")] = None,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    draft: DraftOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    context: ContextOption = None,
    kv_type: KVOption = None,
) -> None:
    """Talk with a model in the terminal; /help lists what you can do there.

    hybridlm chat models/hybridlm-tiny-q8_0.gguf
    """
    machine: dict[str, Any] = {"device": device, "threads": threads, "context": context, "kv_type": kv_type}
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(open_engine(model, **machine))
        guesser = stack.enter_context(open_engine(draft, **machine, cache_bytes=0)) if draft else False
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                   "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
                   "speculative": guesser}
        talk = Talk(engine, options) if engine.chat_template is not None else Text(engine, options)
        if system is not None:
            talk.set_system(system)
        note(f"{engine.name}, {count(engine.config.num_parameters())} parameters, context {engine.context:,} "
             "tokens; /help for help, Ctrl-D to leave")
        if isinstance(talk, Text):
            note("This model has no chat template: it was not taught to answer, it continues text. What you type is "
                 "continued; an empty line lets it go on.")
        converse(talk)


@dataclass
class Talk:
    """A conversation with a model that has a chat template."""

    engine: Engine
    options: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Generation | None = None

    def __post_init__(self) -> None:
        end = turn_end(self.engine) if self.engine.chat_template is not None else ""
        self.stop = (end,) if end else ()

    def say(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})

    def unsay(self) -> None:
        """Take back what `say` added."""
        self.messages.pop()

    def generate(self) -> Generation:
        return self.engine.chat(self.messages, stop=self.stop, **self.options)

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def set_system(self, text: str) -> None:
        self.messages = [{"role": "system", "content": text}] if text else []

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    def reset(self) -> None:
        self.set_system(self.system)

    def take_back(self) -> bool:
        """Drop the last answer, so that another can be given; False where there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return False
        self.messages.pop()
        return True

    def to_json(self) -> dict[str, Any]:
        return {"messages": self.messages}

    def from_json(self, data: dict[str, Any]) -> None:
        messages = data["messages"]
        if not all(isinstance(m, dict) and set(m) == {"role", "content"} and isinstance(m["content"], str)
                   and m["role"] in ("system", "user", "assistant") for m in messages):
            raise ValueError
        self.messages = messages


@dataclass
class Text(Talk):
    """A text that a model without a chat template continues."""

    parts: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        between = "\n" if line and self.parts and not self.parts[-1].endswith("\n") else ""
        self.parts.append(between + line)

    def unsay(self) -> None:
        self.parts.pop()

    def generate(self) -> Generation:
        return self.engine.generate("".join(self.parts), **{"max_tokens": 256, **_given(self.options)})

    def answered(self, text: str) -> None:
        self.parts.append(text)

    def set_system(self, text: str) -> None:
        raise HybridLMError("this model has no chat template, so it knows no system message")

    @property
    def system(self) -> str:
        return ""

    def reset(self) -> None:
        self.parts = []

    def take_back(self) -> bool:
        if not self.last or not self.parts:
            return False
        self.parts.pop()
        return True

    def to_json(self) -> dict[str, Any]:
        return {"text": "".join(self.parts)}

    def from_json(self, data: dict[str, Any]) -> None:
        if not isinstance(data["text"], str):
            raise ValueError
        self.parts = [data["text"]]


# -- the terminal ----------------------------------------------------------------------------------------------------


def converse(talk: Talk) -> None:
    """Read and answer until the input ends."""
    with _line_editor():
        for line in _inputs():
            if line.startswith("/"):
                name, _, rest = line[1:].partition(" ")
                try:
                    if name in ("exit", "quit", "bye"):
                        return
                    obey(talk, name, rest.strip())
                except HybridLMError as error:
                    note(f"error: {error}")
                continue
            if not line and not isinstance(talk, Text):
                continue
            talk.say(line)
            answer(talk)


def answer(talk: Talk) -> None:
    """Stream the answer to what was said last. Ctrl-C ends it there."""
    text = ""
    clean = printable if sys.stdout.isatty() else str
    try:
        generation = talk.last = talk.generate()
        with contextlib.closing(generation):
            for piece in generation:
                text += piece.text
                print(clean(piece.text), end="", flush=True)
        if generation.finish_reason == "length" and talk.options["max_tokens"] is None and not isinstance(talk, Text):
            note("\n[the context is full; /reset starts over]")
    except KeyboardInterrupt:
        note("\n[stopped]")
    except HybridLMError as error:
        note(f"error: {error}")
        if not text:
            talk.unsay()
            return
    print(flush=True)
    talk.answered(text)


def obey(talk: Talk, name: str, rest: str) -> None:
    """One slash command."""
    if name == "help":
        note(HELP)
    elif name == "reset":
        talk.reset()
        note("[forgotten]")
    elif name == "system":
        if rest:
            talk.set_system(rest)
        note(f"[system: {talk.system or 'none'}]")
    elif name == "regenerate":
        if talk.take_back():
            if talk.options["seed"] is not None:
                talk.options["seed"] += 1  # or it would be the same answer
            answer(talk)
        else:
            note("nothing has been answered yet")
    elif name == "stats":
        note(stats(talk))
    elif name in ("save", "load"):
        if not rest:
            raise HybridLMError(f"/{name}: give a file, for instance /{name} talk.json")
        (save if name == "save" else load)(talk, Path(rest).expanduser())
    else:
        note(f"/{name} is not a command here; /help lists them")


def save(talk: Talk, path: Path) -> None:
    """The conversation as JSON."""
    try:
        path.write_text(json.dumps(talk.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HybridLMError(f"{path}: cannot be written ({error.strerror})") from None
    note(f"[saved to {path}]")


def load(talk: Talk, path: Path) -> None:
    """Go on from what `save` wrote."""
    try:
        talk.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise HybridLMError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise HybridLMError(f"{path}: not a conversation that /save wrote for this kind of model") from None
    note(f"[loaded {path}]")


def stats(talk: Talk) -> str:
    """One line about the last answer."""
    g = talk.last
    if g is None:
        return "nothing has been answered yet"
    return (f"[prompt {g.prompt_tokens} tokens, {g.reused_tokens} of them reused, the rest at "
            f"{g.prefill_tokens_per_s:.0f} tokens/s | {len(g.tokens)} tokens generated at {g.decode_tokens_per_s:.1f} "
            f"tokens/s | cache {size(talk.engine.cache.nbytes)}, peak memory {size(peak_rss_bytes())}]")


def _inputs() -> Iterator[str]:
    """What the user sends, a message each: lines joined where they say so."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
            if line.strip() == '"""':
                lines = []
                while (line := input("... " if prompt else "")).strip() != '"""':
                    lines.append(line)
                yield "\n".join(lines)
                continue
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("... " if prompt else "")
            yield line
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            note("\n[Ctrl-D or /exit leaves]")


@contextlib.contextmanager
def _line_editor() -> Iterator[None]:
    """Editing and a history of lines, where the terminal and Python can."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    from hybridlm.store import home

    file = home() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
