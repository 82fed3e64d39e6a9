"""The engine: one backbone in memory, any number of soft prompts, and the bare model always among the choices.

All loaded prompts stand in the backbone's one table of virtual tokens, each at its own range of ids, so using one or
another is a matter of ids and never of switching. Knows nothing of training or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ptune.backbone import Backbone
from ptune.config import ModelConfig
from ptune.errors import DataError, SoftPromptError, did_you_mean
from ptune.generation import Generated, GenerationOptions, generate
from ptune.mixed_batches import answer_together
from ptune.soft_prompt import SoftPrompt
from ptune.tasks import Assessment, Tagging, Task, task_for
from ptune.template import Template


@dataclass(frozen=True)
class LoadedPrompt:
    """A soft prompt in the engine's table: what it is, its first id, and the task bound to that id."""

    prompt: SoftPrompt
    first_virtual_id: int
    task: Task


class Engine:
    """Answers with a backbone and the soft prompts that were loaded into it.

    >>> engine = Engine("mini")                                              # doctest: +SKIP
    >>> engine.load("prompts/sentiment", name="sentiment")                   # doctest: +SKIP
    >>> engine.classify("sentiment", ["This movie was fantastic!"])          # doctest: +SKIP
    [{'label': 'positive', 'probability': 0.97, ...}]
    """

    def __init__(self, backbone: Backbone | ModelConfig | str = "mini") -> None:
        """Take a loaded backbone, or load one by its settings or name.

        Raises:
            BackboneError: it cannot be loaded.
        """
        self.backbone = backbone if isinstance(backbone, Backbone) else Backbone.load(backbone)
        self._tokens = self.backbone.attach()
        self._loaded: dict[str, LoadedPrompt] = {}

    @classmethod
    def for_prompt(cls, folder: str | Path, model: ModelConfig | str | None = None, **loading: Any) -> Engine:
        """Load a soft prompt, under the name of its folder, with the backbone that it names or another copy of it.

        Args:
            folder: the soft prompt's.
            model: another copy of its backbone; the one that it names, of the revision it was trained on, where absent.
            loading: fields of `ModelConfig` beside the name, as ``device`` and ``dtype``.

        Raises:
            SoftPromptError: the folder holds no sound soft prompt, or one of another backbone.
            BackboneError: the backbone cannot be loaded.
        """
        prompt = SoftPrompt.load(folder)
        if model is None:
            loading = {"revision": (prompt.summary.get("model") or {}).get("revision")} | loading
        if not isinstance(model, ModelConfig):
            model = ModelConfig(name=model or prompt.backbone_name)
        engine = cls(ModelConfig.model_validate(model.model_dump() | loading))
        engine.add(Path(folder).resolve().name, prompt)
        return engine

    @property
    def prompts(self) -> dict[str, LoadedPrompt]:
        """The loaded soft prompts by name."""
        return dict(self._loaded)

    def load(self, folder: str | Path, name: str | None = None) -> str:
        """Load a soft prompt from its folder and return its name: ``name``, or that of the folder.

        Raises:
            SoftPromptError: the folder holds no sound soft prompt, or one of another backbone.
        """
        name = name or Path(folder).resolve().name
        self.add(name, SoftPrompt.load(folder))
        return name

    def add(self, name: str, prompt: SoftPrompt) -> None:
        """Give a soft prompt its place in the table. One of the same name is replaced, at ids of its own.

        Raises:
            SoftPromptError: it belongs to another backbone.
        """
        prompt.check(self.backbone)
        first = self._tokens.allocate(len(prompt.rows))
        self._tokens.set_rows(first, prompt.rows.to(self.backbone.device), prompt.deep)
        task = task_for(
            self.backbone,
            prompt.task,
            Template.parse(prompt.template),
            first_virtual_id=first,
            max_length=prompt.max_length,
            overlong=prompt.overlong,
            deep=prompt.deep is not None,
            head=prompt.head,
            temperature=prompt.temperature,
        )
        self.remove(name)
        self._loaded[name] = LoadedPrompt(prompt, first, task)

    def remove(self, name: str) -> None:
        """Forget a soft prompt; its ids are never given again."""
        loaded = self._loaded.pop(name, None)
        if loaded is not None:
            self._tokens.release(loaded.first_virtual_id)

    def predict(
        self, name: str | Sequence[str], records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Return the task's answer to each record, in order: label and probabilities, tags and spans, or text.

        Args:
            name: of a soft prompt for all records, or one for each of them: their rows then share batches.
            records: the fields that the templates name.
            batch_size: rows read at once.

        Raises:
            SoftPromptError: no soft prompt of a name is loaded, or there are more or fewer names than records.
            DataError: a record lacks a field of its template.
        """
        if isinstance(name, str):
            return self._get(name).task.predict(self.backbone, records, batch_size=batch_size)
        if len(name) != len(records):
            raise SoftPromptError(f"there are {len(name)} names for {len(records)} records; give one for each")
        questions = [(self._get(one).task, record) for one, record in zip(name, records, strict=True)]
        return answer_together(self.backbone, questions, batch_size=batch_size)

    def evaluate(self, name: str, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> dict[str, float]:
        """Return the task's metrics over records with their answers.

        Raises:
            SoftPromptError: no soft prompt of that name is loaded.
            DataError: a record lacks a field of the template, or its answer.
        """
        return self.assess(name, records, batch_size=batch_size).metrics

    def assess(self, name: str, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> Assessment:
        """Return metrics as `evaluate` does, with the confusion matrix and calibration where the task has labels.

        Raises:
            SoftPromptError, DataError: as `evaluate`.
        """
        if not records:
            raise DataError("there are no records to score; give at least one")
        return self._get(name).task.assess(self.backbone, records, batch_size=batch_size)

    def classify(self, name: str, texts: Sequence[str], *, batch_size: int = 32) -> list[dict[str, Any]]:
        """Classify plain texts with a soft prompt whose template has one field.

        Raises:
            SoftPromptError: no such soft prompt, or its template has several fields: then use `predict`.
        """
        if isinstance(texts, str):
            raise DataError("classify() takes a list of texts, and got a single one; write [text]")
        fields = self._get(name).task.renderer.template.fields
        if len(fields) != 1:
            raise SoftPromptError(
                f'the template of "{name}" has the fields {", ".join(fields)}; give records to predict()'
            )
        return self.predict(name, [{fields[0]: text} for text in texts], batch_size=batch_size)

    def tag(self, name: str, texts: Sequence[str | Sequence[str]], *, batch_size: int = 32) -> list[dict[str, Any]]:
        """Tag lists of words, or texts, which are split into words, with a soft prompt whose task is tagging.

        Returns:
            For each its ``tokens``, their ``tags`` and the ``spans`` of entities; see `Tagging.predict`.

        Raises:
            SoftPromptError: no such soft prompt, or it tags nothing, or its template has other fields: then use
                `predict`.
        """
        if isinstance(texts, str):
            raise DataError("tag() takes a list of texts or of lists of words, and got a single text; write [text]")
        task, kind = self._get(name).task, self._get(name).prompt.task.type
        if not isinstance(task, Tagging):
            raise SoftPromptError(f'the task of "{name}" is {kind}, and tag() takes one of type tagging')
        if len(task.renderer.template.fields) != 1:
            fields = ", ".join(task.renderer.template.fields)
            raise SoftPromptError(f'the template of "{name}" has the fields {fields}; give records to predict()')
        words = [text if isinstance(text, str) else list(text) for text in texts]
        return self.predict(name, [{task.config.tokens_field: one} for one in words], batch_size=batch_size)

    def generate(
        self,
        name: str | None,
        record: Mapping[str, Any] | str,
        options: GenerationOptions | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Generated:
        """Answer one record with a soft prompt, or continue a text with the bare model.

        Args:
            name: of a loaded soft prompt, or None for the bare model.
            record: the template's fields; a text stands for the first field, and for the bare model is continued as is.
            options: how to decode; greedy, and as long as the prompt's task says, where absent.
            on_text: gets each piece of text as it comes.

        Raises:
            SoftPromptError: no soft prompt of that name is loaded.
            BackboneError: the context leaves no room for an answer.
        """
        if name is None:
            if not isinstance(record, str):
                raise DataError("the bare model continues a text and knows no template; give it the text itself")
            context = list(self.backbone.tokenizer(record)["input_ids"])
            options = options or GenerationOptions()
        else:
            loaded = self._get(name)
            renderer = loaded.task.renderer
            if isinstance(record, str):
                record = self.first_field(name, record)
            options = options or GenerationOptions(max_new_tokens=getattr(loaded.prompt.task, "max_new_tokens", 128))
            context = renderer.question(record, options.max_new_tokens)
        listener = (lambda _index, text: on_text(text)) if on_text else None
        return generate(self.backbone, [context], options, on_text=listener)[0]

    def first_field(self, name: str, text: str, others: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the record in which a text stands for the template's first field, that of a system message apart.

        Args:
            name: of a loaded soft prompt.
            text: of the first field.
            others: further fields; optional ones may be absent, and are then empty.

        Raises:
            DataError: the template has no field, needs more of them, or has none of a given name.
            SoftPromptError: no soft prompt of that name is loaded.
        """
        template, others = self._get(name).task.renderer.template, others or {}
        fields, question = template.fields, template.question_field
        if question is None:
            raise DataError(f'the template of "{name}" has no field for a text; give records to predict()')
        listed = f"it has {', '.join(fields)}"
        unknown = [field for field in others if field not in fields]
        if unknown:
            raise DataError(
                f'the template of "{name}" has no field "{unknown[0]}"; {listed}.{did_you_mean(unknown[0], fields)}'
            )
        known = (question, *template.optional_fields, *others)
        needed = [field for field in fields if field not in known]
        if needed:
            raise DataError(f'the template of "{name}" needs {", ".join(needed)} beside its first field; {listed}')
        return dict.fromkeys(fields, "") | {question: text} | dict(others)

    def close(self) -> None:
        """Take all virtual tokens away from the backbone."""
        for name in list(self._loaded):
            self.remove(name)
        self._tokens.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _get(self, name: str) -> LoadedPrompt:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise SoftPromptError(
                f'no soft prompt "{name}" is loaded (loaded: {known}).{did_you_mean(name, list(self._loaded))}'
            )
        return self._loaded[name]
