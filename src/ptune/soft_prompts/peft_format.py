"""PEFT's adapter pair on disk, written and read without PEFT: ``adapter_config.json``, ``adapter_model.safetensors``.

PEFT stores a P-tuning or prompt-tuning adapter folded, in training checkpoints as well: one tensor
``prompt_embeddings`` ``[P, H]``, what the encoder gave when it was saved, and never the encoder's own weights. So
either way rows are all there is. PEFT sets them before everything else, bos included, and passes no position ids.

Knows nothing of soft prompts, templates, tasks or backbones. Shapes: P virtual tokens, H width, W as in
`keys_and_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptune.errors import SoftPromptError
from ptune.files import missing_file, read_json, read_tensors, write_json, write_tensors
from ptune.prompts.keys_and_values import KeyValueShape

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
_ADAPTER_PICKLE = "adapter_model.bin"
_KEY = "prompt_embeddings"
_ENCODER_FIELDS = ("encoder_dropout", "encoder_num_layers", "encoder_reparameterization_type")
_READABLE_TYPES = ("P_TUNING", "PROMPT_TUNING", "PREFIX_TUNING")


def write_peft_adapter(
    folder: str | Path,
    rows: Tensor,
    *,
    base_model: str | None,
    num_layers: int | None,
    num_attention_heads: int | None,
    task_type: str = "CAUSAL_LM",
    deep: KeyValueShape | None = None,
) -> None:
    """Write the pair that ``PeftModel.from_pretrained(model, folder)`` of PEFT 0.18 and later reads.

    The encoder's fields hold PEFT's defaults: they describe what is not in the file, and in inference mode nobody reads
    them. ``peft_version`` is left to PEFT, for no PEFT wrote this.

    Args:
        folder: where; made where absent.
        rows: ``[P, H]``, or ``[P, W]`` of a deep prompt, of any float dtype, stored as float32.
        base_model: name by which PEFT's Auto classes load the model; None where there is none that others know.
        num_layers: of the model; PEFT asks the model where it is None.
        num_attention_heads: of the model; likewise.
        task_type: ``CAUSAL_LM`` or ``SEQ_2_SEQ_LM``, where the rows stand in the encoder's input.
        deep: how keys and values lie in the rows of a deep prompt, which is PEFT's prefix tuning.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    count, width = rows.shape
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": width,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": count,
        "peft_type": "P_TUNING",
        "revision": None,
        "task_type": task_type,
        "token_dim": width,
    }
    if deep is not None:
        config = {name: value for name, value in config.items() if name not in _ENCODER_FIELDS}
        config |= {
            "encoder_hidden_size": deep.heads * deep.head_width,
            "init_weights": None,
            "num_attention_heads": deep.heads,
            "num_layers": deep.layers,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "token_dim": deep.heads * deep.head_width,
        }
    write_tensors(folder / ADAPTER_TENSORS, {_KEY: rows.detach().float()}, {"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, config)


def shape_of_adapter(config: Mapping[str, Any]) -> KeyValueShape | None:
    """Return how keys and values lie in the rows of a prefix-tuning adapter; None for other adapters.

    Raises:
        SoftPromptError: its config does not say.
    """
    if config.get("peft_type") != "PREFIX_TUNING":
        return None
    names = ("num_layers", "num_attention_heads", "token_dim")
    layers, heads, width = (config.get(name) or 0 for name in names)
    if not all(type(number) is int and number > 0 for number in (layers, heads, width)):
        raise SoftPromptError(
            f"{ADAPTER_CONFIG} of prefix tuning expected {', '.join(names)}, and holds {layers}, {heads}, {width}; "
            "load the adapter in PEFT and save it again, which writes them"
        )
    return KeyValueShape(layers, heads, width // heads)


def remove_peft_adapter(folder: str | Path) -> None:
    """Remove the pair from ``folder``, where there is one: the config first, without which PEFT reads nothing."""
    for name in (ADAPTER_CONFIG, ADAPTER_TENSORS):
        (Path(folder) / name).unlink(missing_ok=True)


def read_peft_adapter(folder: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Return the virtual tokens ``[P, H]`` float32 of an adapter that PEFT saved, and its config.

    Those of prefix tuning are keys and values, ``[P, W]``; `shape_of_adapter` says how they lie in a row.

    P-tuning (MLP or LSTM), prompt tuning and prefix tuning for causal language models; a finished adapter and a
    checkpoint of a training run hold the same.

    Raises:
        SoftPromptError: no such folder, no adapter in it, one of another type or for another kind of model, one that
            is stored by pickle alone, damaged, or that trained more than virtual tokens.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / ADAPTER_TENSORS
    if not path.is_file() and (folder / _ADAPTER_PICKLE).is_file():
        raise SoftPromptError(
            f'"{folder}" holds its tensors as {_ADAPTER_PICKLE} only, and ptune never unpickles; load it in PEFT and '
            f"save it again, model.save_pretrained(folder), which writes {ADAPTER_TENSORS}"
        )
    tensors = read_tensors(path, SoftPromptError)
    _check_keys(path, tensors)
    rows = tensors[_KEY]
    deep = shape_of_adapter(config)
    expected = (config.get("num_virtual_tokens"), config.get("token_dim") if deep is None else deep.row_width)
    if tuple(rows.shape) != expected:
        raise SoftPromptError(
            f'"{path}" expected {_KEY} of shape {list(expected)} (num_virtual_tokens, token_dim of {ADAPTER_CONFIG}) '
            f"and holds {list(rows.shape)}; the two files belong to different adapters, so copy both again"
        )
    if not rows.is_floating_point() or not torch.isfinite(rows).all():
        raise SoftPromptError(
            f'"{path}" expected finite numbers and holds some that are not; its training diverged, so take an '
            "earlier checkpoint"
        )
    return rows.float(), config


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise SoftPromptError(missing_file(folder, "adapter folder"))
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        within = sorted(p.parent.name for p in folder.glob(f"*/{ADAPTER_CONFIG}"))
        mend = (
            f"name one of the adapters in it: {', '.join(within)}" if within else "name the folder that PEFT saved to"
        )
        raise SoftPromptError(f'"{folder}" is no PEFT adapter: it has no {ADAPTER_CONFIG}; {mend}')
    config = read_json(path, SoftPromptError)
    if not isinstance(config, dict):
        raise SoftPromptError(f'"{path}" expected a JSON object and holds {type(config).__name__}; copy it again')
    kind, task_type = config.get("peft_type"), config.get("task_type")
    if kind not in _READABLE_TYPES:
        raise SoftPromptError(
            f'"{folder}" is an adapter of type {kind}, and only virtual tokens can be imported: '
            f"{', '.join(_READABLE_TYPES[:-1])} or {_READABLE_TYPES[-1]}"
        )
    if task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise SoftPromptError(
            f'"{folder}" is an adapter for task_type {task_type}, which trains a head that a soft prompt cannot carry; '
            "import one of task_type CAUSAL_LM or SEQ_2_SEQ_LM"
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise SoftPromptError(
            f'"{folder}" has virtual tokens in the decoder as well, where ptune sets none; train it with '
            "num_transformer_submodules=1"
        )
    return config


def _check_keys(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse an adapter of which something would be left behind.

    Raises:
        SoftPromptError: there are no folded rows, or there is more than them.
    """
    others = sorted(set(tensors) - {_KEY})
    if _KEY not in tensors:
        raise SoftPromptError(
            f'"{path}" expected the tensor {_KEY} and holds {", ".join(others[:3]) or "none"}; load the model in PEFT '
            "and save it by model.save_pretrained(folder), which folds the encoder into that tensor"
        )
    if others:
        raise SoftPromptError(
            f'"{path}" holds {", ".join(others[:3])} beside {_KEY}: modules_to_save trained more than virtual tokens, '
            "which a soft prompt cannot carry; train it again without modules_to_save"
        )
