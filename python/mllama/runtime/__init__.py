"""Generation with the core model: sessions and sampling."""
