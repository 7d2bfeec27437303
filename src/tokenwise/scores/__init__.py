"""Statistics of every token, computed once and kept on disk, so that a reference need not run beside the training."""

from tokenwise.scores.reference import StoredReference
from tokenwise.scores.scoring import score
from tokenwise.scores.store import ScoreStore
from tokenwise.scores.store import open_store as open

__all__ = ["ScoreStore", "StoredReference", "open", "score"]
