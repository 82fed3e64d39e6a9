"""A template's words as a user's message, in the form of the tokenizer's own chat template.

Instruction-tuned models expect their messages between marks of their own (``<|im_start|>user`` and the like). Here the
tokenizer's chat template is read once, and its marks become words of ptune's template: what training, evaluation, the
saved soft prompt and every engine then share is plain text again, and no later change of the tokenizer's chat template
moves it. Virtual tokens that open the template stay in front of everything; others stay in the first message. How a
conversation goes on, from an answer to the next one, is read likewise and becomes the template's [next].

Knows templates and tokenizers, and no models.
"""

from __future__ import annotations

from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from ptune.errors import ConfigError
from ptune.rendering.further import end_of_turn
from ptune.template import Bos, Template, Virtual, escape, written

# no text of a chat template, and nothing it would strip
_USER, _SYSTEM = "ptune<user>message", "ptune<system>message"
_ASSISTANT, _AGAIN = "ptune<assistant>message", "ptune<further>message"


def in_chat(template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Template:
    """Return a template whose words are the user's message, ready for the assistant's answer.

    The answer ends in the tokenizer's end token, as everywhere, and before it in the chat template's end of a turn, if
    that is another token. Where the chat template takes no conversation of two questions, or repeats or changes what
    was said before, there is no [next], and the first exchange's words are repeated.

    Args:
        template: with the answer at its end.
        tokenizer: with a chat template.
        system: words of a system message, fields among them; the chat template's own where absent.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that changes or repeats a message or takes no system
            message; or the template does not end with its answer, or has a [next] of its own.
        TemplateError: ``system`` cannot be parsed.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "prompt.chat asks for the tokenizer's chat template, and this tokenizer has none; leave prompt.chat out, "
            "and write the marks of the model's conversations into prompt.template"
        )
    if not template.ends_with_answer:
        raise ConfigError(f"in a chat the answer ends the template, and more follows it in {template.source!r}")
    if template.following:
        raise ConfigError(
            "with prompt.chat the tokenizer's chat template says how a conversation goes on, and the template has a "
            "[next], too; leave one of the two out"
        )
    opening = list(takewhile(lambda piece: isinstance(piece, Virtual), template.pieces))
    message = "".join(written(p) for p in template.pieces[len(opening) : -1] if not isinstance(p, Bos))
    messages = [{"role": "user", "content": _USER}]
    if system is not None:
        Template.parse(f"{system}{{answer}}")
        messages.insert(0, {"role": "system", "content": _SYSTEM})
    text = _rendered(tokenizer, messages)
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token) and _begins_every_text(tokenizer):
        text = text.removeprefix(tokenizer.bos_token)  # the renderer sets it, as for every template
    for mark in (_USER, _SYSTEM)[: len(messages)]:
        if text.count(mark) != 1:
            raise ConfigError(
                f"the tokenizer's chat template shows a message {text.count(mark)} times instead of once; leave "
                "prompt.chat out, and write the marks of the model's conversations into prompt.template"
            )
    words = escape(text).replace(_USER, message).replace(_SYSTEM, system or "")
    again = "".join(written(p) for p in template.pieces[len(opening) : -1] if not isinstance(p, Bos | Virtual))
    further = escape(_between(tokenizer, messages)).replace(_AGAIN, again)
    source = "".join(map(written, opening)) + words + "{answer}"
    return Template.parse(f"{source}[next]{further}{{answer}}" if further else source)


def _begins_every_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its bos in front of a text; else the chat template's own stays a word."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _between(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Return what stands between an answer and the next one, a question among it; nothing where that is not to be had.

    It begins with the end of a turn: blanks before that are left out, for a single answer has none, and where the chat
    template has no token for it, the tokenizer's end token stands there.
    """
    later = [{"role": "assistant", "content": _ASSISTANT}, {"role": "user", "content": _AGAIN}]
    try:
        text = _rendered(tokenizer, messages + later)
    except ConfigError:
        return ""
    if any(text.count(mark) != 1 for mark in (_ASSISTANT, _AGAIN)):
        return ""
    between = text.partition(_ASSISTANT)[2]
    end = end_of_turn(between.partition(_AGAIN)[0], tokenizer)
    begins = tokenizer.bos_token and tokenizer.bos_token != tokenizer.eos_token and end.endswith(tokenizer.bos_token)
    if not end or begins:
        return (tokenizer.eos_token or "") + between
    return end.lstrip() + between[len(end) :]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # jinja's, or what the template itself raises for a role that it does not know
        raise ConfigError(
            f"the tokenizer's chat template does not take {' and '.join(m['role'] for m in messages)}: {error}"
        ) from error
