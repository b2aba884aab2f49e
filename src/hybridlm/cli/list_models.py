"""`hybridlm list`: the models that are here."""

from __future__ import annotations

from datetime import datetime

from hybridlm.cli._common import JsonOption, note, print_json, size


def command(json: JsonOption = False) -> None:
    """Show the models in the store, their sizes, and the aliases."""
    from hybridlm.store import home
    from hybridlm.store.catalogue import aliases, entries

    found, names = entries(), aliases()
    if json:
        print_json({"home": home(), "aliases": names, "models": [
            {"name": e.name, "path": e.path, "bytes": e.nbytes, "modified": e.modified} for e in found]})
        return
    if not found and not names:
        note(f"Nothing is in {home()} yet; hybridlm pull OWNER/NAME fetches a model.")
        return
    width = max(len(text) for text in ("NAME", *(e.name for e in found), *names))
    print(f"{'NAME':<{width}}  {'SIZE':>9}  MODIFIED")
    for entry in found:
        when = datetime.fromtimestamp(entry.modified)
        print(f"{entry.name:<{width}}  {size(entry.nbytes):>9}  {when:%Y-%m-%d %H:%M}")
    for name, model in sorted(names.items()):
        print(f"{name:<{width}}  {'':>9}  stands for {model}")
    different = {e.path: e.nbytes for e in found}
    note(f"{size(sum(different.values()))} in {home()}")
