"""A program of its own that prepares one source on an embedded Ray, for tests that kill it.

python prepare_program.py FILES TOKENIZER_FOLDER TOKENS_DIR SLICE_BYTES
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from raydist.corpus.build import build_log, plan_log
from raydist.corpus.tokenizer import open_tokenizer
from raydist.job.schema import Corpus, TrainSource


def main(files: str, tokenizer: str, tokens_dir: str, slice_bytes: str) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    source = TrainSource(path=files)
    corpus = Corpus(sources={"a": source}, slice_bytes=int(slice_bytes))
    plan = plan_log(source, corpus, open_tokenizer(Path(tokenizer)).spec, Path(tokens_dir))
    build_log(plan, on_error="fail")
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
