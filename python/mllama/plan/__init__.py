"""The memory that a run of training needs, before it is run."""
