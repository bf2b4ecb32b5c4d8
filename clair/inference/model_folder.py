"""A local model folder: the hash of its weights, the base of an adapter, and checks before the model is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, list_some, one_line
from clair.core.files import file_sha256, read_json

_CONTENT_FILES = re.compile(
    r".*\.safetensors$|.*\.gguf$|.*\.model$|(config|generation_config|adapter_config|tokenizer|special_tokens|added_tokens|"
    r"chat_template|vocab|merges|soft_prompt).*\.(json|jinja|txt)$"
)
SOFT_PROMPT = "soft_prompt.json"
"""The file of a model that answers for a user (clair.inference.generation.soft_prompt)."""
REMEDY = "save the model with save_pretrained"
"""What errors about a file of a model folder advise."""


def content_files(path: str | Path) -> list[Path]:
    """The files of a model folder that determine its answers: weights, configs, tokenizer, template."""
    return sorted(file for file in Path(path).iterdir() if _CONTENT_FILES.match(file.name))


def weights_identity(path: str | Path) -> str:
    """SHA-256 over the files of a model folder that determine its answers, or over a single file such as a GGUF.

    An adapter's hash includes its base: all files of it if it is a folder, else its name.
    """
    digest = hashlib.sha256()
    for file in [Path(path)] if Path(path).is_file() else content_files(path):
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    base = adapter_base(path)
    if base is not None:
        digest.update((weights_identity(base) if Path(base).is_dir() else f"hub:{base}").encode())
    return f"weights:{digest.hexdigest()}"


def adapter_base(path: str | Path) -> str | None:
    """The folder or hub name of the base model if `path` holds an adapter; None for a full model.

    Raises UserError if the adapter does not name its base, or names an adapter: itself, or another one.
    """
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        return None
    base = read_json(config, REMEDY).get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter in {path} names no base_model_name_or_path; write it into {config.name}")
    if (Path(base) / config.name).is_file():
        base_name = "itself" if Path(base).samefile(path) else f"another adapter, {base},"
        raise UserError(
            f"the adapter in {path} names {base_name} as its base; write the model's folder into {config.name}, or "
            "fold the lower adapter into its base first (apo merge)"
        )
    return str(base)


def check_model_folder(path: str | Path, role: str = "target") -> None:
    """Check that a folder holds a chat model, or an adapter of one. Raises UserError naming what is missing."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{role}: model folder {folder} does not exist; give the path of a saved transformers model")
    base = adapter_base(folder)
    if base is None:
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{role}: {folder} holds no config.json with *.safetensors; save a model with save_pretrained"
            )
        _check_chat_template(folder, role)
        return
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{role}: the adapter {folder} has no adapter_model.safetensors; only safetensors are read")
    if Path(base).is_dir():
        check_model_folder(base, role)
    elif base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(f"{role}: the base model {base} of the adapter {folder} does not exist")
    if (folder / "tokenizer_config.json").is_file():
        _check_chat_template(folder, role)


def check_user(folder: str | Path, user: Any, role: str) -> None:
    """Check that a model is used with a user if, and only if, it has a soft prompt. Raises UserError."""
    has_prompt = (Path(folder) / SOFT_PROMPT).is_file()
    if has_prompt and user is None:
        names = list_some(read_json(Path(folder) / SOFT_PROMPT, REMEDY).get("users", ()), 3)
        raise UserError(
            f"{role}: {folder} was trained with a soft prompt of its users; set {role}.user, in this process only: a "
            f"server would leave it out (users: {names or 'none by name; give a state'})"
        )
    if user is not None and not has_prompt:
        raise UserError(f"{role}: user would be ignored: {folder} has no soft prompt ({SOFT_PROMPT}); leave it out")


def unknown_variable(template: str, names: Iterable[str]) -> str | None:
    """The first of some variables that a chat template does not mention, and would ignore; None if it has all."""
    variables = set(re.findall(r"\w+", template))
    return next((name for name in names if name not in variables), None)


def check_template_variables(folder: str | Path, names: Iterable[str], role: str) -> None:
    """Check that the chat template of a model folder has all variables. Raises UserError naming the first other.

    A base on the hub is not checked.
    """
    for path in (Path(folder), Path(adapter_base(folder) or "")):
        config, file = path / "tokenizer_config.json", path / "chat_template.jinja"
        if config.is_file():
            template = (
                file.read_text("utf-8") if file.is_file() else str(read_json(config, REMEDY).get("chat_template"))
            )
            if name := unknown_variable(template, names):
                raise UserError(
                    f"{role}: chat_template_kwargs.{name} would be ignored: the chat template in {path} does not have "
                    "it; leave it out"
                )
            return


def check_remote_code(folder: str | Path, role: str) -> None:
    """Check, without running it, that a model needs no custom code (`auto_map`) to be loaded. Raises UserError."""
    file = Path(adapter_base(Path(folder)) or folder) / "config.json"
    config = read_json(file, REMEDY) if file.is_file() else {}
    if "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]  # the public mapping loads every config module

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{role}: {folder} needs custom code to be loaded ({config.get('model_type')!r} is no model type of "
            f"transformers), and it is not run; set trust_remote_code: true if you have read it"
        )


def _check_chat_template(folder: Path, role: str) -> None:
    file = folder / "tokenizer_config.json"
    config = read_json(file, REMEDY) if file.is_file() else {}
    if not config.get("chat_template") and not (folder / "chat_template.jinja").is_file():
        raise UserError(f"{role}: the tokenizer in {folder} has no chat template; use a chat model or save one with it")
    if not config.get("eos_token"):
        raise UserError(f"{role}: the tokenizer in {folder} has no end-of-turn token (eos_token): answers cannot end")


def resize_vocabulary(model: Any, adapter: Path) -> None:
    """Resize a base model's embeddings to the vocabulary of an adapter file that has embeddings of another size.

    New rows are the mean of the old ones, so that loading is deterministic; the adapter's own rows replace them.
    """
    import torch
    from safetensors import safe_open

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = tuple(f"base_model.model.{name}." for name, module in model.named_modules() if module in (embeddings, head))
    rows = set()
    with safe_open(adapter, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            if key.startswith(names) and key.endswith(".weight") and ".lora_" not in key:
                rows.add(file.get_slice(key).get_shape()[0])
    old_size = embeddings.weight.shape[0]
    if len(rows) != 1 or (new_size := rows.pop()) == old_size:
        return
    model.resize_token_embeddings(new_size, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and new_size > old_size:
                module.weight[old_size:] = module.weight[:old_size].mean(0)


def load_tokenizer(path: str | Path, setting: str) -> Any:
    """The tokenizer of a folder or of a model on the hub. Raises UserError that names the `setting`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting} {path}: no tokenizer can be loaded from it ({one_line(error)})") from error
