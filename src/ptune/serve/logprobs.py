"""Log-probabilities of written tokens in OpenAI's two shapes. Knows tokenizers, and no engine."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ptune.generation.sampling import TokenLogprob
from ptune.serve.protocol import ChatLogprobs, CompletionLogprobs, TokenAlternative, TokenEntry

_WINDOW = 8  # tokens before one that may change how it is spelt
_UNFINISHED = "\ufffd"
_LEAST = -9999.0  # what OpenAI writes for what is all but impossible


class Spelling:
    """The tokens of one answer, spelt so that together they are its text, however they are cut into events.

    A token that begins a character and does not end it is empty; the one that ends it has all of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._length = 0  # of the text so far

    def for_chat(self, logprobs: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
        """Return the next tokens as chats have them; None where none were asked for."""
        if logprobs is None:
            return None
        return ChatLogprobs(content=[self._entry(one) for one in logprobs])

    def for_completion(self, logprobs: Sequence[TokenLogprob] | None) -> CompletionLogprobs | None:
        """Return the next tokens as completions have them; None where none were asked for."""
        if logprobs is None:
            return None
        told = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for one in logprobs:
            told.text_offset.append(self._length)
            entry = self._entry(one)
            told.tokens.append(entry.token)
            told.token_logprobs.append(entry.logprob)
            best: dict[str, float] = {}
            for other in entry.top_logprobs:
                best.setdefault(other.token, other.logprob)  # the likelier of two that are spelt alike
            told.top_logprobs.append(best)
        return told

    def _entry(self, one: TokenLogprob) -> TokenEntry:
        others = [_alternative(self._named(token), value) for token, value in one.top]
        text = self._spelt(one.id).rstrip(_UNFINISHED)
        self._ids = [*self._ids[-_WINDOW:], one.id]
        self._length += len(text)
        logprob = max(one.logprob, _LEAST)
        return TokenEntry(token=text, logprob=logprob, bytes=list(text.encode()), top_logprobs=others)

    def _named(self, token: int) -> str:
        """Return a token as it would be spelt here; a special one, which no text shows, by its name."""
        if token in self._tokenizer.all_special_ids:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return self._spelt(token)

    def _spelt(self, token: int) -> str:
        before = self._text(self._ids).rstrip(_UNFINISHED)
        return self._text([*self._ids, token])[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _alternative(token: str, logprob: float) -> TokenAlternative:
    whole = None if _UNFINISHED in token else list(token.encode())
    return TokenAlternative(token=token, logprob=max(logprob, _LEAST), bytes=whole)
