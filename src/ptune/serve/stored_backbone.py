"""A backbone by its files alone: settings, tokenizer, and rows of its input matrix as they are asked for.

No weight is loaded: the matrix stays on disk, and of it those pages are read that hold the rows. Knows no requests.
Shapes: T tokens, H width, V rows of the input matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from ptune.errors import BackboneError
from ptune.families import CAUSAL, Kind, kind_of
from ptune.pretrained.fingerprint import fingerprint, same_backbone, sampled_ids
from ptune.pretrained.loading import check_folder, check_tokenizer, first_position
from ptune.pretrained.stored_tensors import FLOATS, TensorFile, names_of, shards_of, source_folder, stored_name
from ptune.prompts.virtual_tokens import input_embedding, input_matrix

_MEND = "merge its soft prompts by ptune merge, and serve the merged model"


class StoredBackbone:
    """A causal language model in a folder.

    Attributes:
        name: as the user called it.
        folder: where its files are.
        tokenizer: its own.
        kind: of the model.
        vocabulary_size: V.
        hidden_size: H.
        context_limit: positions that it has; None for no limit.
    """

    kind: Kind = CAUSAL

    def __init__(self, name: str) -> None:
        """Find the input matrix of a model: a folder, a name of the Hub, or "mini".

        Raises:
            BackboneError: there is no such model, or it is not causal; its files lack the matrix under its own name,
                or have it quantised; or the family scales embeddings.
        """
        if name != "mini":
            check_folder(name)
        self.name, self.folder = name, source_folder(name)
        try:
            config = AutoConfig.from_pretrained(self.folder)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
            if kind_of(config) is not CAUSAL:
                raise ValueError(f"it is {kind_of(config).words}, and engines such as vLLM let causal ones write")
            with torch.device("meta"):  # its shape alone
                model = CAUSAL.auto_class.from_config(config)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BackboneError(f'cannot serve "{name}" by embeddings: {reason}') from error
        if type(input_embedding(model)) is not nn.Embedding:
            raise BackboneError(
                f'{type(model).__name__} ("{name}") scales its embeddings, which are sent here as they are stored; '
                f"{_MEND}"
            )
        self._matrix = self._find(model)  # [V, H], on disk
        self.vocabulary_size, self.hidden_size = self._matrix.shape
        check_tokenizer(self.tokenizer, self.vocabulary_size, CAUSAL, name)
        limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.context_limit = None if limit is None else limit - first_position(model)
        sampled = self.rows(sampled_ids(self.vocabulary_size).tolist())
        self._fingerprint = fingerprint(CAUSAL.name, config.get_text_config(), sampled, sampled.float())

    @property
    def dtype(self) -> torch.dtype:
        """That the matrix is stored in."""
        return self._matrix.dtype

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return what the input embedding gives for ids below V, ``[T, H]`` in the stored dtype."""
        return self._matrix[torch.tensor(ids, dtype=torch.long)]

    def matches(self, other: dict[str, object]) -> bool:
        """Whether a fingerprint is this backbone's, to the rounding of half precision."""
        return same_backbone(self._fingerprint, other)

    def _find(self, model: nn.Module) -> Tensor:
        shards = shards_of(self.folder)
        names = names_of(model, input_matrix(model))
        stored = stored_name(shards, names, str(model.base_model_prefix))
        if stored is None:
            raise BackboneError(f'the files of "{self.name}" have no input matrix called {names[0]}; {_MEND}')
        file = TensorFile.open(self.folder / shards[stored])
        dtype = file.entries[stored]["dtype"]
        if dtype not in FLOATS:
            raise BackboneError(
                f'the matrix {stored} of "{self.name}" is quantised ({dtype}); serve the model in bfloat16, float16 or '
                "float32"
            )
        return file.mapped(stored)
