"""A template's words as a user's message, in the form of the tokenizer's own chat template.

Instruction-tuned models expect their messages between marks of their own (``<|im_start|>user`` and the like). Here the
tokenizer's chat template is read once, and its marks become words of ptune's template: what training, evaluation, the
saved soft prompt and every engine then share is plain text again, and no later change of the tokenizer's chat template
moves it. Virtual tokens that open the template stay in front of everything; others stay in the message.

Knows templates and tokenizers, and no models.
"""

from __future__ import annotations

from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from ptune.errors import ConfigError
from ptune.template import Bos, Template, Virtual, escape, written

_USER, _SYSTEM = "ptune<user>message", "ptune<system>message"  # no text of a chat template, and nothing it would strip


def in_chat(template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Template:
    """Return a template whose words are the user's message, ready for the assistant's answer.

    The answer ends in the tokenizer's end token, as everywhere.

    Args:
        template: with the answer at its end.
        tokenizer: with a chat template.
        system: words of a system message, fields among them; the chat template's own where absent.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that changes or repeats a message or takes no system
            message; or the template does not end with its answer.
        TemplateError: ``system`` cannot be parsed.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "prompt.chat asks for the tokenizer's chat template, and this tokenizer has none; leave prompt.chat out, "
            "and write the marks of the model's conversations into prompt.template"
        )
    if not template.ends_with_answer:
        raise ConfigError(f"in a chat the answer ends the template, and more follows it in {template.source!r}")
    opening = list(takewhile(lambda piece: isinstance(piece, Virtual), template.pieces))
    message = "".join(written(p) for p in template.pieces[len(opening) : -1] if not isinstance(p, Bos))
    messages = [{"role": "user", "content": _USER}]
    if system is not None:
        Template.parse(f"{system}{{answer}}")
        messages.insert(0, {"role": "system", "content": _SYSTEM})
    text = _rendered(tokenizer, messages)
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token)  # the renderer sets it, as for every template
    for mark in (_USER, _SYSTEM)[: len(messages)]:
        if text.count(mark) != 1:
            raise ConfigError(
                f"the tokenizer's chat template shows a message {text.count(mark)} times instead of once; leave "
                "prompt.chat out, and write the marks of the model's conversations into prompt.template"
            )
    words = escape(text).replace(_USER, message).replace(_SYSTEM, system or "")
    return Template.parse("".join(map(written, opening)) + words + "{answer}")


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # jinja's, or what the template itself raises for a role that it does not know
        raise ConfigError(
            f"the tokenizer's chat template does not take {' and '.join(m['role'] for m in messages)}: {error}"
        ) from error
