"""Folders that several tests start from."""

import pytest

import twins


@pytest.fixture
def saved(tmp_path):
    """A folder in LLaVA's layout, and its model."""
    model = twins.model()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def sharded(tmp_path):
    twins.model().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"
