"""Folders that several tests start from."""

import pytest

import tiny


@pytest.fixture
def saved(tmp_path):
    """A folder in LLaVA's layout, and its model."""
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def sharded(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"
