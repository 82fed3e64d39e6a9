"""The README of a merged model: what it holds, and the commands of each engine, with the tasks' own names in them.

Knows what `ptune_merged.json` holds, and nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ptune.merging.chat_template import kwarg_of

_LISTED = 50
_SKIPS_HEAD = {"gpt2": "GPT-2", "bloom": "BLOOM", "opt": "OPT", "gemma": "Gemma", "gemma2": "Gemma 2"}
"""Families for which some versions of vLLM take the output head to be the input matrix, whatever the folder holds."""


def readme(description: Mapping[str, Any]) -> str:
    """Return the README's Markdown.

    Args:
        description: what `ptune_merged.json` holds.
    """
    tasks: dict[str, dict[str, Any]] = description["tasks"]
    name, task = next(iter(tasks.items()))
    count = sum(len(each["ids"]) for each in tasks.values())
    many = len(tasks) > 1
    choice = (
        'A request names its task by `chat_template_kwargs: {"task": ...}`; without it the bare model answers.'
        if many
        else "It has one task, which the chat template takes; a request with `chat_template_kwargs: "
        '{"task": ""}` asks the bare model.'
    )
    parts = [
        "---\nlibrary_name: transformers\ntags: [ptune, p-tuning, soft-prompt]\n---",
        f"# {description['backbone'].rstrip('/').split('/')[-1]} with {len(tasks)} task{'s' if many else ''}",
        f"A plain model folder, written by `ptune merge`: `{description['backbone']}`, whose vocabulary has {count} "
        f"virtual tokens of {len(tasks)} soft prompt{'s' if many else ''} as extra rows. All other weights are as they "
        "were; the ones in files that were not written anew are hard links to the backbone's files, so do not edit "
        f"either in place. {choice}",
        _table(tasks),
        "## Ask",
        _request(name, task, many=many),
        *_labels(tasks),
        "## Engines",
        _engines(name, task, many=many),
        *_head_warning(description),
        "## Know",
        _limits(description),
    ]
    return "\n\n".join(parts) + "\n"


def _table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| task | kind | user's message | other fields | ids of its virtual tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, task in list(tasks.items())[:_LISTED]:
        first, *others = task["fields"] or ["nothing"]
        listed = [f"{other} (optional)" if other in task["optional_fields"] else other for other in others]
        ids = task["ids"]
        lines.append(
            f"| {_cell(name)} | {task['task']['type']} | {_cell(first)} | {_cell(', '.join(listed)) or '-'} "
            f"| {ids[0]} to {ids[-1]} |"
        )
    rest = len(tasks) - _LISTED
    return "\n".join([*lines, *([f"\n{rest} more: see `ptune_merged.json`."] if rest > 0 else [])])


def _kwargs(name: str, task: Mapping[str, Any], *, many: bool) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"task": name} if many else {}
    for field in task["fields"][1:]:
        if kwarg_of(field):
            kwargs[field] = "..."
        else:
            kwargs.setdefault("fields", {})[field] = "..."
    return kwargs


def _request(name: str, task: Mapping[str, Any], *, many: bool) -> str:
    body: dict[str, Any] = {"model": "merged", "messages": [{"role": "user", "content": "..."}], "temperature": 0}
    body["max_tokens"] = task["task"].get("max_new_tokens", 8)
    kwargs = _kwargs(name, task, many=many)
    if kwargs:
        body["chat_template_kwargs"] = kwargs
    return (
        "The user's message is the template's first field; others are given by name, those whose names are no plain "
        "words under `fields`. The tasks were measured with greedy decoding, so send `temperature` 0 for "
        "their answers.\n\n"
        f"```json\n{json.dumps(body, indent=2, ensure_ascii=False)}\n```"
    )


def _labels(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    sections = []
    for name, task in list(tasks.items())[:_LISTED]:
        words = task["task"].get("verbalizer")
        if not words:
            continue
        lines = ["| label | words | token ids |", "| --- | --- | --- |"]
        lines += [
            f"| {_cell(label)} | `{json.dumps(text, ensure_ascii=False)}` | {task['labels'][label]} |"
            for label, text in words.items()
        ]
        if all(len(ids) == 1 for ids in task["labels"].values()):
            ids = sorted(ids[0] for ids in task["labels"].values())
            how = (
                "The label is the likeliest of these tokens, the first that the model would say. Ask for `max_tokens` "
                "1 with `logprobs` and `top_logprobs` and compare theirs; where the engine has it, `allowed_token_ids: "
                f"{ids}` leaves it no other answer."
            )
        else:
            how = (
                "A label's score is the sum of the log-probabilities of its tokens behind the context: compare what "
                "the "
                "engine gives for the rendered prompt followed by each label's words (`prompt_logprobs`, or `echo` "
                "with `logprobs`)."
            )
        sections.append(f"### Labels of {_cell(name)}\n\n" + "\n".join(lines) + f"\n\n{how}")
    return sections


def _engines(name: str, task: Mapping[str, Any], *, many: bool) -> str:
    kwargs = "".join(f", {key}={value!r}" for key, value in _kwargs(name, task, many=many).items())
    new = task["task"].get("max_new_tokens", 8)
    return f"""In the parent folder of this one, called `merged` here. Of these, ptune's tests try transformers,
vLLM and llama.cpp, with small models.

transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("merged"), AutoModelForCausalLM.from_pretrained("merged")
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{kwargs}
)
answer = model.generate(**inputs, max_new_tokens={new}, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

vLLM: `vllm serve merged`, then the request above to `/v1/chat/completions`.

SGLang: `python -m sglang.launch_server --model-path merged`, then the same.

TGI: `text-generation-launcher --model-id merged`. It may not pass `chat_template_kwargs` on; then render the chat by
`tokenizer.apply_chat_template(..., tokenize=False)` and send the text to `/generate`.

llama.cpp: `python convert_hf_to_gguf.py merged --outfile merged.gguf`, then `llama-server -m merged.gguf
--jinja`. Where a family's converter leaves the output head out (see below), the answers would be wrong.

Whoever sends text to a plain completion endpoint renders it by the chat template first, and asks that no special tokens
be added again (`add_special_tokens: false`)."""


def _head_warning(description: Mapping[str, Any]) -> list[str]:
    family = _SKIPS_HEAD.get(description["family"])
    if family is None or not description["untied"]:
        return []
    return [
        f"**{family} outside of transformers.** The output head was the input matrix and is now one of its own "
        "(`tie_word_embeddings` is false), for otherwise virtual tokens could be generated. Some versions of "
        f"vLLM leave a {family} output head out when they load one, or refuse such a folder. Compare a few greedy "
        "answers with transformers' before you rely on another engine for it."
    ]


def _limits(description: Mapping[str, Any]) -> str:
    rounding, tasks = description["rounding"], description["tasks"]
    limits = sorted({task["max_length"] for task in tasks.values() if task["max_length"]})
    lines = [
        f"- Virtual tokens are not said: together they had a probability of at most {description['probability']:.1g}, "
        f"and {description['mean_probability']:.1g} on the mean, at {description['positions']} positions of text that "
        "the model wrote itself; under transformers they are suppressed besides.",
        f"- They are stored in {description['dtype']}: rounded by {rounding['relative']:.1g} of their norm, which "
        f"changed the likeliest next token in {rounding['changed']} of {rounding['contexts']} contexts, and its "
        f"log-probability by {rounding['log_probability']:.1g} at most.",
        "- The chat template cuts nothing: a text beyond the model's context is refused by the engine, not shortened "
        "as ptune shortens it" + (f" (to {', '.join(map(str, limits))} text tokens in training)." if limits else "."),
        f"- A text that spells the name of a virtual token, `{description['mark']}:...`, becomes it on plain "
        "completion endpoints, and in chats with the bare model's own chat template; in a task's messages that "
        "spelling is broken "
        "by a blank.",
        "- A system message, tools or pictures have no place in a task's template and are refused.",
        "- Licence and card of the backbone are its own; its card is in `README.backbone.md`, where it had one.",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
