"""The tokenizer of a merged model: a special token for each virtual token, and a chat template.

A tokenizer gives an added token the next id after its own length, which may be less than the model's matrix has rows:
then virtual tokens take over rows that no token had. So ids are asked of the tokenizer, never computed.

Knows tokenizers' files, and nothing of models or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptune.errors import BackboneError
from ptune.files import read_json, write_json, write_text

_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def token_names(mark: str, count: int) -> list[str]:
    """Return the names of ``count`` virtual tokens, all of which begin with ``mark``."""
    return [f"{mark}:{number}|>" for number in range(count)]


def add_tokens(folder: Path, names: Sequence[str]) -> list[int]:
    """Give the tokenizer in ``folder`` special tokens of these names, and return their ids.

    Raises:
        BackboneError: the tokenizer does not keep them.
        OutputError: the folder cannot be written.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.add_tokens([_special(name) for name in names], special_tokens=True) != len(names):
        raise BackboneError("the tokenizer already has tokens named like the virtual ones; merge into the plain model")
    ids = [int(number) for number in tokenizer.convert_tokens_to_ids(list(names))]  # type: ignore[union-attr]
    if (folder / _TOKENIZER).is_file():
        # Its own files with what is new in them, as any version of any engine reads them; save_pretrained writes those
        # of this version of transformers.
        values = read_json(folder / _TOKENIZER, BackboneError)
        added = [{"id": number, **_flags(name)} for number, name in zip(ids, names, strict=True)]
        values["added_tokens"] = [*values.get("added_tokens", []), *added]
        write_json(folder / _TOKENIZER, values)
        config = read_json(folder / _CONFIG, BackboneError) if (folder / _CONFIG).is_file() else {}
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= {str(n): _flags(name) for n, name in zip(ids, names, strict=True)}
            write_json(folder / _CONFIG, config)
    if not _has(folder, names, ids):
        tokenizer.save_pretrained(folder)  # a class that reads its own files otherwise, or that has no tokenizer.json
        if not _has(folder, names, ids):
            raise BackboneError("the tokenizer does not give added tokens back as it got them; nothing can be merged")
    return ids


def _has(folder: Path, names: Sequence[str], ids: Sequence[int]) -> bool:
    tokenizer = load_tokenizer(folder)
    read = tokenizer("".join(names), add_special_tokens=False)["input_ids"]
    return list(read) == list(ids) == tokenizer.convert_tokens_to_ids(list(names))


def write_chat_template(folder: Path, template: str) -> None:
    """Set the chat template, in both places where engines look for it.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_text(folder / _TEMPLATE, template)
    config = read_json(folder / _CONFIG, BackboneError) if (folder / _CONFIG).is_file() else {}
    write_json(folder / _CONFIG, config | {"chat_template": template})


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in ``folder``."""
    return AutoTokenizer.from_pretrained(folder)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts before any text by itself."""
    plain, special = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (False, True))
    starts = (start for start in range(len(special)) if special[start : start + len(plain)] == plain)
    return list(special[: next(starts, 0)])


def as_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return special tokens as they are written in a text."""
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def own_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the model's own chat template; of several the default one, and None where it has none."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _flags(name: str) -> dict[str, object]:
    return {
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)
