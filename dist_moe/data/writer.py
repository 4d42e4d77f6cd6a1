"""Writes the token files of one split, document by document."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np


class SplitWriter:
    """Context manager over the files `SPLIT.tokens`, `.starts`, `.domains` (raw arrays) and `.documents.jsonl`.

    `starts` has one entry more than there are documents: the tokens of document i are between entries i and i + 1.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.split = split
        self.documents = 0
        self._dtype = dtype
        self._tokens = 0
        self._text_bytes = 0
        self._begun = (0, 0)
        with ExitStack() as stack:
            self._token_file, self._start_file, self._domain_file, self._list_file = (
                stack.enter_context((folder / f"{split}.{kind}").open("xb"))
                for kind in ("tokens", "starts", "domains", "documents.jsonl")
            )
            self._files = stack.pop_all()

    def __enter__(self) -> "SplitWriter":
        self._start_file.write(np.int64(0).tobytes())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    @property
    def predicted(self) -> int:
        """The tokens that are predicted from text: all but the first of each document, and its end token."""
        return self._tokens - 2 * self.documents

    def add(self, ids: np.ndarray, text: str) -> None:
        """Append a piece of the document that `end` will complete.

        Args:
            ids: int64 [tokens].
            text: The text of these tokens.
        """
        self._token_file.write(ids.astype(self._dtype).tobytes())
        self._tokens += len(ids)
        self._text_bytes += len(text.encode())

    def end(self, name: str, domain_name: str, domain: int, end_id: int) -> None:
        """Complete a document by the end token.

        Args:
            name: Of the document.
            domain_name: Of its domain.
            domain: The index of its domain.
            end_id: The end token.
        """
        self.add(np.array([end_id]), "")
        self.documents += 1
        self._start_file.write(np.int64(self._tokens).tobytes())
        self._domain_file.write(np.int64(domain).tobytes())
        tokens, text_bytes = self._tokens - self._begun[0], self._text_bytes - self._begun[1]
        self._begun = (self._tokens, self._text_bytes)
        entry = {"name": name, "domain": domain_name, "tokens": tokens, "bytes": text_bytes}
        self._list_file.write(json.dumps(entry).encode() + b"\n")

    def totals(self) -> dict[str, int]:
        """Return the documents, tokens (end tokens included) and UTF-8 bytes of text written so far."""
        return {"documents": self.documents, "tokens": self._tokens, "text_bytes": self._text_bytes}
