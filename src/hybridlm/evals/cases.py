"""Items turned into what a scorer reads: token ids of contexts and continuations, in blocks that never change.

Tokens are those of the whole text, cut where the context's own tokens end, as lm-evaluation-harness does it. Items
that share worked examples form a group, whose shared tokens the scorer reads once.

Blocks make runs resumable to the last bit: which texts share a pass shows in the last digits of a log-probability, so a
block is scored whole or not at all, and the cut into blocks depends on the task alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError
from hybridlm.evals.items import Item, find, read_items
from hybridlm.evals.tasks import Task
from hybridlm.text import Tokenizer

__all__ = ["Block", "Case", "blocks_of", "encode_pairs", "load"]

_BLOCK = 64  # items


@dataclass(slots=True)
class Case:
    """One item as token ids."""

    id: str
    hash: str
    label: str
    requests: list[tuple[list[int], list[int]]]  # context and continuation of each choice, or of the target
    bytes: list[int]  # of each continuation, its leading blank left out
    answer: int = 0  # the index of the right one
    truncated: bool = False


@dataclass(slots=True)
class Block:
    """Items that are scored together."""

    ids: list[tuple[str, str]]  # id and hash of each
    make: Callable[[], list[Any]]  # the cases, made when it is their turn
    prefix: int = 0  # tokens that all contexts begin with
    extra: dict[str, Any] = field(default_factory=dict)


def load(task: Task, data: Path | None) -> tuple[list[Item], dict[str, list[Item]]]:
    """The items of a task in order of their subjects, and the worked examples by subject.

    `data` None reads from the hub. Raises `DataError` for a missing or malformed file.
    """
    from hybridlm.evals import hub

    def read(name: str, choices: bool) -> list[Item]:
        if data is None:
            return hub.read(name, choices)
        file = find(data, name)
        if file is None:
            raise DataError(f"{data}: has no {name}.jsonl, .jsonl.gz or .parquet, which {task.name} needs; give "
                            "another --data, or --data hub to fetch it from the Hugging Face hub")
        return read_items(file, choices=choices)

    items = read(task.file, task.choices)
    examples: dict[str, list[Item]] = {}
    if task.shots:
        for item in read(task.examples, task.choices):
            examples.setdefault(item.subject if task.name == "mmlu" else "", []).append(item)
        if task.name == "mmlu":
            items = sorted(items, key=lambda item: item.subject)  # stable: within a subject as in the file
    return items, examples


def head_of(task: Task, examples: dict[str, list[Item]], subject: str) -> str:
    """The text before each item of a subject: a line about it, then the worked examples."""
    if not task.shots:
        return task.asks.head(subject) if task.name == "mmlu" else ""
    key = subject if task.name == "mmlu" else ""
    mine = examples.get(key, [])[:task.shots]
    if len(mine) < task.shots:
        raise DataError(f"{task.name}: has {len(mine)} worked examples{f' for {key}' if key else ''} where --shots is "
                        f"{task.shots}; ask for fewer")
    asked = [task.asks.ask(item)[max(0, item.answer)] for item in mine]
    return task.asks.head(subject) + "".join(f"{context}{answer}\n\n" for context, answer in asked)


def blocks_of(task: Task, items: Sequence[Item], examples: dict[str, list[Item]], tokenizer: Tokenizer, context: int,
              truncate: bool = False) -> list[Block]:
    """Blocks of `Case`s. Making a block raises `DataError` for an item that is longer than `context` tokens."""
    blocks = []
    for subject, group in groupby(items, key=lambda item: item.subject if task.name == "mmlu" else ""):
        mine, head = list(group), head_of(task, examples, subject)
        for at in range(0, len(mine), _BLOCK):
            part = mine[at:at + _BLOCK]

            def make(part: list[Item] = part, head: str = head) -> list[Case]:
                return _cases(task, part, head, tokenizer, context, truncate)

            blocks.append(Block([(item.id, item.hash) for item in part], make, len(_shared(tokenizer, head))))
    return blocks


def _cases(task: Task, items: list[Item], head: str, tokenizer: Tokenizer, context: int, truncate: bool) -> list[Case]:
    asked = [task.asks.ask(item) for item in items]
    encoded = iter(encode_pairs(tokenizer, [pair for pairs in asked for pair in pairs], head))
    cases = []
    for item, pairs in zip(items, asked, strict=True):
        requests = [next(encoded) for _ in pairs]
        case = Case(item.id, item.hash, item.subject, requests, [_size(pair) for pair in pairs], max(0, item.answer))
        longest = max(len(a) + len(b) - 1 for a, b in requests)
        if longest > context:
            if not truncate:
                raise DataError(f"{task.label}: item {item.id} has {longest:,} tokens, the context {context:,}; give a "
                                "larger --context, fewer --shots, or --truncate to leave out the beginning of such "
                                "items, as lm-evaluation-harness does")
            case.truncated = True
            case.requests = [_cut(a, b, context) for a, b in requests]
        cases.append(case)
    return cases


def _size(pair: tuple[str, str]) -> int:
    context, continuation = pair
    return len((context[len(context.rstrip()):] + continuation).removeprefix(" ").encode("utf-8", "surrogatepass"))


def _cut(context: list[int], continuation: list[int], limit: int) -> tuple[list[int], list[int]]:
    """The last `limit` tokens of what is read; the continuation's last token is only predicted."""
    text = [*context, *continuation][-(limit + 1):]
    kept = min(len(continuation), len(text) - 1)
    return text[:-kept], text[-kept:]


def encode_pairs(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]],
                 head: str = "") -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation) texts, `head` before every context.

    Blanks at a context's end go to the continuation. An empty context is the end-of-text token, from which a text
    begins.
    """
    shared, rest = _shared(tokenizer, head), head[len(head.rstrip()):]
    if not shared:
        rest = head
    texts: list[str] = []
    for context, continuation in pairs:
        context = rest + context
        bare = context.rstrip()
        texts += [bare, bare + context[len(bare):] + continuation]
    unique = dict.fromkeys(texts)
    ids = dict(zip(unique, tokenizer.encode_batch(list(unique)), strict=True))
    found = []
    for bare, whole in zip(texts[::2], texts[1::2], strict=True):
        before, both = ids[bare], ids[whole]
        if not bare and not shared:
            if tokenizer.eos is None:
                raise DataError("the tokenizer names no end-of-text token, from which a text without context begins")
            before, both = [tokenizer.eos], [tokenizer.eos, *both]
        elif len(both) <= len(before):  # the tokenizer joins them; then the last token is what is predicted
            before = both[:-1]
        found.append(([*shared, *before], both[len(before):]))
    return found


def _shared(tokenizer: Tokenizer, head: str) -> list[int]:
    """Tokens of the head up to its last blanks, where text after it does not change them; else none.

    Byte-level tokenizers cut text into words before they look for tokens, and never keep a letter and the line break
    after it together; others may.
    """
    bare = head.rstrip()
    if not bare or not tokenizer.is_byte_level:
        return []
    ids, probe = tokenizer.encode(bare, special=False), head[len(bare):] + "The probe"
    return ids if tokenizer.encode(bare + probe, special=False) == [*ids, *tokenizer.encode(probe, special=False)] \
        else []
