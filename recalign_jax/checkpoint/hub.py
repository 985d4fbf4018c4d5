"""Models of the Hugging Face hub, by name."""

import pathlib
import re

from recalign_jax.errors import InputError, RunError

# The weights as safetensors, and what is small. Never a pickle.
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = [
    *("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
]


def is_name(text: str) -> bool:
    """Whether a text has the form of a hub name, as `google/flan-t5-base`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def download(name: str) -> pathlib.Path:
    """Returns the local folder of a model of the hub, downloaded if the cache (HF_HOME) doesn't have it.

    Raises InputError when it can't be had, or has no safetensors; RunError where the hub is out of order or too busy.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_FILES, *TOKENIZER_FILES]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        answers = (getattr(one, "response", None) for one in (error, error.__cause__))
        statuses = [answer.status_code for answer in answers if answer is not None]
        if any(status == 429 or status >= 500 for status in statuses):
            raise RunError(f"{name}: the Hugging Face hub doesn't give it now: {reason} Try again.") from None
        raise InputError(
            f"{name}: no folder of this name here, and it can't be had from the Hugging Face hub: {reason} "
            f"Is the name right? Without a network, download it where there is one (hf download {name}) and copy the "
            "cache (~/.cache/huggingface, or HF_HOME), or give the path of its folder."
        ) from None
    if not any(folder.glob("*.safetensors*")):
        here = f"{name.rsplit('/', 1)[-1]}-safetensors"
        raise InputError(f"{name}: the hub has no safetensors of it. {pickle_advice(name, here)} and give {here}.")
    return folder


def pickle_advice(source: str, target: str) -> str:
    """What to do about weights that may be in a pickle only; `source` is a hub name or a folder."""
    return (
        "A .bin file is a pickle, which can run code when it is read, so it is not. Convert it where you trust it: "
        'python -c "from transformers import T5ForConditionalGeneration as T; '
        f"T.from_pretrained('{source}').save_pretrained('{target}')\""
    )
