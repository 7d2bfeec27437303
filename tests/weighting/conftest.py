import gc

import pytest


@pytest.fixture(autouse=True)
def _no_collection_of_garbage(monkeypatch):
    """The Trainer collects it at every start, which takes longer than all else here."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
