from processing_mllama import *  # noqa: F403
