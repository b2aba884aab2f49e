"""Model files on disk, without PyTorch: Hugging Face folders (safetensors, config.json) and GGUF, in and out.

`names.py` is the one map between canonical, Hugging Face and GGUF tensor names. `checkpoint.py` opens a folder of
safetensors, `gguf_reader.py` a GGUF file; `convert.py` makes the second from the first. Whatever they open is treated
as hostile: a damaged file is a `FormatError`, never a crash, a hang or an allocation larger than the file.
"""
