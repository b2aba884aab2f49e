"""The command line: `hybridlm COMMAND ...`.

One small file per command. A command's module is imported only when that command runs, so that `hybridlm --help` is
instant and nothing that works without PyTorch ever touches it. Mistakes of the user end as one line on stderr and exit
code 1, wrong usage as 2, Ctrl-C as 130; whatever else comes out is a bug and shows its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer

from hybridlm.errors import HybridLMError

__all__ = ["build_app", "main"]

# The map that `hybridlm --help` prints: panel -> command -> (module, one line).
MAP: dict[str, dict[str, tuple[str, str]]] = {
    "Start": {
        "quickstart": ("quickstart", "Corpus, tokenizer, training, evaluation, quantised file, text: all in minutes."),
    },
    "Train": {
        "tokenizer": ("tokenizer", "Train a byte-level BPE on your own text, or look into one."),
        "plan": ("plan", "Memory, days, cost and checkpoints of a training run, before it: --preset 7b --gpus 512."),
        "train": ("train", "Train a model by a recipe: hybridlm train tiny data=PATH out=DIR."),
        "soup": ("soup", "Average the weights of several checkpoints into one model."),
        "doctor": ("doctor", "Check the machines before a run: GPUs, disk, clocks, sums across processes."),
    },
    "Convert and quantise": {
        "convert": ("convert", "Turn a Hugging Face folder or hub repository into one GGUF file."),
        "export": ("export", "A training run's checkpoint as a Hugging Face folder or a GGUF file."),
        "quantize": ("quantize", "Make a GGUF file smaller: q8_0, q5_m, q4_m, ..."),
        "inspect": ("inspect", "Show what a model file holds: shape, tensors, types, sizes."),
    },
    "Run": {
        "chat": ("chat", "Talk with a model in the terminal."),
        "serve": ("serve", "Serve models over HTTP: OpenAI's, Ollama's and Anthropic's APIs, a chat page."),
        "generate": ("generate", "Continue a prompt."),
        "bench": ("bench", "Measure prefill and decode speed and memory."),
    },
    "Models": {
        "pull": ("pull", "Fetch a model from the hub, ready to run."),
        "list": ("list_models", "Show the models that are here."),
        "rm": ("rm", "Delete models from the store."),
        "upload": ("upload", "Publish GGUF files with a model card."),
    },
    "Evaluate": {
        "eval": ("evaluate", "Measure quality: benchmarks, RULER, bits per byte on your own files."),
        "verify": ("verify", "Check that all ways to compute a model's output agree."),
        "scaling": ("scaling", "Tokens to parity between architectures, by law and by trajectory, with intervals."),
        "report": ("report", "Runs and evaluations as one self-contained page, with plots."),
    },
}

# What an install extra brings, by the module that is missing without it.
EXTRAS = {"torch": "train", "safetensors": "train", "pyarrow": "train", "zstandard": "train", "tensorboard": "train",
          "starlette": "serve", "uvicorn": "serve", "pydantic": "serve", "llguidance": "serve", "triton": "gpu",
          "matplotlib": "report", "datasets": "hub"}


def build_app(wanted: str | None = None) -> typer.Typer:
    """The whole typer app, with the module behind `wanted` imported and every other command a name with a help line."""
    app = typer.Typer(name="hybridlm", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                      context_settings={"help_option_names": ["-h", "--help"]})

    @app.callback()
    def root(version: bool = typer.Option(False, "--version", is_eager=True, callback=_version,
                                          help="Show the version and exit.")) -> None:
        """Train, evaluate, quantise and run hybrid language models (Gated DeltaNet + attention), Olmo Hybrid first.

        A MODEL is a GGUF file, a folder, or a repository on the Hugging Face hub, fetched and quantised once.
        """

    for panel, commands in MAP.items():
        for name, (module, line) in commands.items():
            if name != wanted:
                app.command(name, help=line, rich_help_panel=panel)(_not_loaded)
                continue
            loaded = import_module(f"hybridlm.cli.{module}")
            if hasattr(loaded, "app"):
                app.add_typer(loaded.app, name=name, help=line, rich_help_panel=panel)
            else:
                app.command(name, rich_help_panel=panel)(loaded.command)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code; what the `hybridlm` script calls."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = next((a for a in arguments if not a.startswith("-")), None)
    try:
        code = build_app(command)(args=arguments, prog_name="hybridlm", standalone_mode=False)
        _exit(code if isinstance(code, int) else 0)
    except SystemExit as stop:
        _exit(stop.code)
    except KeyboardInterrupt:
        _exit(130)
    except BrokenPipeError:  # `hybridlm ... | head`: the reader has seen enough
        _exit(1)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's own, wherever typer has it from
            _exit(wrong_usage(error))
        if type(error).__name__ == "Abort":
            _exit(130)
        line = explain(error, command)
        if line is None or os.environ.get("HYBRIDLM_DEBUG"):
            import traceback

            traceback.print_exc()
        if line is None:
            line = "this is a bug in hybridlm; please report it with the command and the lines above"
        print("error: " + " ".join(line.split()), file=sys.stderr)
        _exit(1)


def wrong_usage(error: Any) -> int:
    """One line for arguments that do not fit; the help for a group without a command."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        if message:  # typer has printed it otherwise
            print(message)
        return 0
    where = f" (see {context.command_path} --help)" if context else ""
    print(f"error: {' '.join(message.split())}{where}", file=sys.stderr)
    return int(error.exit_code)


def explain(error: Exception, command: str | None) -> str | None:
    """One sentence for an error that the user or the machine caused, or None for a bug."""
    if isinstance(error, HybridLMError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.split(".")[0]
        if missing in EXTRAS:
            return (f"`hybridlm {command}` needs {missing}, which is not installed; "
                    f'pip install "hybridlm[{EXTRAS[missing]}]"')
    if isinstance(error, MemoryError):
        return f"out of memory ({error})" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def _not_loaded() -> None:
    raise AssertionError("a command that was not asked for ran")


def _version(wanted: bool) -> None:
    if wanted:
        from hybridlm import __version__

        print(f"hybridlm {__version__}")
        raise typer.Exit


def _exit(code: int | str | None) -> None:
    """Leave without a complaint about a pipe that closed while output was still buffered."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
