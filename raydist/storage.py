"""The storage folder that runs share: the names in it.

<storage>/
    <name>/                      a run or a sweep; see raydist.folder
    tokens/<fingerprint>/        a token log; see raydist.corpus.log_folder
    tokenizers/<fingerprint>/    a tokenizer that was trained here
    .packs/<log>-<packing>/      a pack index; can be deleted, since it is made again
    mlflow.db, mlflow-artifacts/ the tracking database of `mlflow: true`; in a bucket each run has its own
"""

from __future__ import annotations

from pathlib import Path

from raydist.bucket.mirror import is_remote, place_of

TOKENS, TOKENIZERS = "tokens", "tokenizers"
MLFLOW_DATABASE, MLFLOW_ARTIFACTS = "mlflow.db", "mlflow-artifacts"
SHARED = (TOKENS, TOKENIZERS)
"""Folders that runs share, and so no names for a run. A run's name cannot begin with a dot."""


class Storage:
    """Paths in one storage folder, `~` expanded; making the object touches nothing.

    path: a folder; or the URI of a prefix of a bucket: then the paths are this node's mirror of it.
    Raises JobError for a URI that cannot hold runs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = place_of(str(path)) if is_remote(str(path)) else Path(path).expanduser()
        self.tokens = self.path / TOKENS
        self.tokenizers = self.path / TOKENIZERS
        self.pack_indexes = self.path / ".packs"
        self.mlflow_database = self.path / MLFLOW_DATABASE
        self.mlflow_artifacts = self.path / MLFLOW_ARTIFACTS

    @classmethod
    def of_log(cls, log: Path) -> Storage:
        """The storage that a token log's folder lies in; of a log outside any `tokens/`, its parent."""
        parent = log.parent
        return cls(parent.parent if parent.name == TOKENS else parent)

    def resolve(self) -> Storage:
        """The same folder by its absolute path."""
        return Storage(self.path.resolve())
