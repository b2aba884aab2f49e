"""The benchmarks by name: which file, which form of asking, how many worked examples.

    mmlu              letter form, 5 worked examples of the subject
    mmlu:cloze        the texts of the answers instead of letters
    gsm8k             bits per byte of the worked solution
    gsm8k:generate    the answer that the model writes, exact match
    ruler_vt          one of the 13 RULER tasks (see ruler.py)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridlm.errors import ConfigError
from hybridlm.evals.prompts import CLOZE, LETTER, Form

__all__ = ["FORMS", "TASKS", "Task", "parse"]

FORMS = ("cloze", "letter", "bpb", "generate")


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark in a form. `label` is the name it is run and reported under."""

    name: str
    about: str
    file: str  # of the items, without suffix
    wording: str  # its name in prompts.CLOZE
    forms: tuple[str, ...]  # the first one is the default
    form: str = ""
    shots: int = 0  # worked examples before each item
    examples: str = ""  # their file; "" has none
    figures: tuple[str, ...] = ()  # those of `results.summary` that tell something; () is all

    @property
    def label(self) -> str:
        return self.name if self.form == self.forms[0] else f"{self.name}:{self.form}"

    @property
    def asks(self) -> Form:
        return LETTER if self.form == "letter" else CLOZE[self.wording]

    @property
    def choices(self) -> bool:
        """Whether items have choices; else one target."""
        return self.form in ("cloze", "letter")


_CHOICE = ("cloze", "letter")
_BITS = ("bits_per_byte",)  # of a long target neither a greedy match nor perplexity means much
TASKS = {t.name: t for t in (
    Task("mmlu", "57 subjects, 4 choices", "mmlu_test", "mmlu", ("letter", "cloze"), shots=5, examples="mmlu_dev"),
    Task("arc_easy", "school science", "arc_easy_test", "question", _CHOICE, examples="arc_easy_val"),
    Task("arc_challenge", "school science, hard", "arc_challenge_test", "question", _CHOICE,
         examples="arc_challenge_val"),
    Task("hellaswag", "how a scene goes on", "hellaswag_val", "ending", _CHOICE),
    Task("piqa", "how to do everyday things", "piqa_val", "question", _CHOICE),
    Task("winogrande", "whom a pronoun means", "winogrande_val", "gap", ("cloze",)),
    Task("boolq", "yes or no about a passage", "boolq_val", "boolq", _CHOICE),
    Task("openbookqa", "elementary facts", "openbookqa_val", "plain", _CHOICE),
    Task("csqa", "common sense", "csqa_val", "question", _CHOICE),
    Task("socialiqa", "what people do and feel", "socialiqa_val", "social", _CHOICE),
    Task("lambada", "the last word of a passage", "lambada_openai_test", "word", ("bpb",)),
    Task("gsm8k", "school arithmetic in words", "gsm8k_test", "gsm8k", ("bpb", "generate"), examples="gsm8k_train",
         figures=_BITS),
    Task("humaneval", "Python functions from docstrings", "humaneval_test", "code", ("bpb", "generate"), figures=_BITS),
    Task("mbpp", "small Python programs", "mbpp_test", "mbpp", ("bpb", "generate"), figures=_BITS),
    Task("squad", "answers in a passage", "squad_val1000", "squad", ("bpb",), figures=_BITS),
)}


def parse(text: str, shots: int | None = None) -> Task:
    """NAME[:FORM] -> a task. Raises `ConfigError` naming what there is."""
    name, _, form = text.strip().partition(":")
    if name not in TASKS:
        raise ConfigError(f"task: {name!r} is unknown; there are {', '.join(TASKS)}, the ruler tasks, and bpb")
    task = TASKS[name]
    if form and form not in task.forms:
        raise ConfigError(f"task: {name} has the forms {', '.join(task.forms)}, not {form!r}")
    if shots and not task.examples:
        raise ConfigError(f"shots: there are no worked examples for {name}; leave --shots out")
    return replace(task, form=form or task.forms[0], shots=task.shots if shots is None else shots)
