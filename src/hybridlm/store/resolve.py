"""`resolve`: a MODEL as people name it -> a GGUF file that the engine opens.

A GGUF file is itself. A Hugging Face folder is converted once. A hub repository, OWNER/NAME[@REVISION][:TYPE], is
fetched and converted once: a GGUF file that lies there in the wanted type is taken as it is, otherwise the safetensors
weights are converted. From then on the name opens what is in the cache, without asking the network: a model does not
change under its user, and works on a train.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import quote

from hybridlm.atomic import write_file
from hybridlm.errors import ConfigError, FormatError, HybridLMError, ModelNotFoundError
from hybridlm.store import hub
from hybridlm.store.cache import Report, fingerprint, home, locked, require_space
from hybridlm.store.catalogue import aliases

__all__ = ["DEFAULT_LIMIT", "default_type", "resolve", "weights"]

# Models of fewer parameters are converted to q8_0, larger ones to q4_m, where no type is asked for.
DEFAULT_LIMIT = 1_500_000_000

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TYPE = re.compile(r"(?:f|bf|i?q|t?q|mxfp)\d\w*", re.ASCII | re.IGNORECASE)
_GGUF_TYPE = re.compile(r"(?:^|[-_.])((?:f|bf|i?q|tq|mxfp)\d\w*)\.gguf$", re.IGNORECASE)
# GGUF files that serve where no type is asked for, the best first: instead of converting, and where there is no choice.
_AS_GOOD = {"q8_0": ("q8_0",), "q4_m": ("q4_m", "q4_k_m", "q4_k", "q4_s", "q4_k_s", "iq4_nl", "q4_0")}
_PREFERRED = (*_AS_GOOD["q4_m"], "q8_0", "q5_m", "q5_k_m", "q6_m", "q6_k", "bf16", "f16", "f32")

# What a conversion reads besides weights.
_SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
          "special_tokens_map.json", "added_tokens.json")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def resolve(name_or_path: str | Path, *, type: str | None = None, progress: Report | None = None,
            update: bool = False) -> Path:
    """The GGUF file that a name stands for, made if need be.

    Args:
        name_or_path: a GGUF file; a folder with config.json and safetensors; OWNER/NAME[@REVISION][:TYPE]; or an alias.
        type: of the converted weights ("q8_0", "q4_m", ...), as :TYPE in the name; None is `default_type`.
        progress: called with a stage and how far it is, in bytes.
        update: ask the hub again although the name is in the cache.

    Raises `ModelNotFoundError` for a name that stands for nothing or cannot be fetched now, `FormatError` for files
    that are no model, `HybridLMError` where the disk is full or cannot be written.
    """
    text, report = str(name_or_path), progress or _silent
    path = Path(text).expanduser()
    if path.is_file():
        return _file(path)
    if not path.exists():
        text = aliases().get(text, text)
        path = Path(text).expanduser()
        if path.is_file():
            return _file(path)
    if not path.is_dir() and ":" in text:
        text, asked = text.rsplit(":", 1)
        if not _TYPE.fullmatch(asked):
            raise ModelNotFoundError(f"{name_or_path}: no such file, and {asked!r} is no type of weights; a name is "
                                     "OWNER/NAME[@REVISION][:TYPE], for instance owner/name:q8_0")
        type, path = type or asked, Path(text).expanduser()
    type = type.lower() if type else None
    if path.is_dir():
        return _folder(path, type, report)
    return _repository(*_split_id(text), type, report, update)


def weights(name_or_path: str | Path, *, progress: Report | None = None) -> Path:
    """The folder of a model as Hugging Face stores it: itself, or that of a hub repository, fetched whole."""
    text, report = str(name_or_path), progress or _silent
    path = Path(text).expanduser()
    if path.is_dir():
        return path if (path / "config.json").is_file() or not (path / "hf").is_dir() else path / "hf"
    repo_id, revision = _split_id(text)
    root = home() / "hub" / repo_id.replace("/", "--")
    with locked(root / ".lock", report):
        report(f"looking up {repo_id}", 0, 0)
        found = hub.look_up(repo_id, revision)
        small, _, folder = _look_in(found, root)
        _parameters(folder)
        return _fetch_weights(found, small, folder, 0, found.id, report)


def default_type(parameters: int) -> str:
    """The type that a model of this size is converted to unless told: the best that a laptop still runs well."""
    return "q8_0" if parameters < DEFAULT_LIMIT else "q4_m"


def _split_id(text: str) -> tuple[str, str | None]:
    """OWNER/NAME[@REVISION] in its parts."""
    repo_id, _, revision = text.partition("@")
    if Path(text).suffix.lower() in (".gguf", ".safetensors", ".json") or not _ID.fullmatch(repo_id):
        raise ModelNotFoundError(f"{text}: no such file or folder; a model on the hub is named OWNER/NAME")
    return repo_id, revision or None


def _file(path: Path) -> Path:
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise FormatError(f"{path}: give the folder it lies in, {path.parent}, which is converted as a whole")
    return path


# -- a folder here ---------------------------------------------------------------------------------------------------


def _folder(path: Path, type: str | None, report: Report) -> Path:
    if not (path / "config.json").is_file():
        ready = _choose({file.name for file in path.glob("*.gguf")}, type)
        if ready:
            return path / ready
        if (path / "hf" / "config.json").is_file():  # the folder of a training run
            return _folder(path / "hf", type, report)
        raise FormatError(f"{path}: holds neither a GGUF file{f' of type {type}' if type else ''} nor a model as "
                          "Hugging Face stores it (config.json and safetensors)")
    names = [name for name in _SMALL if (path / name).is_file()] + _weights(path, {f.name for f in path.iterdir()})
    kind = _checked(type or default_type(_parameters(path)))
    place = path.resolve()
    kept = home() / "folders" / f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    with locked(kept / ".lock", report):
        out = kept / f"{place.name}-{kind}-{fingerprint(path, names)}.gguf"
        if not out.is_file():
            require_space(kept, _size(path, kind), f"{path} as {kind}")
            _convert(path, out, kind, report, place.name)
            for old in kept.glob(f"*-{kind}-*.gguf"):  # of the folder as it was before
                if old != out:
                    with contextlib.suppress(OSError):  # Windows keeps what somebody has open
                        old.unlink()
    return out


# -- a repository on the hub -----------------------------------------------------------------------------------------


def _repository(repo_id: str, revision: str | None, type: str | None, report: Report, update: bool) -> Path:
    root = home() / "hub" / repo_id.replace("/", "--")
    note = root / "refs" / (quote(revision or "main", safe="") + (f".{type}" if type else "") + ".json")
    if not update and (known := _read_note(note, root)):
        return known
    with locked(root / ".lock", report):
        if not update and (known := _read_note(note, root)):  # another process was quicker
            return known
        report(f"looking up {repo_id}", 0, 0)
        found = hub.look_up(repo_id, revision)
        path = _obtain(found, root, type, report)
        _write_note(note, {"commit": found.commit, "file": path.relative_to(root).as_posix()})
        return path


def _obtain(found: hub.Repository, root: Path, type: str | None, report: Report) -> Path:
    """A ready file of the repository, or one converted from its weights."""
    files = set(found.files)
    has_weights = "config.json" in files and bool(files & {_INDEX, _SINGLE})
    if not has_weights or (type and _choose(files, type)):
        ready = _choose(files, type)
        if ready is None:
            offered = sorted(k for k in map(_type_of_name, files) if k)
            has = f"GGUF files of type {', '.join(offered)}" if offered else "no safetensors weights and no GGUF file"
            raise FormatError(f"{found.id}: the repository has {has}"
                              + (f", so {type} cannot be had from it" if type and offered else ""))
        return _fetch_ready(found, ready, root, report)

    small, key, folder = _look_in(found, root)
    kind = type or default_type(_parameters(folder))  # what cannot be run is refused before 15 GB have come
    if not type and (ready := next(filter(None, (_choose(files, t) for t in _AS_GOOD[kind])), None)):
        return _fetch_ready(found, ready, root, report)
    out = root / f"{found.id.split('/')[1]}-{_checked(kind)}-{key}.gguf"
    if out.is_file():
        return out
    source = _fetch_weights(found, small, folder, _size(folder, kind), f"{found.id} as {kind}", report)
    _convert(source, out, kind, report, found.id.split("/")[1])
    _after(folder, report)
    return out


def _look_in(found: hub.Repository, root: Path) -> tuple[list[str], str, Path]:
    """Fetch what is small: those names, the key of all that a conversion reads, and the folder for it.

    The key is of the content, not of the commit: one that only changes the README costs nothing.
    """
    small = [name for name in (*_SMALL, _INDEX) if name in found.files]
    key = _key(found, [*small, *(name for name in found.files if name.endswith(".safetensors"))])
    folder = root / "downloads" / key
    hub.fetch(found, small, folder, _silent)
    return small, key, folder


def _fetch_weights(found: hub.Repository, small: list[str], folder: Path, room: int, what: str, report: Report) -> Path:
    """The folder that holds all of the model, once it does; `room` bytes besides are to fit on the disk."""
    names = list(dict.fromkeys([*small, *_weights(folder, set(found.files))]))
    absent = next((name for name in names if name not in found.files), None)
    if absent:
        raise FormatError(f"{found.id}: its index names {absent}, which the repository does not hold")
    if source := _from_hub_cache(found, names):
        require_space(folder, room, what)
        return source
    to_come = hub.missing_bytes(found, names, folder)
    require_space(folder, to_come + room, what)
    if to_come > 1e8:
        report(f"{found.id}: {to_come / 1e9:.1f} GB to download, into {home()}", 0, 0)
    hub.fetch(found, names, folder, report)
    return folder


def _fetch_ready(found: hub.Repository, name: str, root: Path, report: Report) -> Path:
    folder = root / "files" / _key(found, [name])
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, hub.missing_bytes(found, [name], folder), f"{found.id}, {name}")
    hub.fetch(found, [name], folder, report)
    return folder / name


def _after(folder: Path, report: Report) -> None:
    """What happens to downloaded weights once converted: they stay, for other types, unless told otherwise."""
    if not folder.is_dir():
        return
    if os.environ.get("HYBRIDLM_FREE_DOWNLOADS", "") not in ("", "0"):
        shutil.rmtree(folder, ignore_errors=True)
        return
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if size > 1e9:
        report(f"{size / 1e9:.1f} GB of downloaded weights stay in {folder} for other types; delete that folder, or "
               "set HYBRIDLM_FREE_DOWNLOADS=1, to have the space back", 0, 0)


def _from_hub_cache(found: hub.Repository, names: list[str]) -> Path | None:
    """The folder where other tools (transformers) have left this very commit, if it is complete."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(found.id, name, revision=found.commit) for name in names]
    if not all(isinstance(p, str) and Path(p).stat().st_size == found.files[n].size
               for p, n in zip(paths, names, strict=True)):
        return None
    return Path(str(paths[names.index("config.json")])).parent


def _key(found: hub.Repository, names: list[str]) -> str:
    """Of the content of files, as the hub states it."""
    text = "\n".join(f"{name} {found.files[name].digest}" for name in sorted(names))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_note(note: Path, root: Path) -> Path | None:
    try:
        path = root / json.loads(note.read_text(encoding="utf-8"))["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path.is_file() else None


def _write_note(note: Path, content: dict[str, str]) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    write_file(note, (json.dumps(content) + "\n").encode())


# -- what files are for ----------------------------------------------------------------------------------------------


def _weights(folder: Path, files: set[str]) -> list[str]:
    """The names of the index and the shards it lists, or of the single file."""
    if _INDEX in files:
        try:
            table = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(table.values()))
            if not shards or not all(isinstance(s, str) and Path(s).name == s for s in shards):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise FormatError(f"{folder / _INDEX}: not an index of safetensors files; download it again") from None
        return [_INDEX, *shards]
    if _SINGLE in files:
        return [_SINGLE]
    raise FormatError(f"{folder}: has a config.json but no {_SINGLE} or {_INDEX} beside it")


def _choose(names: set[str], type: str | None) -> str | None:
    """The GGUF file of a type among names; without a type the only one, or that of the most wanted type."""
    whole = [n for n in sorted(names) if n.lower().endswith(".gguf") and "mmproj" not in n.lower()
             and not re.search(r"-\d{5}-of-\d{5}\.gguf$", n)]
    if type:
        return next((n for n in whole if _type_of_name(n) == type), None)
    for wanted in _PREFERRED:
        if match := next((n for n in whole if _type_of_name(n) == wanted), None):
            return match
    return whole[0] if whole else None


def _type_of_name(name: str) -> str | None:
    """The type that a GGUF file's name ends in: "Olmo-Hybrid-7B-Q4_0.gguf" -> "q4_0"."""
    match = _GGUF_TYPE.search(name)
    return match[1].lower() if match else None


def _parameters(folder: Path) -> int:
    from hybridlm.config import HybridConfig

    try:
        return HybridConfig.from_pretrained(folder).num_parameters()
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


def _checked(type: str) -> str:
    """The type, if it is one that weights can be converted to."""
    from hybridlm.formats.convert import TYPES as known

    if type not in known:
        raise HybridLMError(f"type: {type!r} is not one that models are converted to; known are {', '.join(known)}")
    return type


def _size(folder: Path, type: str) -> int:
    """Bytes that the converted file will have, roughly."""
    from hybridlm.formats.blocks import SIZES
    from hybridlm.formats.policy import base_type, recipe

    elements, nbytes = SIZES[base_type(recipe(type))]
    return int(_parameters(folder) * nbytes / elements * 1.1) + (16 << 20)


def _convert(source: Path, out: Path, type: str, report: Report, name: str) -> None:
    from hybridlm.formats.convert import convert

    out.parent.mkdir(parents=True, exist_ok=True)
    convert(source, out, type, lambda done, total, *_: report(f"converting to {type}", done, total), name=name)


def _silent(stage: str, done: int, total: int) -> None:
    pass
