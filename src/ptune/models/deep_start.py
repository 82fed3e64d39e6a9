"""What a deep prompt starts from: the keys and values that the backbone itself computes for the initial rows.

So an untrained deep prompt answers exactly as those words at the front would, in a model that reads from left to right.
A masked model's words also read what follows them, so there it is the keys and values of the words alone.

Knows backbones and nothing of encoders, files or training. Shapes: P virtual tokens, H width, W as in
`keys_and_values`.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ptune.errors import BackboneError, SoftPromptError
from ptune.families import takes_deep_prompts
from ptune.models.backbone import Backbone
from ptune.prompts.keys_and_values import KeyValueShape, new_cache, read_cache, rows_of

_shapes: WeakKeyDictionary[Backbone, KeyValueShape] = WeakKeyDictionary()


def keys_and_values_of(backbone: Backbone, rows: Tensor) -> tuple[Tensor, KeyValueShape]:
    """Return the keys and values ``[P, W]`` float32 of rows ``[P, H]`` that open a text, and how they lie in a row.

    Raises:
        BackboneError: the family takes no deep prompt.
    """
    check_deep_family(backbone)
    tokens = backbone.attach()
    first = tokens.allocate(len(rows))
    tokens.set_rows(first, rows.to(backbone.device))
    try:
        with torch.no_grad():
            ids = torch.arange(first, first + len(rows), device=backbone.device)[None]
            cache = new_cache([], 1)
            backbone.model(**backbone.inputs(ids, torch.ones_like(ids)), past_key_values=cache)
    finally:
        tokens.release(first)
        tokens.detach()
    values, shape = rows_of(read_cache(cache))
    return values.float(), shape


def check_deep_family(backbone: Backbone) -> None:
    """See that a backbone's family can carry a deep prompt.

    Raises:
        BackboneError: it cannot.
    """
    if not takes_deep_prompts(backbone.model.config, backbone.kind):
        raise BackboneError(
            f'"{backbone.name}" is a {type(backbone.model).__name__}, whose attention takes no keys and values from '
            "outside, or in a way that ptune does not know, so it cannot carry a deep prompt; set prompt.deep to "
            "false, or choose a model of GPT-2, BLOOM, OPT, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma, BERT, "
            "RoBERTa or ELECTRA"
        )


def key_value_shape(backbone: Backbone) -> KeyValueShape | None:
    """Return how a backbone's keys and values lie in a row; None where its family takes no deep prompt.

    The first call runs the model on a word; later ones look up what that gave, so they may come while it runs.
    """
    if not takes_deep_prompts(backbone.model.config, backbone.kind):
        return None
    if backbone not in _shapes:
        _, _shapes[backbone] = keys_and_values_of(backbone, backbone.embeddings(torch.zeros(1, dtype=torch.long)))
    return _shapes[backbone]


def check_shape(shape: KeyValueShape, backbone: Backbone) -> None:
    """See that keys and values that lie in rows as ``shape`` has it are those of a backbone.

    Raises:
        BackboneError: the family takes no deep prompt.
        SoftPromptError: its keys and values are of another shape.
    """
    check_deep_family(backbone)
    found = key_value_shape(backbone)
    if found is not None and found != shape:
        raise SoftPromptError(
            f'a deep prompt for "{backbone.name}" holds keys and values of {found.layers} layers with {found.heads} '
            f"heads {found.head_width} wide, and this one of {shape.layers} layers with {shape.heads} heads "
            f"{shape.head_width} wide; load the model that it was trained on"
        )
