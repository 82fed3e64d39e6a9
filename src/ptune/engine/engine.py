"""The engine: one backbone in memory, any number of soft prompts, and the bare model always among the choices.

All loaded prompts stand in the backbone's one table of virtual tokens, each at its own range of ids, so using one or
another is a matter of ids and never of switching. One call runs at a time on a backbone, whatever the threads.

Knows nothing of training or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ptune.config.run import ModelConfig
from ptune.config.settings import bytes_of
from ptune.engine.asking import answer_ids, context_ids
from ptune.engine.loaded_prompts import LoadedPrompt as LoadedPrompt
from ptune.engine.loaded_prompts import LoadedPrompts
from ptune.engine.mixed_batches import answer_together
from ptune.engine.prompt_memory import PromptMemory
from ptune.engine.shared_writing import SharedWriting
from ptune.engine.thread import EngineThread
from ptune.errors import ConfigError, DataError, SoftPromptError
from ptune.generation.generate import Generated, GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.models.deep_start import key_value_shape
from ptune.rendering.filling import record_of_text
from ptune.soft_prompts.library import Library
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.classification import Classification
from ptune.tasks.linear_classification import LinearClassification
from ptune.tasks.log_probabilities import log_probabilities
from ptune.tasks.tagging import Tagging
from ptune.tasks.task import Assessment, Task
from ptune.template import Template


class Engine:
    """Answers with a backbone and the soft prompts that were loaded into it.

    >>> engine = Engine("mini")                                              # doctest: +SKIP
    >>> engine.load("prompts/sentiment", name="sentiment")                   # doctest: +SKIP
    >>> engine.classify("sentiment", ["This movie was fantastic!"])          # doctest: +SKIP
    [{'label': 'positive', 'probability': 0.97, ...}]

    With a folder of soft prompts, each is loaded on first use, by the name of its folder:

    >>> engine = Engine("mini", prompts="prompts", prompt_memory="1GB")      # doctest: +SKIP

    Attributes:
        backbone: that answers.
        memory: which soft prompts of a folder stand in the table.
        keys: kept keys and values of virtual tokens that open a text.
    """

    def __init__(
        self,
        backbone: Backbone | ModelConfig | str = "mini",
        *,
        prompts: str | Path | None = None,
        prompt_memory: str = "1GB",
        key_memory: str = "1GB",
    ) -> None:
        """Take a loaded backbone, or load one by its settings or name.

        Args:
            backbone: the model that answers.
            prompts: folder of soft prompts that are loaded on first use, by the name of their folder in it. One stays
                as it was read, though its folder be replaced; after `remove` it is read anew at its next use.
            prompt_memory: room for those; over it the ones unused for longest are forgotten. What is loaded by `load`
                or `add` stays.
            key_memory: room for the keys and values of virtual tokens that open a text, kept from call to call; that
                of the whole backbone, whoever uses it.

        Raises:
            BackboneError: it cannot be loaded.
            SoftPromptError: there is no such folder of soft prompts.
            ConfigError: a size is not written as in "1GB".
        """
        try:
            rooms = bytes_of(prompt_memory), bytes_of(key_memory)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.memory = PromptMemory(rooms[0])
        library = Library(prompts)
        self.backbone = backbone if isinstance(backbone, Backbone) else Backbone.load(backbone)
        self._tokens = self.backbone.attach()
        with self._tokens.lock:  # read now, for soft prompts are checked while another thread runs the model
            self.backbone.fingerprint()
            key_value_shape(self.backbone)
        self.keys = self._tokens.prefixes
        self.keys.budget = rooms[1]
        self._prompts = LoadedPrompts(self.backbone, self._tokens, library, self.memory)
        self._thread = EngineThread()
        self._writing = SharedWriting(self.backbone, self._thread, self._tokens.lock)

    @classmethod
    def for_prompt(
        cls, folder: str | Path, model: ModelConfig | str | None = None, *, name: str | None = None, **loading: Any
    ) -> Engine:
        """Load a soft prompt, with the backbone that it names or another copy of it.

        Args:
            folder: the soft prompt's.
            model: another copy of its backbone; the one that it names, of the revision it was trained on, where absent.
            name: of the soft prompt in the engine; that of its folder where absent.
            loading: fields of `ModelConfig` beside the name, as ``device`` and ``dtype``.

        Raises:
            SoftPromptError: the folder holds no sound soft prompt, or one of another backbone.
            BackboneError: the backbone cannot be loaded.
        """
        prompt = SoftPrompt.load(folder)
        engine = cls(ModelConfig.model_validate(prompt.model_config(model).model_dump() | loading))
        engine.add(name or Path(folder).resolve().name, prompt)
        return engine

    @property
    def prompts(self) -> dict[str, LoadedPrompt]:
        """The loaded soft prompts by name."""
        return dict(self._prompts.by_name)

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
            ConfigError, TemplateError: its task cannot be built.
        """
        self._prompts.add(name, prompt)

    def remove(self, name: str) -> None:
        """Forget a soft prompt; its ids are never given again. One of the folder is loaded anew when it is used.

        Those who hold it, as texts that are being written do, keep its rows until they let it go.
        """
        self._prompts.remove(name)

    def offer(self, name: str, folder: Path) -> None:
        """Let a soft prompt be loaded from its folder when it is first used."""
        self._prompts.library.add(name, folder)

    def withdraw(self, name: str) -> None:
        """Forget a soft prompt, and where it lies."""
        self._prompts.library.drop(name)
        self.remove(name)

    def hold(self, name: str) -> LoadedPrompt:
        """Return a soft prompt, loaded if it is not yet; its rows stay until each `hold` has had its `let_go`.

        They stay so even where it is removed meanwhile, or replaced by another of its name.

        Raises:
            SoftPromptError: there is none of that name, or its folder does not hold it any more.
            ConfigError, TemplateError: its task cannot be built.
        """
        return self._prompts.hold(name)

    def let_go(self, loaded: LoadedPrompt) -> None:
        """End one use of a soft prompt that `hold` gave, and forget those over the budget that nobody uses."""
        self._prompts.let_go(loaded)

    def predict(
        self, name: str | Sequence[str], records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Return the task's answer to each record, in order: label and probabilities, tags and spans, or text.

        Args:
            name: of a soft prompt for all records, or one for each of them: their rows then share batches.
            records: the fields that the templates name.
            batch_size: rows read at once.

        Raises:
            SoftPromptError: no soft prompt of a name is loaded.
            DataError: a record lacks a field of its template, or there are more or fewer names than records.
        """
        if name is None or isinstance(name, str):  # None is refused with its reason
            with self._prompts.using(name) as (loaded,):
                return loaded.task.predict(self.backbone, records, batch_size=batch_size)
        if len(name) != len(records):
            raise DataError(f"there are {len(name)} names for {len(records)} records; give one for each")
        with self._prompts.using(*name) as each:
            questions = [(loaded.task, record) for loaded, record in zip(each, records, strict=True)]
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
        with self._prompts.using(name) as (loaded,):
            return loaded.task.assess(self.backbone, records, batch_size=batch_size)

    def classify(self, name: str, texts: Sequence[str], *, batch_size: int = 32) -> list[dict[str, Any]]:
        """Classify plain texts with a soft prompt whose template has one field.

        Raises:
            SoftPromptError: no such soft prompt, or it has no labels.
            DataError: a single text is given, or the template has several fields: then use `predict`.
        """
        if isinstance(texts, str):
            raise DataError("classify() takes a list of texts, and got a single one; write [text]")
        self._check_task(name, (Classification, LinearClassification), "classify() takes one with labels")
        field = self._only_field(name)
        return self.predict(name, [{field: text} for text in texts], batch_size=batch_size)

    def tag(self, name: str, texts: Sequence[str | Sequence[str]], *, batch_size: int = 32) -> list[dict[str, Any]]:
        """Tag lists of words, or texts, which are split into words, with a soft prompt whose task is tagging.

        Returns:
            For each its ``tokens``, their ``tags`` and the ``spans`` of entities; see `Tagging.predict`.

        Raises:
            SoftPromptError: no such soft prompt, or it tags nothing.
            DataError: a single text is given, or the template has several fields: then use `predict`.
        """
        if isinstance(texts, str):
            raise DataError("tag() takes a list of texts or of lists of words, and got a single text; write [text]")
        self._check_task(name, Tagging, "tag() takes one of type tagging")
        field = self._only_field(name)
        words = [text if isinstance(text, str) else list(text) for text in texts]
        return self.predict(name, [{field: one} for one in words], batch_size=batch_size)

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
        with self._prompts.using(*([] if name is None else [name])) as held:
            context, options = context_ids(self.backbone, held[0] if held else None, record, options)
            return self.write(context, options, on_text=on_text)

    def write(
        self,
        context: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Generated:
        """Continue ids, which may hold virtual tokens of held soft prompts; nobody else runs the model meanwhile.

        Args:
            context: ids, rendered already.
            options: how to decode; greedy where absent.
            on_text: gets each piece of text as it comes.

        Raises:
            BackboneError: the context leaves no room for an answer.
        """
        listener = (lambda _index, text: on_text(text)) if on_text else None
        with self._tokens.lock:
            return generate(self.backbone, [context], options, on_text=listener)[0]

    def log_probabilities(
        self,
        name: str | None,
        records: Sequence[Mapping[str, Any] | str],
        answers: Sequence[str],
        *,
        end: bool = False,
        batch_size: int = 32,
    ) -> list[float]:
        """Return how likely each answer is behind its record: natural logarithms, summed over its tokens.

        Args:
            name: of a loaded soft prompt, or None for the bare model.
            records: as `generate` takes them.
            answers: one for each; blanks are kept, so most begin with one.
            end: count the token that ends an answer, too.
            batch_size: rows read at once.

        Raises:
            SoftPromptError: no soft prompt of that name is loaded.
            DataError: there are more or fewer answers than records, or one is of no token.
            BackboneError: the backbone is a masked model.
        """
        if len(records) != len(answers):
            raise DataError(f"there are {len(answers)} answers for {len(records)} records; give one for each")
        with self._prompts.using(*([] if name is None else [name])) as held:
            loaded = held[0] if held else None
            ids = [answer_ids(self.backbone, loaded, answer, end=end) for answer in answers]
            contexts = [
                context_ids(self.backbone, loaded, record, GenerationOptions(max_new_tokens=len(answer)))[0]
                for record, answer in zip(records, ids, strict=True)
            ]
            return log_probabilities(self.backbone, contexts, ids, batch_size=batch_size)

    async def apredict(
        self, name: str | Sequence[str], records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Do as `predict` does, in the engine's one thread. Cancelled before it begins, it costs nothing."""
        return await self._thread.run(lambda: self.predict(name, records, batch_size=batch_size))

    async def agenerate(
        self,
        name: str | None,
        record: Mapping[str, Any] | str,
        options: GenerationOptions | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Generated:
        """Do as `generate` does, in the engine's one thread; ``on_text`` is called in the event loop.

        Texts that are asked for meanwhile join it, and share its passes. Cancelled, it ends at the next token.
        """
        held: list[LoadedPrompt] = []

        def begin() -> tuple[list[int], GenerationOptions]:
            with self._prompts.using(*([] if name is None else [name])) as loaded:
                begun = context_ids(self.backbone, loaded[0] if loaded else None, record, options)
                held.extend(self.hold(one.name) for one in loaded)  # until the text has ended
                return begun

        def end() -> None:
            for loaded in held:
                self.let_go(loaded)

        return await self._writing.write(begin, end, on_text)

    def record_for(self, name: str, text: str, others: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the record in which a text stands for the template's first field, that of a system message apart.

        Raises:
            DataError: as `record_of_text`.
            SoftPromptError: no soft prompt of that name is loaded.
        """
        return record_of_text(self._template(name), text, others or {}, name)

    def close(self) -> None:
        """Take all virtual tokens away from the backbone."""
        self._thread.close()
        self._writing.close()
        with self._tokens.lock:
            self._prompts.clear()
            self._tokens.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _template(self, name: str) -> Template:
        with self._prompts.using(name) as (loaded,):
            return loaded.task.renderer.template

    def _check_task(self, name: str, kinds: type[Task] | tuple[type[Task], ...], wanted: str) -> None:
        with self._prompts.using(name) as (loaded,):
            if not isinstance(loaded.task, kinds):
                raise SoftPromptError(f'the task of "{name}" is {loaded.prompt.task.type}, and {wanted}')

    def _only_field(self, name: str) -> str:
        fields = self._template(name).fields
        if len(fields) != 1:
            raise DataError(f'the template of "{name}" has the fields {", ".join(fields)}; give records to predict()')
        return fields[0]
