"""What a run is made of, kept in its folder, so that it can be told, published and run again from itself.

    OUT/recipe.json     every setting and the architecture; versions, git revision, fingerprints of text and tokenizer
    OUT/starts.jsonl    one line for each time it was started: when, on how many processes, on what, with which versions

`hybridlm train --from OUT out=NEW` reads the first of them. Nothing here names the machine or its user.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

import hybridlm
from hybridlm.atomic import write_file
from hybridlm.config import HybridConfig
from hybridlm.errors import ConfigError, DataError
from hybridlm.train.recipe import Recipe
from hybridlm.train.start import tokenizer_of

__all__ = ["fingerprints", "git_revision", "note_start", "read_recipe", "resolve_init", "versions", "write_recipe"]


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"hybridlm": hybridlm.__version__, "torch": torch.__version__, "python": platform.python_version()}


def git_revision(folder: Path | None = None) -> str:
    """The commit that the package (or `folder`) is a checkout of, "+" behind it when files differ; else ""."""
    where = folder or Path(hybridlm.__file__).parent
    if not folder and "site-packages" in where.parts:
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def fingerprints(out: Path) -> dict[str, dict[str, str]]:
    """Of the text of each split's folder: source, tokenizer, and the hash over all documents."""
    found = {}
    for name in ("tokens", "tokens-val"):
        for file in sorted((out / name).glob("**/manifest.json")):
            held = json.loads(file.read_text(encoding="utf-8"))
            found[file.parent.relative_to(out).as_posix()] = {
                key: held[key] for key in ("source", "tokenizer", "content") if key in held}
    return found


def write_recipe(recipe: Recipe, out: Path, *, unique_tokens: int, init: str = "") -> None:
    """OUT/recipe.json. `init`: as it was given, where `recipe` holds what it was resolved to."""
    write_file(out / "recipe.json", json.dumps({
        **recipe.to_dict(), "init": init or recipe.init, "recipe": recipe.name, "unique_tokens": unique_tokens,
        "versions": versions(), "git": git_revision(), "data_fingerprints": fingerprints(out)}, indent=1).encode())


def note_start(out: Path, *, world: int, device: torch.device) -> None:
    """One more line of OUT/starts.jsonl."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "processes": world, "device": name,
            "versions": versions(), "git": git_revision()}
    with (out / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run's folder, to run it again: its text and its own tokenizer, `out` left open.

    Settings that this version does not know are refused, as they would be lost.
    """
    file = run / "recipe.json"
    try:
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        values = {f.name: held[f.name] for f in fields(Recipe) if f.name in held}
        values["model"] = HybridConfig.from_dict(held["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read as a run's recipe ({error}); give a folder that hybridlm train "
                        "wrote") from None
    unknown = sorted(set(held) - set(values) - {"recipe", "unique_tokens", "versions", "git", "data_fingerprints"})
    if unknown:
        raise ConfigError(f"{file}: {unknown[0]}: not a setting of this version; train with the version that wrote it, "
                          f"{held.get('versions', {}).get('hybridlm', 'unknown')}")
    tokenizer = run / "tokenizer"
    return replace(Recipe(**values), out="", name=str(held.get("recipe", "")) or run.name,
                   tokenizer=str(tokenizer) if (tokenizer / "tokenizer.json").is_file() else values["tokenizer"])


def resolve_init(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with `init` as a folder of this machine, and its tokenizer where none is asked for.

    A repository on the hub is fetched once; OUT/init.json remembers where to, so that going on needs no network.
    """
    if not recipe.init:
        return recipe
    folder = Path(recipe.init).expanduser()
    if not folder.is_dir():
        folder = _fetched(recipe.init, out / "init.json")
    if not recipe.tokenizer:
        found = tokenizer_of(folder)
        recipe = replace(recipe, tokenizer=str(found)) if found else recipe
    return replace(recipe, init=str(folder))


def _fetched(name: str, note: Path) -> Path:
    from hybridlm.store import weights

    if note.is_file():
        held = json.loads(note.read_text(encoding="utf-8"))
        if held["init"] == name and (Path(held["folder"]) / "config.json").is_file():
            return Path(held["folder"])
    folder = weights(name)
    write_file(note, json.dumps({"init": name, "folder": str(folder.resolve())}).encode())
    return folder
