"""How well a model predicts a text: perplexity, and bits per byte, which do not depend on the tokenizer."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tenfold.errors import TenfoldError
from tenfold.evaluate.scoring import Text
from tenfold.evaluate.subject import Subject
from tenfold.train.corpus import read_documents
from tenfold.train.split import progress_bar


def perplexity(subject: Subject, source: str, stride: int | None) -> dict[str, Any]:
    """What `tenfold eval --perplexity --json` prints; the names are stable.

    Each document of the source is predicted for itself, in windows (`Subject.windows`). Raises TenfoldError
    for a source that is missing, is not UTF-8 or holds no text, and for a stride that leaves tokens out.
    """
    stride = max(1, subject.context // 2) if stride is None else stride
    if stride > subject.context:
        raise TenfoldError(
            f"--stride {stride} leaves tokens out: it must be 1 to {subject.context}, the context"
        )
    texts = [document.text for document in read_documents([source])]
    ids = [subject.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokens, num_bytes = sum(map(len, ids)), sum(len(text.encode()) for text in texts)
    if not tokens:
        raise TenfoldError(f"{source}: the model's tokenizer makes no tokens of its text")
    nats = -sum(score.logprob for score in subject.scorer.scores(_windows(subject, ids, stride)))
    return {
        "model": subject.name,
        "text": source,
        "documents": len(texts),
        "bytes": num_bytes,
        "tokens": tokens,
        "context": subject.context,
        "stride": stride,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


def _windows(subject: Subject, ids: Sequence[Sequence[int]], stride: int) -> Iterator[Text]:
    """Of all documents, with a bar that shows how much was taken."""
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=sum(map(len, ids)))
        for document in ids:
            for window in subject.windows(document, stride):
                yield window
                bar.advance(task, len(window.targets))
