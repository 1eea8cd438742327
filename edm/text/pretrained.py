"""Parts of a pipeline and other folders, as diffusers and transformers open them: weights only, no code."""

import re
from pathlib import Path
from typing import Any

import torch

from edm.images.checkpoints import some
from edm.images.foreign import read_json, tell
from toy.files import UserError

MAX_LAYERS, MAX_LEVELS, MAX_SIZE = 64, 8, 2**24  # in a config: of layers, entries of a list, any number


def exists_here(name: str) -> bool:
    """False for what can be a name on the hub.  UserError if it is neither that nor a path."""
    if Path(name).exists():
        return True
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith((".tar", ".gz", ".tgz")):
        return False
    raise UserError(f"{name}: no such file or folder, nor a name on the hub (OWNER/NAME)")


def pretrained(cls: type, source: str | Path, part="", **how) -> Any:
    """cls.from_pretrained of a folder, or a hub name, in diffusers' or transformers' layout.

    A network must have all its weights, and its config may ask for no more than those.  UserError, naming the
    source, for whatever is wrong with it.
    """
    words = part.replace("_", " ") or cls.__name__
    try:
        if not issubclass(cls, torch.nn.Module):
            return cls.from_pretrained(source, subfolder=part, trust_remote_code=False, **how)
        if (config := Path(source, part, "config.json")).is_file():
            check_size(cls, config)
        model, found = cls.from_pretrained(source, subfolder=part, output_loading_info=True, **how)
        if missing := sorted(found["missing_keys"]):  # they would be made up
            raise UserError(f"missing {some(missing)}")
        if others := sorted(found["unexpected_keys"]):
            tell(f"{source}: its {words} has no use for {some(others)} of its files")
        return model.eval().requires_grad_(False)
    except Exception as error:  # damaged files can raise nearly anything, in many lines
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: its {words} cannot be loaded ({kind}{line})") from None


def check_size(cls: type, config: Path) -> None:
    """Refuse a config.json that asks for more than the files beside it hold, before any of it is made."""
    settings = read_json(config)
    check_numbers(settings)
    with torch.device("meta"):
        of_transformers = hasattr(cls, "config_class")
        network = cls(cls.config_class.from_dict(settings)) if of_transformers else cls.from_config(settings)
    asked = sum(parameter.numel() for parameter in network.parameters())
    files = [file for file in config.parent.iterdir() if file.suffix in (".safetensors", ".bin")]
    held = sum(file.stat().st_size for file in files)
    if asked > held:
        raise UserError(f"its config asks for {asked:,} numbers, but its files hold {held:,} bytes")


def check_numbers(value: Any, name="config") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            check_numbers(inner, key)
    elif isinstance(value, list):
        if len(value) > MAX_LEVELS and "block" in name:
            raise UserError(f"{name} has {len(value)} entries, more than {MAX_LEVELS}")
        for inner in value:
            check_numbers(inner, name)
    elif isinstance(value, int) and value > (most := MAX_LAYERS if "layers" in name else MAX_SIZE):
        raise UserError(f"{name} is {value}, more than {most:,}")
    elif isinstance(value, int) and value < 0 and "layers" in name:
        raise UserError(f"{name} is {value}")


def quiet() -> None:
    """Silence the libraries' own bars and warnings: what matters in them is an error here, in our words."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
