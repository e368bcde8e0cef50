"""Tokens to text as they come, without breaking a character or losing a leading space."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of tokens, in pieces that join to the text of the whole.

    What a token adds depends on those before it (decoders drop the space that begins a text, and
    spread characters over tokens). So the tokens since the last whole piece are decoded with and
    without the new one, and the difference is told once it ends in no half character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._told = 0
        self.text = ""

    def add(self, token: int) -> str:
        """The text that this token completes; empty while there is none."""
        self._ids.append(token)
        return self._tell(unfinished=False)

    def rest(self) -> str:
        """What is left at the end, replacement characters for half ones included."""
        return self._tell(unfinished=True)

    def _tell(self, *, unfinished: bool) -> str:
        before = self._decode(self._ids[self._context : self._told])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(_INCOMPLETE) and not unfinished):
            return ""
        self._context, self._told = self._told, len(self._ids)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
