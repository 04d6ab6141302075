"""Tokenizers of the `sentencepiece` library (extra `sentencepiece`).

Its own code does the work: rebuilt in another library, its normalisation and its ties between pieces would agree with the
original on most text, and a model is trained on all of it.
"""

from __future__ import annotations

from eellm.data.tokenizer import KNOWN_ENDS, Tokenizer
from eellm.errors import DataError, MissingExtra


class SentencePieceTokenizer(Tokenizer):
    """A .model file's content; the end of a document is `end_of_document`, or the model's own end of a sentence.

    A model that was trained without one ends documents with a known name that it has, or with one more entry. What its
    trainer declared as "user-defined symbols" are pieces of text to SentencePiece: text that spells one gets it.
    Raises DataError for something else than a model, and where it lacks the entry that is asked for.
    """

    suffix = ".model"

    def __init__(self, content: bytes, end_of_document: str | None = None):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingExtra("sentencepiece", "sentencepiece", "a SentencePiece tokenizer (.model)") from error
        self._content = content
        self._processor = SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(content)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({error}).") from error
        self._pieces = self._processor.get_piece_size()
        self.eod_id = self._end(end_of_document)
        self.vocab_size = max(self._pieces, self.eod_id + 1)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([token for token in ids if token < self._pieces and token != self.eod_id])

    def to_bytes(self) -> bytes:
        return self._content

    def _end(self, wanted: str | None) -> int:
        if wanted is None and self._processor.eos_id() >= 0:
            return self._processor.eos_id()
        for name in KNOWN_ENDS if wanted is None else (wanted,):
            token = self._processor.piece_to_id(name)
            if self._processor.id_to_piece(token) == name:  # the id of what is not there is that of "unknown"
                return token
        if wanted is not None:
            raise DataError(f"tokenizer.end_of_document={wanted}: the vocabulary has no such entry.")
        return self._pieces
