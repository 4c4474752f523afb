"""Turn a GGUF file into a plain safetensors folder, once.

transformers unpacks a GGUF in 15 s at every load; the folder it saves loads in 0.2 s. The work is done by a
child process: it needs 1.5 GB that the caller gets back, and its progress bars and advice stay with it. The
folder is renamed to its name when its manifest is on the disk, so a half-written one is never loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from agentctx.memory.errors import ModelError
from agentctx.models.disk import disk_errors, no_space, private_folder
from agentctx.models.fetch import Progress, last_line
from agentctx.models.manifest import seal, sha256

DTYPE = "bfloat16"  # finer than any 4-bit source
PART = ".part"  # ends the name of a folder that is not whole


def convert(gguf: Path, target: Path, *, name: str, progress: Progress) -> None:
    """Write the model of `gguf` into the folder `target`, which must not exist.

    ModelError: `no_space`, `out_of_memory`, or `unavailable` for a file that transformers cannot read.
    """
    part = target.with_name(target.name + PART)
    progress(f"converting {name} (once)", 0, None)
    with disk_errors(target.parent):
        if part.exists():
            shutil.rmtree(part)
        private_folder(part)
    _run_child(gguf, part, name)
    with disk_errors(target.parent):
        seal(part, target, name=name, source=sha256(gguf), dtype=DTYPE)


def _run_child(gguf: Path, folder: Path, name: str) -> None:
    # -P and our own path: a file called torch.py where the user stands must not be imported.
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, "-P", "-m", __name__, str(gguf), str(folder)],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | settings,
        check=False,
    )
    if child.returncode == 0:
        return
    if "No space left" in child.stderr or "Disk quota exceeded" in child.stderr:
        raise no_space(folder.parent)
    if child.returncode == -9 or "MemoryError" in child.stderr or "can't allocate memory" in child.stderr:
        from agentctx.models.failures import out_of_memory

        raise out_of_memory(name)
    raise ModelError(
        f"{gguf} cannot be converted: {last_line(child.stderr)}", hint="is it a complete GGUF file?"
    )


def _save(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed and cannot be saved
        dtype=getattr(torch, DTYPE),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _save(Path(sys.argv[1]), Path(sys.argv[2]))
