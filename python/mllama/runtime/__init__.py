"""Generation on the core model: sessions and sampling."""
