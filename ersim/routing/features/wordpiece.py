"""WordPiece tokens of an uncased BERT model, from its vocabulary file alone.

The algorithm is BERT's published one (Devlin et al. 2018; Wu et al. 2016): lower case, accents
stripped, split at spaces, punctuation and CJK signs, then greedily the longest known piece.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

LONGEST_WORD_CHARS = 100


@lru_cache(maxsize=65_536)
def _kind(char: str) -> str:
    """space, drop, alone (punctuation and CJK signs stand by themselves) or letter."""
    code = ord(char)
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return "space"
    if code in (0, 0xFFFD) or category[0] == "C":
        return "drop"
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126 or category[0] == "P":
        return "alone"
    cjk = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
    return "alone" if any(low <= code <= high for low, high in cjk) else "letter"


def basic_words(text: str) -> Iterator[str]:
    """Lower-case words and single signs of `text`, accents removed."""
    plain = unicodedata.normalize("NFD", text).lower()
    word: list[str] = []
    for char in plain:
        if unicodedata.category(char) == "Mn":
            continue
        kind = _kind(char)
        if kind == "letter":
            word.append(char)
        elif kind != "drop":
            if word:
                yield "".join(word)
                word.clear()
            if kind == "alone":
                yield char
    if word:
        yield "".join(word)


class WordPiece:
    """Text to token ids with [CLS] in front and [SEP] behind."""

    def __init__(self, vocabulary: Path, max_tokens: int) -> None:
        lines = vocabulary.read_text(encoding="utf-8").split("\n")
        self._ids = {piece: index for index, piece in enumerate(lines)}
        self._cls, self._sep, self._unknown = (self._ids[name] for name in ("[CLS]", "[SEP]", "[UNK]"))
        self._room = max_tokens - 2
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids, at most `max_tokens` of them; the rest of the text is ignored."""
        ids = [self._cls]
        for word in basic_words(text):
            ids += self._pieces(word)
            if len(ids) > self._room:
                break
        return [*ids[: self._room + 1], self._sep]

    def _pieces(self, word: str) -> tuple[int, ...]:
        found = self._known.get(word)
        if found is None:
            found = self._split(word)
            if len(self._known) < 100_000:  # bounds the memory of a long-lived gateway
                self._known[word] = found
        return found

    def _split(self, word: str) -> tuple[int, ...]:
        if len(word) > LONGEST_WORD_CHARS:
            return (self._unknown,)
        pieces, start = [], 0
        while start < len(word):
            end = len(word)
            while end > start:
                piece = ("##" if start else "") + word[start:end]
                if piece in self._ids:
                    break
                end -= 1
            if end == start:
                return (self._unknown,)
            pieces.append(self._ids[piece])
            start = end
        return tuple(pieces)
