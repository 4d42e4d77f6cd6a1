"""Writes the token files of one split, document by document."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from dist_moe.data.files import Document


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
        with ExitStack() as stack:
            self._token_file, self._start_file, self._domain_file, self._list_file = (
                stack.enter_context((folder / f"{split}.{kind}").open("wb"))
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

    def add(self, document: Document, domain: int, ids: np.ndarray) -> None:
        """Append one document.

        Args:
            document: its name, domain and text.
            domain: the index of its domain.
            ids: int64 [tokens], with the end token.
        """
        text_bytes = len(document.text.encode())
        self._token_file.write(ids.astype(self._dtype).tobytes())
        self.documents += 1
        self._tokens += len(ids)
        self._text_bytes += text_bytes
        self._start_file.write(np.int64(self._tokens).tobytes())
        self._domain_file.write(np.int64(domain).tobytes())
        entry = {"name": document.name, "domain": document.domain, "tokens": len(ids), "bytes": text_bytes}
        self._list_file.write(json.dumps(entry).encode() + b"\n")

    def totals(self) -> dict[str, int]:
        """Return the documents, tokens (end tokens included) and UTF-8 bytes of text written so far."""
        return {"documents": self.documents, "tokens": self._tokens, "text_bytes": self._text_bytes}
