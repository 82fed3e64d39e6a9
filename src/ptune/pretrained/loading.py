"""Loads a model with its tokenizer, and looks before at its folder, tokenizer, device and quantisation.

Each is refused in a sentence before transformers would fail in a page. Knows nothing of virtual tokens or tasks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptune.config.run import ModelConfig
from ptune.errors import BackboneError
from ptune.families import MASKED, Kind, kind_of
from ptune.files import missing_file
from ptune.pretrained.precision import precision_for
from ptune.pretrained.quantization import quantize

MINI = Path(__file__).parents[1] / "mini"
"""Folder of `ptune-mini`, the model that comes with ptune."""


def load_model(config: ModelConfig, *, on_processor: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or the Hub, onto their device; ``mini`` is the model that ptune has.

    Args:
        config: the settings.
        on_processor: leave the model on the processor, in the dtype that it would have on its device.

    Raises:
        BackboneError: neither a model folder nor reachable on the Hub, no language model, or it cannot be quantised so.
        MissingExtraError: what quantises it is not installed.
    """
    source = str(MINI) if config.name == "mini" else config.name
    check_folder(source)
    device = find_device(config.device)
    arguments: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    rounded = config.quantization if isinstance(config.quantization, str) and device.type == "cpu" else None
    settings = None if rounded else quantization_settings(config.quantization, device)
    try:
        model_config = AutoConfig.from_pretrained(source, **arguments)
        kind = kind_of(model_config)
        dtype = precision_for(config.dtype, device, model_config.get_text_config().hidden_size).dtype
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
        if config.attn_implementation:
            arguments["attn_implementation"] = config.attn_implementation
        if settings:
            arguments["quantization_config"] = quantization_config(settings)
        model = kind.auto_class.from_pretrained(source, dtype=dtype, **arguments)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BackboneError(f'cannot load "{config.name}" as a language model: {reason}') from error
    if not settings and not on_processor:
        model = model.to(device)
    if rounded:
        quantize(model.requires_grad_(False), rounded, config.name)
    return model, tokenizer


def first_position(model: PreTrainedModel) -> int:
    """Return the position of the first token: RoBERTa's matrix of positions begins with a row for pads."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, kind: Kind, name: str) -> None:
    """See that a tokenizer has what the kind of model needs, and give it a pad token where it has none.

    Raises:
        BackboneError: it has no end or mask token, or more tokens than the matrix has rows.
    """
    if kind.generates and tokenizer.eos_token_id is None:
        raise BackboneError(
            f'the tokenizer of "{name}" has no end token, so answers would never stop; '
            "set eos_token in its tokenizer_config.json"
        )
    if kind is MASKED and tokenizer.mask_token_id is None:
        raise BackboneError(
            f'"{name}" is a masked language model and its tokenizer has no mask token to stand for the answer; '
            "set mask_token in its tokenizer_config.json"
        )
    if len(tokenizer) > vocabulary_size:
        raise BackboneError(
            f'the tokenizer of "{name}" has {len(tokenizer)} tokens and the model\'s input matrix only '
            f"{vocabulary_size} rows; resize the model's embeddings or take the tokenizer that belongs to it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # as the ecosystem does; the mask, not the id, says what is a pad


def check_folder(source: str) -> None:
    """Say early that a folder is missing, before a Hub look-up makes it a network error.

    Raises:
        BackboneError: ``source`` looks like a path and is none, or is a folder without a config.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(f'"{source}" is no model folder: it has no config.json')
    elif path.exists():
        raise BackboneError(f'"{source}" is a file; the model is given as its folder')
    elif path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise BackboneError(missing_file(path, "model folder"))
    elif source.count("/") == 0 and os.environ.get("HF_HUB_OFFLINE") == "1":
        raise BackboneError(
            f'"{source}" is neither "mini" nor a model folder here, and the Hub is off (HF_HUB_OFFLINE=1)'
        )


def find_device(name: str) -> torch.device:
    """Return the device of that name; for "auto" the GPU, Apple's or the processor, whichever is there first.

    Raises:
        BackboneError: no such kind of device, or none of it here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch's words run over pages
            reason = str(error).splitlines()[0].rstrip(".:")
            raise BackboneError(f'there is no device "{name}" here ({reason}); choose auto or cpu') from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def quantization_settings(asked: str | dict[str, Any] | None, device: torch.device) -> dict[str, Any] | None:
    """Return keyword arguments of a transformers config for what ``model.quantization`` asks of it.

    Raises:
        BackboneError: the device has no such weights.
    """
    if isinstance(asked, dict):
        if asked.get("quant_method") == "bitsandbytes" and device.type != "cuda":
            raise BackboneError(
                f'model.quantization: bitsandbytes runs on CUDA, and the device here is "{device.type}"; on a '
                "processor choose int8 or int4, which torchao rounds"
            )
        return asked
    if asked is None:
        return None
    if device.type != "cuda":
        raise BackboneError(
            f"model.quantization {asked} runs on a processor by torchao or on CUDA by bitsandbytes, and the device "
            f'here is "{device.type}"; set model.device to cpu, or leave it out'
        )
    if asked == "int8":
        return {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}


def quantization_config(settings: dict[str, Any]) -> Any:
    """Return transformers' quantisation config for keyword arguments with their ``quant_method``."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(settings))
