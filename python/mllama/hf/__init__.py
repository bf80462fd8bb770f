"""transformers' interfaces of the models. No other room imports transformers."""

import gc

import transformers.modeling_utils  # noqa: F401

# torch's compiler, which transformers imports, leaves a cycle behind that holds the frames of its
# callers, and so the model that `mllama.load` has made in one of them.
gc.collect()
